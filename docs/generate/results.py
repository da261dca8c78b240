"""Files of results, read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
OUR_CRITERION, OUR_RECOVERY, OUR_CLOSED_FORM = "ghost", "ghost + corrections", "ghost"


@dataclass(frozen=True)
class Study:
    """A model of `benchmarks/recovery_table.py`, and what was found with it.

    Attributes:
        name: The model's name in tables.
        grid: The content of `results.json`.
        more: What is no cell of the grid, by its key; from `more/state.jsonl`.
    """

    name: str
    grid: dict[str, Any]
    more: dict[tuple[Any, ...], dict[str, float]]

    @property
    def texts(self) -> list[str]:
        """The texts that perplexity was measured on; the first decides what is best."""
        return list(self.dense)

    @property
    def dense(self) -> dict[str, float]:
        """The dense model's perplexity by text."""
        found = self.grid["dense"]["perplexity"]
        return {text: float(value["value"]) for text, value in found.items()}

    @property
    def layer_count(self) -> int:
        """Layers of the dense model."""
        return int(self.grid["dense"]["layers"])

    @property
    def counts(self) -> list[int]:
        """The numbers of layers that were removed."""
        return sorted({row["remove"] for row in self.grid["rows"]})

    def row(self, count: int, criterion: str, recovery: str) -> dict[str, Any]:
        """Return a row of the grid, by the number of removed layers, criterion and recovery."""
        (found,) = (
            row
            for row in self.grid["rows"]
            if (row["remove"], row["criterion"], row["recovery"]) == (count, criterion, recovery)
        )
        return dict(found)

    def published(self, count: int) -> list[dict[str, Any]]:
        """Return the rows of published criteria with published recoveries."""
        return [row for row in self.grid["rows"] if row["remove"] == count and row["published"]]

    def best_published(self, count: int) -> dict[str, Any]:
        """Return the published row of the lowest perplexity on the first text."""
        return next(row for row in self.published(count) if "best published" in row["marks"])


def _state(path: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Return the records of a state file by their keys; lists in a key as tuples."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if "key" in entry:
            key = tuple(tuple(part) if isinstance(part, list) else part for part in entry["key"])
            found[key] = entry["record"]
    return found


@cache
def studies() -> tuple[Study, Study]:
    """Return the two models of the table of recoveries: SmolLM2 and Gemma 3."""
    smollm2, gemma3 = (_study(folder) for folder in ("smollm2", "gemma3"))
    return smollm2, gemma3


def _study(folder: str) -> Study:
    place = RESULTS / "recovery" / folder
    grid = json.loads((place / "results.json").read_text(encoding="utf-8"))
    return Study(grid["about"]["model"], grid, _state(place / "more" / "state.jsonl"))


@cache
def families() -> dict[str, Any]:
    """Return the verdicts on models of every class of transformers."""
    found: dict[str, Any] = json.loads((RESULTS / "families.json").read_text(encoding="utf-8"))
    return found


@dataclass(frozen=True)
class Machine:
    """A folder of results of one kind of processor."""

    folder: Path

    @property
    def engines(self) -> list[dict[str, Any]]:
        """The rows of `make bench-engines`; none if it did not run here."""
        path = self.folder / "engines.json"
        rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        assert isinstance(rows, list)
        return rows

    def newest(self, benchmark: str) -> list[dict[str, Any]]:
        """Return the rows of the newest run of a benchmark; none if it did not run here.

        Args:
            benchmark: An operator, `calibration`, `generate`, `timing`, `sweep` or `fit`. Of
                `generate`, the newest run of each dtype, of `sweep` of each shape and depth.
        """
        path = self.folder / f"{benchmark}.jsonl"
        if not path.exists():
            return []
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        fields = {"generate": ("dtype",), "sweep": ("shape", "layers")}.get(benchmark, ())

        def apart(row: dict[str, Any]) -> tuple[Any, ...]:
            return tuple(row.get(field) for field in fields)

        newest = {apart(row): row["date"] for row in rows}
        return [row for row in rows if row["date"] == newest[apart(row)]]


def machines(has: Callable[[Machine], list[dict[str, Any]]]) -> list[Machine]:
    """Return the machines that have some results, the one with the newest first."""
    found = [Machine(path) for path in sorted(RESULTS.iterdir()) if path.is_dir()]
    dates = {machine: max((row["date"] for row in has(machine)), default="") for machine in found}
    return sorted(filter(dates.__getitem__, found), key=dates.__getitem__, reverse=True)


def newest_rows(benchmark: str) -> list[dict[str, Any]]:
    """Return the rows of a benchmark from the machine where it ran last."""
    return machines(lambda machine: machine.newest(benchmark))[0].newest(benchmark)


def engine_rows() -> list[dict[str, Any]]:
    """Return the rows of the engines from the machine where they ran last."""
    return machines(lambda machine: machine.engines)[0].engines
