"""Tables of what healing brings for how many tokens."""

from __future__ import annotations

import json
import math
from functools import cache
from typing import Any

from docs.generate.markdown import table
from docs.generate.results import RESULTS

# As `benchmarks/healing_curve.py` names what a healing starts from, in the order of the table.
STARTS = ("nothing", "a ghost", "corrected ghosts")
HEALED, LINEARPATCH = "healed", "linearpatch-d"


@cache
def study() -> dict[str, Any]:
    """Return what `benchmarks/healing_curve.py` found."""
    found: dict[str, Any] = json.loads((RESULTS / "healing.json").read_text(encoding="utf-8"))
    return found


def relative(point: dict[str, Any], text: str) -> float:
    """Return a point's perplexity on a text, relative to the dense model's."""
    return float(point["perplexity"][text]) / float(study()["dense"][text])


def geometric_mean(point: dict[str, Any]) -> float:
    """Return the mean over the texts of the perplexity relative to dense."""
    texts = study()["dense"]
    return math.exp(sum(math.log(relative(point, text)) for text in texts) / len(texts))


def divergence(point: dict[str, Any]) -> float:
    """Return the mean over the texts of KL(dense || model) per token, nats."""
    found = point["divergence"]
    return sum(float(found[text]) for text in study()["dense"]) / len(study()["dense"])


def points(start: str) -> list[dict[str, Any]]:
    """Return the healings that began in one way, those of few tokens first."""
    found = [
        item for item in study()["points"] if item["start"] == start and item["trained"] == HEALED
    ]
    return sorted(found, key=lambda item: int(item["tokens"]))


def curve() -> str:
    """Return the table of all healings."""
    rows = []
    for start in STARTS:
        for point in points(start):
            before = _minutes(point["start_seconds"]) if start != "nothing" else ""
            rows.append([start, _tokens(point), *_losses(point), before, *_cost(point)])
    columns = ["healed from", "tokens", *_texts(), "minutes before it", "of healing"]
    return f"{_heading()}\n\n{table([*columns, 'dense passes'], rows, 2)}"


def rivals() -> str:
    """Return the table of what else is done with as many tokens."""
    found = study()["points"]
    given = max(item["tokens"] for item in found if item["start"] == LINEARPATCH)
    rows = []
    for start in ("nothing", "a ghost", "the dense model"):
        tried = [item for item in found if item["start"] == start and item["trained"] != HEALED]
        best = min(tried, key=geometric_mean)
        rate = best["trained"].rpartition(" ")[2]
        on = start if start == "the dense model" else f"from {start}"
        rows.append([f"LoRA on the text, {on}; rate {rate}", best])
    patched = points(LINEARPATCH)
    rows += [["linearpatch-d as it is published, without training", patched[0]]]
    rows += [["linearpatch-d, its matrix distilled", patched[-1]]]
    rows += [
        [f"healed from {start}", next(item for item in points(start) if item["tokens"] == given)]
        for start in STARTS
    ]
    shown = [[said, _tokens(item), *_losses(item), *_cost(item)] for said, item in rows]
    return table(["", "tokens", *_texts(), "minutes", "dense passes"], shown, 1)


def _texts() -> list[str]:
    return [*study()["dense"], "geometric mean", "divergence"]


def _losses(point: dict[str, Any]) -> list[str]:
    losses = [f"{relative(point, text):.2f}x" for text in study()["dense"]]
    return [*losses, f"{geometric_mean(point):.3f}x", f"{divergence(point):.3f}"]


def _tokens(point: dict[str, Any]) -> str:
    return f"{point['learned']:,}" if point["tokens"] else "none"


def _cost(point: dict[str, Any]) -> list[str]:
    if not point["tokens"]:
        return ["", ""]
    return [_minutes(point["seconds"]), f"{point['passes']:.1f}"]


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f}"


def _heading() -> str:
    found = study()
    machine, removed = found["machine"], found["removed"]
    elsewhere: dict[str, set[int]] = {}
    for point in found["points"]:
        if "processor" in point:
            elsewhere.setdefault(point["processor"], set()).add(point["tokens"])
    others = "".join(
        f" Rows of {' and '.join(f'{count:,}' for count in sorted(counts))} tokens: {processor}."
        for processor, counts in elsewhere.items()
    )
    return (
        f"SmolLM2-135M-Instruct in bf16 without layers {removed[0]}-{removed[-1]} of its 30: "
        f"perplexity relative to dense, {machine['threads']} threads of an {machine['processor']}."
        f"{others}"
    )
