"""What was found out: frozen records, as reports and JSON have them."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

# Rows of a table in a notebook; of more, the first are shown.
_MOST_ROWS = 24
HealingEnd = Literal["tokens", "text", "time", "worse", "nan"]


@dataclass(frozen=True)
class CorrectionFacts:
    """What one correction did.

    Attributes:
        before: Held-out divergence before it, nats per token.
        after: The same after it; as before where it was not accepted.
        accepted: Whether the ghosts were moved.
        change: Size of the step: rms change of the ghosts' outputs relative to the outputs.
        seconds: Wall-clock time.
    """

    before: float
    after: float
    accepted: bool
    change: float
    seconds: float


@dataclass(frozen=True)
class HealingPoint:
    """A judgement during a healing.

    Attributes:
        tokens: Tokens learned from by then.
        divergence: Held-out divergence, nats per token.
    """

    tokens: int
    divergence: float


@dataclass(frozen=True)
class HealingFacts:
    """What a healing did.

    Attributes:
        before: Held-out divergence before it, nats per token.
        after: The same of the state that is kept.
        tokens: Tokens learned from.
        best_tokens: Tokens by which the kept state was reached; 0 where no step was an improvement.
        rank: Rank of the factors of each linear map; 0 where the ghosts alone were trained, "full"
            where whole weights were.
        maps: Linear maps that were trained.
        ghosts: Ghosts that were trained.
        trained_parameters: Numbers that were trained.
        curve: All judgements, the one before the first step included.
        ended: Why it ended: the "tokens" asked for, the "text", the "time", a state so much "worse"
            that the steps lead nowhere, or "nan": something was not finite.
        seconds: Wall-clock time of this process.
    """

    before: float
    after: float
    tokens: int
    best_tokens: int
    rank: int | Literal["full"]
    maps: int
    ghosts: int
    trained_parameters: int
    curve: list[HealingPoint]
    ended: HealingEnd
    seconds: float

    def _repr_html_(self) -> str:
        return notebook_table("Healing", healing_rows(self))


def healing_rows(healing: HealingFacts) -> list[tuple[str, str]]:
    """Return what a healing did, as rows of a table."""
    return [
        ("held-out divergence", f"{healing.before:.4f} to {healing.after:.4f} nats per token"),
        ("learned from", f"{healing.tokens:,} tokens, the kept state {healing.best_tokens:,}"),
        ("trained", f"{healing.ghosts} ghosts, {_maps_text(healing.rank, healing.maps)}"),
        ("ended by", f"{healing.ended}, after {healing.seconds:,.0f} s"),
    ]


def _maps_text(rank: int | str, maps: int) -> str:
    what = "the whole weights" if rank == "full" else f"factors of rank {rank}"
    return f"{what} of {maps} linear maps"


def healing_text(healing: Mapping[str, Any]) -> str:
    """Return what a healing trained, on how much, for how long, and what that did, as a sentence.

    Args:
        healing: A `HealingFacts` as a dict.
    """
    count, maps = healing["ghosts"], healing["maps"]
    parts = []
    if count:
        parts.append("the ghost" if count == 1 else f"the {count} ghosts")
    if maps:
        parts.append(_maps_text(healing["rank"], maps))
    what = " and ".join(parts) + ("" if maps else " alone")
    verb = "was" if count == 1 and not maps else "were"
    said = (
        f"{what} ({healing['trained_parameters']:,} numbers) {verb} trained on "
        f"{healing['tokens']:,} tokens in {healing['seconds']:,.0f} s"
    )
    if not healing["best_tokens"]:
        return f"{said}; no step helped, and nothing was changed"
    if healing["best_tokens"] < healing["tokens"]:
        said += f" (the state after {healing['best_tokens']:,} is kept)"
    return (
        f"{said}: held-out divergence from the dense model's predictions "
        f"{healing['before']:.4f} to {healing['after']:.4f} nats"
    )


@dataclass(frozen=True)
class Trial:
    """One number of layers that was tried.

    Attributes:
        remove: Layers removed.
        value: What the budget bounds, for that number.
    """

    remove: int
    value: float


@dataclass(frozen=True)
class Budget:
    """A budget, and the number of layers that it led to.

    Attributes:
        kind: What is bounded: the perplexity on held-out calibration tokens relative to the dense
            model's, less 1; or the decode tokens per second relative to the dense model's.
        asked: The bound.
        remove: Layers to remove.
        reached: What that number gives; of a speed, what the finished model was measured to give.
        tried: Every number of layers that was looked at, ascending.
    """

    kind: Literal["max_perplexity_increase", "min_decode_speedup"]
    asked: float
    remove: int
    reached: float
    tried: list[Trial]


@dataclass(frozen=True)
class IntervalScore:
    """The score of one candidate: lower is better.

    Attributes:
        start: First removed layer.
        stop: One past the last removed layer.
        score: In the unit of the criterion: nats per token for `ghost`, `ghost-search` and `sleb`,
            1 - cosine for `streamline`, `shortgpt`, `lorp` and `prunecomp`, half turns for
            `angular`, |weight x gradient| for `taylor`.
        corrected: The same with the ghost corrected, of candidates that got a second look.
    """

    start: int
    stop: int
    score: float
    corrected: float | None = None


@dataclass(frozen=True)
class SetScore:
    """The score of a set of layers, in one piece or several: lower is better.

    Attributes:
        removed: The layers, ascending.
        score: Nats per token, all ghosts in place.
        corrected: The same with the ghosts corrected, of sets that got a second look.
    """

    removed: list[int]
    score: float
    corrected: float | None = None


def named_layers(layers: Iterable[int]) -> str:
    """Return layers with the word before them: "layer 3", "layers 12-15, 17"."""
    gone = set(layers)
    return f"{'layer' if len(gone) == 1 else 'layers'} {layers_as_text(gone)}"


def layers_as_text(layers: Iterable[int]) -> str:
    """Return layers as runs with both ends: 12-15, 17."""
    return ", ".join(
        str(start) if start == stop - 1 else f"{start}-{stop - 1}"
        for start, stop in runs_of(layers)
    )


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def is_hub_id(name: str) -> bool:
    """Return whether a model's name is one of the hub's, and not of this machine."""
    return _HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def shown_name(name: str) -> str:
    """Return what others are told of where a model came from: a hub id, or a path's last part."""
    return name if is_hub_id(name) else Path(name).name


def runs_of(layers: Iterable[int]) -> list[tuple[int, int]]:
    """Return the maximal runs [start, stop) of layers, sorted."""
    gone = set(layers)
    starts = [layer for layer in sorted(gone) if layer - 1 not in gone]
    stops = [layer + 1 for layer in sorted(gone) if layer + 1 not in gone]
    return list(zip(starts, stops, strict=True))


def notebook_table(
    title: str, rows: Sequence[Sequence[object]], columns: Sequence[str] = ()
) -> str:
    """Return what a notebook shows of a record: a small table of HTML, all of it escaped.

    Args:
        title: What stands above it.
        rows: Cells; of more than a screen holds, the first.
        columns: Headings, if there are any.
    """

    def line(cells: Iterable[object], tag: str = "td") -> str:
        inner = "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells)
        return f"<tr>{inner}</tr>"

    lines = [line(columns, "th")] if columns else []
    lines += map(line, rows[:_MOST_ROWS])
    if len(rows) > _MOST_ROWS:
        lines.append(line([f"and {len(rows) - _MOST_ROWS} more"]))
    return f"<table><caption>{html.escape(title)}</caption>{''.join(lines)}</table>"
