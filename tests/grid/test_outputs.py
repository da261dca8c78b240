"""What a grid is written as, from made-up rows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.html_balance import Balance
from support.speeds import around

from ghosted_fast.errors import MissingExtraError
from ghosted_fast.facts import layers_as_text
from ghosted_fast.grid.outputs import check_outputs, markdown, page, write_outputs
from ghosted_fast.grid.summary import summaries
from ghosted_fast.grid.table import Grid

OF_CRITERION = {"ghost": 0.9, "streamline": 1.2, "shortgpt": 1.1}
PUBLISHED = {"none": 3.0, "replaceme": 1.6, "ghost-paper": 1.5}
OF_RECOVERY = {**PUBLISHED, "ghost": 1.0, "ghost healed": 0.8}


def loss(value: float) -> dict[str, Any]:
    return {
        "value": value,
        "low": 0.9 * value,
        "high": 1.1 * value,
        "num_tokens": 511,
        "confidence": 0.95,
    }


def made_up(with_speed: bool = True) -> Grid:
    """Return a grid in which an excess is the product of three factors."""
    rows = []
    for count in (3, 5):
        for criterion, one in OF_CRITERION.items():
            for recovery, other in OF_RECOVERY.items():
                excess = 0.1 * count * one * other
                published = criterion != "ghost" and recovery in PUBLISHED
                marks = ["default"] if (criterion, recovery) == ("ghost", "ghost") else []
                if (criterion, recovery) == ("shortgpt", "ghost-paper"):
                    marks = ["best published"]
                rows.append(
                    {
                        "remove": count,
                        "criterion": criterion,
                        "recovery": recovery,
                        "corrections": 0,
                        "published": published,
                        "marks": marks,
                        "removed": [4, *range(9, 8 + count)],
                        "perplexity": {"wiki|pedia": loss(20 * (1 + excess))},
                        "excess": {"wiki|pedia": excess},
                        "accuracy": {"quiz": 0.5},
                        "parameters": 1000 - 10 * count,
                        "decode_tokens_per_s": around(30.0 + count).to_dict()
                        if with_speed
                        else None,
                        "decode_ratio": around(1 + count / 30).to_dict() if with_speed else None,
                        "seconds": {"select": 3.0, "recover": 2.0, "judge": 1.0},
                        "peak_memory": 3 * 2**30,
                        "refused": None,
                    }
                )
    refused = dict.fromkeys(rows[0]) | {
        "remove": 5, "criterion": "taylor", "recovery": "replaceme", "marks": [],
        "removed": [0], "published": True, "refused": "no <layer> before", "seconds": {},
    }  # fmt: skip
    scores = [{"start": start, "stop": start + 3, "score": 3 + start / 10} for start in range(9)]
    return Grid(
        about={
            "model": "some/model",
            "dtype": "bfloat16",
            "num_layers": 30,
            "calibration_tokens": 49152,
            "machine": {"processor": "a fast one"},
        },
        dense={"perplexity": {"wiki|pedia": loss(20.0)}, "parameters": 1000},
        rows=[*rows, refused],
        selections=[
            {
                "criterion": "ghost",
                "remove": 3,
                "removed": [0, 1, 2],
                "seconds": 1.0,
                "scores": scores,
            }
        ],
    )


def test_summaries_are_geometric_means_of_excess() -> None:
    grid = made_up()
    grid.rows.pop()
    found = {(item.criterion, item.recovery): item for item in summaries(grid)}
    ours = found["ghost", "ghost"]
    assert ours.is_default and not found["ghost", "ghost healed"].is_default
    assert ours.to_best_published == pytest.approx(0.9 / (1.1 * 1.5))
    assert ours.to_paper == pytest.approx(0.9 / (1.2 * 1.5))
    assert found["shortgpt", "ghost-paper"].to_best_published == pytest.approx(1.0)
    ratios = [item.to_best_published for item in summaries(grid)]
    assert ratios == sorted(ratios, key=lambda value: value or 0.0)


@pytest.mark.slow
def test_no_summary_where_an_excess_is_not_above_zero() -> None:
    grid = made_up()
    for row in grid.rows:
        row["excess"] = row["excess"] and {"wiki|pedia": -0.1}
    assert all(item.to_best_published is None for item in summaries(grid))
    assert "geometric mean" not in page(grid)


def test_markdown() -> None:
    text = markdown(made_up())
    assert "## 5 of 30 layers removed" in text
    assert "| **4, 9-12** | **ghost** | **ghost** | **0** | **29.00 [26.10, 31.90]** |" in text
    assert "| 4, 9-12 | shortgpt | ghost-paper \u2020 | 0 |" in text
    assert "refused: no <layer> before" in text
    assert "perplexity, wiki\\|pedia" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in tables}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("with_speed", [True, False])
def test_page(with_speed: bool) -> None:
    html = page(made_up(with_speed))
    for expected in (
        "<title>some/model",
        "0.55 times",
        "5 of 30 layers removed",
        "no &lt;layer&gt; before",
        "prefers-color-scheme: dark",
        "a fast one",
        "50.0%",
        "Speed against quality" if with_speed else "Size against quality",
    ):
        assert expected in html, expected
    assert html.count("<svg") == 4
    balance = Balance()
    balance.feed(html)
    assert balance.open == []
    assert not re.search(r'(?:src|href)="(?!#)', html)
    assert "<script" not in html and "@import" not in html
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        assert not re.search(r"#[0-9a-f]{6}\b", svg)
    assert html == page(made_up(with_speed))


@pytest.mark.slow
def test_files(tmp_path: Path) -> None:
    write_outputs(tmp_path, made_up())
    write_outputs(tmp_path, made_up())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "index.html", "results.json", "results.md",
    ]  # fmt: skip
    data = json.loads((tmp_path / "results.json").read_text())
    assert data["rows"][0]["recovery"] == "none" and data["summaries"]


def test_missing_extra_is_told_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtraError, match=r"ghosted_fast\[report\]"):
        check_outputs()


def test_layers_as_text() -> None:
    assert layers_as_text([12, 13, 14, 15, 17]) == "12-15, 17"
    assert layers_as_text([3]) == "3"
