"""Tables of the operators: how many times as fast as each rival."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from docs.generate.markdown import by_machine, table
from ghosted_fast.bench_ops.report import figure_text
from ghosted_fast.timing.estimates import Estimate, estimate_from

_SIZES = (576, 2048, 4096)
_THREADS = (1, 2)
# Rivals that no floor is set against, and that are stronger than one that has a floor.
_STRONGER = {"ghost_solve": "torch Cholesky"}
Row = dict[str, Any]


def _case(row: Row) -> tuple[int, str]:
    """Return the hidden size of a row's shape, and the rest of it."""
    size = re.search(r"d=(\d+) ?", row["shape"])
    assert size is not None
    return int(size[1]), row["shape"].replace(size[0], "").replace(" T=2048", "").strip()


def reached(row: Row, against: str) -> Estimate | None:
    """Return what a row reached of a goal; None where it was not measured."""
    if against in ("roof", "one thread"):
        return estimate_from(row["roof_share" if against == "roof" else "one_thread"])
    if against == "best rival":
        against = row["best_rival"]
    return estimate_from(row["ratios"].get(against))


def operator_table(operator: str) -> str:
    """Return each machine's table of an operator, under its processor's name.

    A table has a row for each case and rival, and the ratio by threads and size.

    The rivals are those that have a floor, and a stronger one that has none. A ratio whose
    interval's lower end is below the floor is bold, whether the benchmark holds that size to the
    floor or not.
    """
    return by_machine(lambda machine: machine.newest(operator), partial(_table_of, operator))


def _measured_with(found: list[Row]) -> str:
    """Return the path, the torch and the day that an operator was measured with."""
    row = found[0]
    path = re.search(r"path (\w+)", row["native"])
    assert path is not None
    return f"Path `{path[1]}`, torch {row['torch']}, {row['date'][:10]}.\n\n"


def _table_of(operator: str, found: list[Row]) -> str:
    rows = [row for row in found if row["is_ours"]]
    # By case, the floor of each size, if there is one.
    floors: dict[tuple[str, str, str, str], dict[int, float]] = {}
    for row in rows:
        size, shape = _case(row)
        for goal in row["goals"]:
            case = (shape, row["dtype"], row["variant"], goal["against"])
            floors.setdefault(case, {})[size] = goal["floor"]
            if operator in _STRONGER:
                floors.setdefault((*case[:3], _STRONGER[operator]), {})
    lines = [
        [
            *_named(operator, case),
            " / ".join(f"{floor:g}" for floor in dict.fromkeys(by_size.values())),
            *_values(rows, case, by_size),
        ]
        for case, by_size in floors.items()
    ]
    heads = [f"{threads} thr., d={size}" for threads in _THREADS for size in _SIZES]
    return _measured_with(found) + table(["case", "against", "floor", *heads], lines, 2)


def _named(operator: str, case: tuple[str, str, str, str]) -> list[str]:
    shape, dtype, variant, against = case
    variant = variant.removeprefix("ghosted_fast").strip()
    parts = [shape.removesuffix(" plain"), variant, "" if operator == "ghost_solve" else dtype]
    return [
        ", ".join(part for part in parts if part) or "factor and solve",
        {
            "roof": "share of the roof",
            "ghosted_fast": "the ghost in bf16",
            "best rival": "the best rival",
        }.get(against, against),
    ]


def _values(
    rows: list[Row], case: tuple[str, str, str, str], floors: dict[int, float]
) -> list[str]:
    shape, dtype, variant, against = case
    values = []
    for threads in _THREADS:
        for size in _SIZES:
            value = next(
                (
                    reached(row, against)
                    for row in rows
                    if _case(row) == (size, shape)
                    and (row["dtype"], row["variant"], row["threads"]) == (dtype, variant, threads)
                ),
                None,
            )
            text, floor = "" if value is None else figure_text(value), floors.get(size)
            below = value is not None and floor is not None and value.low < floor
            values.append(f"**{text}**" if below else text)
    return values


def divergence_table() -> str:
    """Return each machine's table of `divergence`: how many times as fast as each rival."""
    return by_machine(lambda machine: machine.newest("divergence"), _divergences_of)


def _divergences_of(found: list[Row]) -> str:
    rivals = list(dict.fromkeys(row["variant"] for row in found if not row["is_ours"]))
    lines = []
    for row in found:
        if row["is_ours"]:
            ratios = [estimate_from(row["ratios"].get(name)) for name in rivals]
            cells = [row["shape"], str(row["threads"])]
            cells += ["" if ratio is None else figure_text(ratio) for ratio in ratios]
            lines.append([*cells, figure_text(Estimate(**row["roof_share"]))])
    columns = ["case", "threads", *rivals, "share of the roof"]
    return _measured_with(found) + table(columns, lines)


def against_hooks() -> str:
    """Return how many times as fast a ghost is as a forward hook with an fp32 weight."""
    return by_machine(lambda machine: machine.newest("ghost_apply"), _hooks_of)


def _hooks_of(found: list[Row]) -> str:
    rows = [row for row in found if row["variant"] == "ghosted_fast"]
    shown: list[tuple[str, Callable[[Row], bool]]] = [
        (f"{dtype}, {count} row{'s' * (count > 1)}", _is(dtype, f"rows={count}"))
        for dtype, count in (
            ("bfloat16", 1),
            ("bfloat16", 16),
            ("bfloat16", 512),
            ("float32", 1),
            ("float32", 512),
        )
    ]
    lines = []
    for name, wanted in shown:
        cells = []
        for threads in _THREADS:
            for size in _SIZES:
                ratios = [
                    reached(row, "hook, fp32 weight")
                    for row in rows
                    if wanted(row) and row["threads"] == threads and _case(row)[0] == size
                ]
                cells.append(figure_text(ratios[0]) if ratios and ratios[0] else "")
        lines.append([name, *cells])
    heads = [f"{threads} thr., d={size}" for threads in _THREADS for size in _SIZES]
    return _measured_with(found) + table(["", *heads], lines)


def _is(dtype: str, shape: str) -> Callable[[Row], bool]:
    return lambda row: row["dtype"] == dtype and _case(row)[1] == shape


def case_label(row: Row) -> str:
    """Return what a picture calls a row."""
    size, rest = _case(row)
    parts = [row["operator"], rest, row["dtype"], f"d={size}"]
    return "  ".join(part for part in parts if part)
