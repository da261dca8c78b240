"""What `ghost_model` did: as data, as JSON, or as one HTML page that needs nothing else."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ghosted_fast._atomic_files import write_atomically
from ghosted_fast.errors import ArgumentError, MissingExtraError
from ghosted_fast.facts import healing_text, layers_as_text, shown_name
from ghosted_fast.measure.models_table import ratio
from ghosted_fast.timing.conditions import Conditions
from ghosted_fast.timing.estimates import estimate_from, ratio_text, speed_text

_TIMES = {
    "select": "choosing the layers",
    "calibrate": "passes over the text",
    "solve": "solving for the ghosts",
    "correct": "corrections",
    "heal": "healing",
}
_TEMPLATES = Path(__file__).parent / "templates"


def write_report(
    path: str | Path, report: Mapping[str, Any], title: str | None = None, overwrite: bool = False
) -> Path:
    """Write a report.

    Args:
        path: The file to write: JSON if its name ends in .json, else an HTML page. It appears
            whole or not at all.
        report: What `GhostReport.to_dict()` returns. Three more keys are shown where present:
            `models` (a list of `ModelRow.to_dict()`, the dense model of each dtype first; with
            `tasks`, `fidelity` and `exact_answers` where `eval` measured them),
            `samples` (a list of dicts with name, prompt, text; those of one prompt stand side by
            side), `checks` (a list of dicts with label, passed and detail) and `machine` (label to
            value). Every key may be absent.
        title: The page's heading; by default the model's name.
        overwrite: Whether an existing file may be replaced.

    Returns:
        The path.

    Raises:
        ArgumentError: The file exists and `overwrite` is false.
        MissingExtraError: The page needs jinja2 or matplotlib, which is absent.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise ArgumentError(f"expected a new file for the report, got {str(path)!r}, which exists")
    if path.suffix == ".json":
        page = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    else:
        page = render_report(report, title)
    write_atomically(path, page)
    return path


def render_report(report: Mapping[str, Any], title: str | None = None) -> str:
    """Return the page's HTML; see `write_report`."""
    page = page_template("report.html")
    from ghosted_fast.reports.plots import healing_figure, selection_figure, speed_figure

    rows = report.get("models") or []
    return page.render(
        title=title or shown_name(report.get("model") or "Ghosted model"),
        report=report,
        layers=layers_as_text(report.get("removed") or []),
        rows=[_with_ratios(row, rows) for row in rows],
        headline=_headline(rows),
        with_perplexity=any(row.get("perplexity") for row in rows),
        with_speed=any(row.get("throughput") for row in rows),
        with_fidelity=any(row.get("fidelity") for row in rows),
        tasks=_scores(rows, "tasks", "task"),
        exact=_scores(rows, "exact_answers", "kind"),
        samples=_by_prompt(report.get("samples") or []),
        times=_times(report.get("seconds") or {}),
        commands=_commands(report),
        selection_svg=selection_figure(
            report.get("scores") or [], report.get("removed") or [], report.get("criterion")
        ),
        speed_svg=speed_figure(rows),
        healing_svg=healing_figure(report.get("healing")),
        warnings=lambda record: Conditions(**record).warnings(),
    )


def page_template(name: str) -> Any:
    """Return a page's jinja2 template, with the filters for numbers.

    Raises:
        MissingExtraError: Package jinja2 or matplotlib, for the plots, is absent.
    """
    try:
        import matplotlib  # noqa: F401
        from jinja2 import Environment, FileSystemLoader
    except ImportError as error:
        raise MissingExtraError(
            f"a report needs {error.name}: pip install 'ghosted_fast[report]'"
        ) from error
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        number=_number,
        percent=_percent,
        speed=_speed,
        short=_short,
        scientific=_scientific,
        layers=layers_as_text,
        healing=healing_text,
    )
    return environment.get_template(name)


def _scores(
    rows: Sequence[Mapping[str, Any]], key: str, name: str
) -> tuple[list[str], list[tuple[str, list[Mapping[str, Any]]]]]:
    """Return what models were scored on, and their scores.

    Args:
        rows: The models.
        key: Where a model's scores are.
        name: Where a score says what it is of.
    """
    scored = [(row["name"], list(row[key])) for row in rows if row.get(key)]
    return [score[name] for score in scored[0][1]] if scored else [], scored


def _by_prompt(samples: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """Return what was written, by what was asked."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for sample in samples:
        found.setdefault(sample.get("prompt") or "", []).append(sample)
    return list(found.items())


def _times(seconds: Mapping[str, float]) -> list[tuple[str, float]]:
    """Return how long each part of the work took, those that took any time."""
    return [(_TIMES.get(name, name), value) for name, value in seconds.items() if value >= 0.05]


def _commands(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what can be done with a folder that was written, if there is one."""
    folder = report.get("output")
    if not folder:
        return []
    name = shlex.quote(str(folder))
    heal = f"ghosted-fast heal {name} --dense DENSE --calibration TEXT --output healed"
    return [
        ("measure its speed", f"ghosted-fast bench --model DENSE --model {name}"),
        ("train it a little", heal),
        ("serve it (vLLM)", f"vllm serve {name}"),
        ("for llama.cpp", f"ghosted-fast export {name} --to gguf"),
        ("for ONNX Runtime", f"ghosted-fast export {name} --to ort-genai"),
    ]


def _with_ratios(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        **row,
        "prefill_ratio": ratio_text(ratio(row, rows, "prefill")),
        "decode_ratio": ratio_text(ratio(row, rows, "decode")),
    }


def _headline(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return the two or three figures that a reader looks for first."""
    figures: list[tuple[str, str]] = []
    if len(rows) < 2:
        return figures
    dense = rows[0]
    last = [row for row in rows if row["dtype"] == dense["dtype"]][-1]
    saved = 1 - last["parameters"] / dense["parameters"]
    figures.append((f"{saved:.0%}", "fewer parameters"))
    if dense.get("perplexity") and last.get("perplexity"):
        figures.append(
            (
                f"{dense['perplexity']['value']:.1f} → {last['perplexity']['value']:.1f}",
                f"perplexity, {dense['name']} → {last['name']}",
            )
        )
    decode = ratio(last, rows, "decode")
    if decode is not None:
        figures.append((ratio_text(decode), f"decode speed, relative to {dense['name']}"))
    return figures


def _number(value: Any, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _percent(value: Any, digits: int = 1) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f}"


def _speed(record: Any) -> str:
    return speed_text(estimate_from(record))


def _scientific(value: Any) -> str:
    return "-" if value is None else f"{value:.1e}"


def _short(value: Any) -> str:
    """Return a count with a unit: 134.5 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return str(value)
