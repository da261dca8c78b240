"""The rows of a grid, from its state: one for each criterion, number of layers and recovery."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ghosted_fast.facts import layers_as_text, notebook_table
from ghosted_fast.grid.plan import Variant, default_of, is_published
from ghosted_fast.grid.state import GridState

BEST_PUBLISHED, DEFAULT = "best published", "default"


@dataclass(frozen=True)
class Grid:
    """A grid that is complete.

    Attributes:
        about: The model, the texts, the settings and the machine.
        dense: What is known of the dense model: perplexity by text, parameters, ...
        rows: As `grid_of` makes them, by number of layers, criterion and recovery.
        selections: The criteria's candidates: criterion, remove, removed, scores, seconds.
    """

    about: dict[str, Any]
    dense: dict[str, Any]
    rows: list[dict[str, Any]]
    selections: list[dict[str, Any]]

    def _repr_html_(self) -> str:
        text = self.texts[0]
        columns = ["removed", "criterion", "recovery", f"perplexity on {text}", "to dense", ""]
        rows = []
        for row in self.rows:
            found = row["perplexity"]
            figures = ["refused", "-"]
            if found is not None:
                figures = [f"{found[text]['value']:.2f}", f"{row['excess'][text] + 1.0:.2f}x"]
            place = layers_as_text(row["removed"])
            line = [place, row["criterion"], row["recovery"], *figures, ", ".join(row["marks"])]
            rows.append(line)
        return notebook_table(f"Perplexity dense {self._dense(text):.2f}", rows, columns)

    def _dense(self, text: str) -> float:
        return float(self.dense["perplexity"][text]["value"])

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        return asdict(self)

    @property
    def default_pair(self) -> tuple[str, str] | None:
        """Criterion and recovery of the library's default, None if the grid is without it."""
        pairs = ((r["criterion"], r["recovery"]) for r in self.rows if DEFAULT in r["marks"])
        return next(pairs, None)

    @property
    def texts(self) -> list[str]:
        """Names of the evaluation texts; the first decides what is best."""
        return list(self.dense["perplexity"])


def speed_key(record: Mapping[str, Any], speed: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what decides the speed of a cell's model, as a key of the state."""
    settings = sorted(speed.items())
    return "speed", settings, record["layers"], record["parameters"], record["operators"]


def grid_of(
    state: GridState,
    about: Mapping[str, Any],
    remove: Sequence[int],
    criteria: Sequence[str],
    variants: Sequence[Variant],
    speed: Mapping[str, Any] | None,
) -> Grid:
    """Return the grid of what a state knows of all its cells."""
    dense = state.get("dense")
    rows, selections = [], []
    for count in sorted(remove):
        for criterion in criteria:
            selection = state.get("selection", criterion, count)
            selections.append({"criterion": criterion, "remove": count, **selection})
            for variant in variants:
                if not variant.serves(criterion):
                    continue
                cell = state.get("cell", selection["removed"], variant.name)
                row = _row(criterion, count, variant, selection, cell, dense)
                if speed is not None and row["refused"] is None:
                    row |= _speeds(state.get(*speed_key(cell, speed)))
                rows.append(row)
    _mark(rows, next(iter(dense["perplexity"])), default_of(variants))
    return Grid(dict(about), dense, rows, selections)


def _row(
    criterion: str,
    count: int,
    variant: Variant,
    selection: Mapping[str, Any],
    cell: Mapping[str, Any],
    dense: Mapping[str, Any],
) -> dict[str, Any]:
    losses = cell.get("perplexity")
    seconds = {"select": selection["seconds"], **cell.get("seconds", {})}
    return {
        "remove": count,
        "criterion": criterion,
        "recovery": variant.name,
        "corrections": cell.get("corrections"),
        "healing": cell.get("healing"),
        "published": is_published(criterion, variant),
        "marks": [],
        "removed": selection["removed"],
        "perplexity": losses,
        "excess": losses
        and {
            text: value["value"] / dense["perplexity"][text]["value"] - 1.0
            for text, value in losses.items()
        },
        "accuracy": cell.get("accuracy"),
        "parameters": cell.get("parameters"),
        "decode_tokens_per_s": None,
        "decode_ratio": None,
        "seconds": seconds,
        "peak_memory": cell.get("peak_memory"),
        "refused": cell.get("refused"),
    }


def _speeds(record: Mapping[str, Any]) -> dict[str, Any]:
    found = record["model"]
    return {
        "decode_tokens_per_s": found["decode_tokens_per_s"],
        "decode_ratio": found["relative"]["dense"]["decode"],
    }


def _mark(rows: Sequence[dict[str, Any]], text: str, default: tuple[str, str] | None) -> None:
    """Mark our default and, for each number of layers, the best published row."""
    for row in rows:
        if (row["criterion"], row["recovery"]) == default:
            row["marks"].append(DEFAULT)
    for count in {row["remove"] for row in rows}:
        rivals = [
            row
            for row in rows
            if row["remove"] == count and row["published"] and row["refused"] is None
        ]
        if rivals:
            best = min(row["perplexity"][text]["value"] for row in rivals)
            for row in rivals:
                if row["perplexity"][text]["value"] == best:
                    row["marks"].append(BEST_PUBLISHED)


def marked(rows: Sequence[dict[str, Any]], mark: str) -> dict[int, dict[str, Any]]:
    """Return the first row with a mark, by number of layers."""
    found: dict[int, dict[str, Any]] = {}
    for row in rows:
        if mark in row["marks"]:
            found.setdefault(row["remove"], row)
    return found
