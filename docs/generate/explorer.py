"""The page that all rows of the tables of recoveries are looked up on, by model, size and text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from docs.generate.recovery import HEADLINE_COUNT, relative
from docs.generate.results import ROOT, Study, studies
from ghosted_fast.facts import named_layers

PAGE = "docs/explore.html"
_TEMPLATES = (Path(__file__).parent, ROOT / "ghosted_fast" / "reports" / "templates")
# Perplexity relative to dense at which a bar is full.
_MOST = 4.0


def explore_page() -> str:
    """Return the page: all rows in one table, and a little script that shows those asked for."""
    loader = FileSystemLoader([str(folder) for folder in _TEMPLATES])
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True)
    study, *_ = studies()
    return environment.get_template("explore.html").render(
        rows=[row for each in studies() for row in _rows(each)],
        filters=_filters(studies()),
        first={"model": study.name, "size": str(HEADLINE_COUNT), "text": study.texts[0]},
        most=f"{_MOST:g}",
    )


def _filters(found: Sequence[Study]) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Return name, title and options (value, shown) of what the rows can be filtered by."""
    sizes = sorted({count for study in found for count in study.counts})
    texts = dict.fromkeys(text for study in found for text in study.texts)
    return [
        ("model", "Model", [(study.name, study.name) for study in found]),
        ("size", "Layers removed", [(str(count), str(count)) for count in sizes]),
        ("text", "Text", [(text, text) for text in texts]),
    ]


def _rows(study: Study) -> list[dict[str, Any]]:
    """Return the rows of a model, by size, text and perplexity."""
    rows = [row for row in study.grid["rows"] if row["refused"] is None]
    return [
        _row(study, row, text)
        for count in study.counts
        for text in study.texts
        for row in sorted(
            (row for row in rows if row["remove"] == count),
            key=lambda row: float(row["perplexity"][text]["value"]),
        )
    ]


def _row(study: Study, row: dict[str, Any], text: str) -> dict[str, Any]:
    """Return what stands in one row, as text."""
    value = relative(row, study, text)
    seconds = row["seconds"]["select"] + row["seconds"]["recover"]
    return {
        "model": study.name,
        "size": str(row["remove"]),
        "text": text,
        "ours": not row["published"],
        "pair": f"{row['criterion']} + {row['recovery']}",
        "layers": named_layers(row["removed"]),
        "relative": f"{value:.2f}",
        "bar": f"{100 * min(max(math.log(value) / math.log(_MOST), 0.0), 1.0):.0f}",
        "seconds": f"{seconds:,.0f}",
        "memory": f"{row['peak_memory'] / 1e9:.1f} GB",
    }
