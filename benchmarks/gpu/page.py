"""One file of all that was found, and one page of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ghosted_fast._atomic_files import write_atomically
from ghosted_fast.bench_ops.report import figure_text
from ghosted_fast.timing.estimates import Estimate, estimate_from, ratio_text
from gpu.plan import Part, Setting, result_file
from gpu.running import DONE, LEFT, state_of

JSON_FILE, PAGE_FILE = "gpu_day.json", "gpu_day.md"
_GIB = float(1 << 30)


def collected(known: Sequence[Part], setting: Setting) -> dict[str, Any]:
    """Return how every part ended, and the figures of those that are done."""
    found: dict[str, Any] = {"device": setting.device, "shape": setting.shape, "parts": {}}
    for part in known:
        state = state_of(part, setting)
        path = result_file(part.name, setting)
        if state["status"] == DONE and path.exists():
            state["result"] = json.loads(path.read_text(encoding="utf-8"))
        found["parts"][part.name] = {"about": part.about, "expected": part.seconds, **state}
    return found


def write_page(known: Sequence[Part], setting: Setting) -> dict[str, Any]:
    """Write both files into the folder, and return what they hold."""
    found = collected(known, setting)
    text = json.dumps(found, indent=2, ensure_ascii=False)
    write_atomically(setting.folder / JSON_FILE, text + "\n")
    write_atomically(setting.folder / PAGE_FILE, "\n".join(_lines(found)) + "\n")
    return found


def table(columns: Sequence[str], lines: Iterable[Sequence[object]]) -> list[str]:
    """Return a table in Markdown."""
    rows = [columns, ["---"] * len(columns), *lines]
    return ["| " + " | ".join(str(item) for item in row) + " |" for row in rows]


def _lines(found: dict[str, Any]) -> Iterator[str]:
    yield f"# A day with {_machine(found)}\n"
    yield from table(
        ["part", "shows", "ended", "seconds", "expected"],
        [
            [name, part["about"], part["status"], f"{part.get('seconds', 0):.0f}", part["expected"]]
            for name, part in found["parts"].items()
        ],
    )
    writers = {"speed": _speed, "graphs": _graphs, "calibration": _calibration}
    writers |= {"fit": _fit, "sweep": _sweep}
    for name, part in found["parts"].items():
        if part["status"] not in (DONE, LEFT):
            yield f"\n## {name}: {part['status']}\n\n```\n" + "\n".join(part["said"]) + "\n```"
        if "result" in part:
            yield f"\n## {name}: {part['about']}\n"
            yield from writers.get(name, _operators)(part["result"])


def _machine(found: dict[str, Any]) -> str:
    """Return the device's name as the first part that is done tells it."""
    for part in found["parts"].values():
        machine = part.get("result", {}).get("machine", {})
        if machine:
            return str(machine.get("accelerator", machine["processor"]))
    return str(found["device"])


def _figure(record: dict[str, Any], factor: float = 1.0) -> str:
    """Return an estimate as JSON has it, in another unit, with its interval."""
    return figure_text(Estimate(**record).times(factor))


def _operators(result: dict[str, Any]) -> list[str]:
    lines = []
    for case in result["cases"]:
        for row in case["rows"]:
            best = row["ratios"].get(row["best_rival"]) if row["is_ours"] else None
            beside = f"{ratio_text(Estimate(**best))}: {row['best_rival']}" if best else ""
            share = f"{_figure(row['roof_share'], 100.0)} % of {row['roof_limit']}"
            shown = [row["shape"], row["variant"], _figure(row["ms"]), share, beside]
            lines.append([*shown, row["note"]])
    return table(["shape", "variant", "ms", "roof", "against the best rival", ""], lines)


def _speed(result: dict[str, Any]) -> list[str]:
    lines = [
        [
            size,
            name,
            _figure(speed["prefill_tokens_per_s"]),
            _figure(speed["decode_tokens_per_s"]),
            f"{(speed['weight_bytes'] or 0) / _GIB:.2f}",
        ]
        for size, speeds in result["batch sizes"].items()
        for name, speed in speeds.items()
    ]
    return table(["prompts", "model", "prefill tok/s", "decode tok/s", "weights GiB"], lines)


def _graphs(result: dict[str, Any]) -> list[str]:
    lines = []
    for phase, steps in result["steps"].items():
        for name, step in steps.items():
            to_dense = ratio_text(estimate_from(step["to_dense"]))
            figures = [_figure(step["tokens_per_s"]), _figure(step["ms"]), to_dense]
            lines.append([phase, name, *figures, _figure(step["eager_ms"]), step["note"]])
    columns = ["phase", "model", "tok/s", "ms", "to dense", "ms by calls", ""]
    return table(columns, lines)


def _memory(num_bytes: int | None) -> str:
    return "unknown" if num_bytes is None else f"{num_bytes / _GIB:.2f}"


def _calibration(result: dict[str, Any]) -> list[str]:
    lines = [
        [
            name,
            item["intervals"],
            _figure(item["bare_seconds"]),
            _figure(item["seconds"]),
            ratio_text(Estimate(**item["ratio"])),
            _memory(item["peak_bytes"]),
        ]
        for name, item in result["passes"].items()
    ]
    columns = ["pass", "intervals", "bare s", "collected s", "ratio", "peak GiB"]
    return [f"{result['tokens']} tokens.\n", *table(columns, lines)]


def _timed(name: str, item: dict[str, Any]) -> list[str]:
    phases = ", ".join(f"{phase} {spent:.2f}" for phase, spent in item["phases"].items())
    return [name, f"{item['seconds']:.2f}", phases, _memory(item["peak_bytes"])]


def _fit(result: dict[str, Any]) -> list[str]:
    lines = [_timed(name, item) for name, item in result["fits"].items()]
    columns = ["fit", "s", "phases, s", "peak GiB"]
    return [f"{result['tokens']} tokens.\n", *table(columns, lines)]


def _sweep(result: dict[str, Any]) -> list[str]:
    lines = [
        [*_timed(name, item), *(_memory(item[size]) for size in ("planned_bytes", "read_bytes"))]
        for name, item in result["sweeps"].items()
    ]
    columns = ["sweep", "s", "phases, s", "peak GiB", "planned GiB", "read at most, GiB"]
    return [f"{result['tokens']} tokens.\n", *table(columns, lines)]
