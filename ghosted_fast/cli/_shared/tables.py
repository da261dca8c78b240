"""Tables for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ghosted_fast.cli._shared.results import TextTable
from ghosted_fast.facts import healing_text, layers_as_text
from ghosted_fast.measure.exact_answers import ExactScore
from ghosted_fast.measure.fidelity import Fidelity
from ghosted_fast.measure.models_table import ModelRow, ratio
from ghosted_fast.measure.tasks import TaskScore
from ghosted_fast.measure.throughput import Phase
from ghosted_fast.timing.estimates import estimate_from, ratio_text, speed_text
from ghosted_fast.timing.spans import own_seconds


def model_table(rows: Sequence[ModelRow], title: str | None = None) -> TextTable:
    """Return the table of models: size, perplexity, speed, speed relative to the dense model."""
    columns = ["model", "dtype", "layers", "parameters"]
    with_perplexity = any(row.perplexity for row in rows)
    with_speed = any(row.throughput for row in rows)
    if with_perplexity:
        columns += ["perplexity", "interval"]
    if with_speed:
        columns += ["prefill tok/s", "to dense", "decode tok/s", "to dense"]
    records = [row.to_dict() for row in rows]
    cells = []
    for record in records:
        line = [record["name"], record["dtype"], str(record["layers"])]
        line.append(f"{record['parameters'] / 1e6:,.1f} M")
        if with_perplexity:
            line += _perplexity_cells(record["perplexity"])
        if with_speed:
            line += _speed_cells(record, records)
        cells.append(line)
    return TextTable(columns, cells, title)


def profile_table(spans: Mapping[str, Mapping[str, float]]) -> TextTable:
    """Return where the time went: seconds, their share of all, and visits; parts are indented.

    Args:
        spans: As a `GhostReport` has them.
    """
    total = max(sum(found["seconds"] for path, found in spans.items() if "/" not in path), 1e-9)

    def line(depth: int, name: str, seconds: float, visits: str) -> list[str]:
        return ["  " * depth + name, f"{seconds:.2f}", f"{seconds / total:.0%}", visits]

    def lines(outer: str, depth: int) -> Iterator[list[str]]:
        for path, found in spans.items():
            name = path.removeprefix(outer)
            if path.startswith(outer) and "/" not in name:
                yield line(depth, name, found["seconds"], f"{found['visits']:.0f}")
                parts = list(lines(f"{path}/", depth + 1))
                yield from parts
                if parts:
                    yield line(depth + 1, "(the rest)", own_seconds(spans, path), "")

    return TextTable(["where the time went", "seconds", "share", "visits"], list(lines("", 0)))


def _perplexity_cells(perplexity: Mapping[str, Any] | None) -> list[str]:
    if perplexity is None:
        return ["-", "-"]
    return [
        f"{perplexity['value']:.2f}",
        f"{perplexity['low']:.1f} to {perplexity['high']:.1f}",
    ]


def _speed_cells(record: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> list[str]:
    cells = []
    phases: tuple[Phase, ...] = ("prefill", "decode")
    for phase in phases:
        speed = (record["throughput"] or {}).get(f"{phase}_tokens_per_s")
        cells.append(speed_text(estimate_from(speed)))
        cells.append(ratio_text(ratio(record, records, phase)))
    return cells


def deployment_table(rows: Sequence[ModelRow]) -> TextTable:
    """Return the table of what a deployment asks: latencies, memory and energy."""
    columns = ["model", "first token ms", "token ms p50", "p95", "p99"]
    columns += ["weights MiB", "cache MiB", "J/token"]
    cells = []
    for row in rows:
        speed = row.throughput
        if speed is None:
            continue
        steps = speed.token_ms or {}
        line = [row.name, speed_text(speed.first_token_ms)]
        line += [_or_dash(steps.get(name), ".1f") for name in ("p50", "p95", "p99")]
        for size in (speed.weight_bytes, speed.cache_bytes):
            line.append("-" if size is None else f"{size / 2**20:,.1f}")
        cells.append([*line, _or_dash(speed.joules_per_token, ".3g")])
    return TextTable(columns, cells)


def speed_lines(rows: Sequence[ModelRow]) -> list[str]:
    """Return what was measured, how precisely, and what else the machine did meanwhile."""
    speeds = [row.throughput for row in rows if row.throughput]
    if not speeds:
        return []
    settings, first = speeds[0].settings, speeds[0]
    ended = {
        "precise": "as precise as asked",
        "time": "the time was spent before it was known as precisely as asked",
        "interrupted": "interrupted: this is what was known by then",
    }[first.ended]
    measured = (
        f"prompts of {settings.prompt_length}, {settings.new_tokens} new tokens, batch "
        f"{settings.batch_size}; ± is half of the 95 % interval; {settings.precision:.2%} asked "
        f"for: {ended}"
    )
    lines = [measured]
    if first.conditions is not None:
        lines += [f"warning: {text}" for text in first.conditions.warnings()]
    return lines


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def accuracy_table(scores: Mapping[str, Sequence[TaskScore]]) -> TextTable:
    """Return the table of scores by model, in percent, each with its standard error."""
    columns = ["model"]
    columns += [f"{score.task} ({score.metric})" for score in next(iter(scores.values()))]
    rows = [[name, *map(_percent, items)] for name, items in scores.items()]
    return TextTable(columns, rows)


def _percent(score: TaskScore) -> str:
    error = "" if score.stderr is None else f" ± {100 * score.stderr:.1f}"
    return f"{100 * score.value:.1f}{error}"


def flip_table(scores: Mapping[str, Sequence[TaskScore]]) -> TextTable | None:
    """Return the table of answers that flip, in percent of the samples; None where none is known.

    Args:
        scores: By model, the dense one first, which has no row.
    """
    rows = {
        name: ["-" if score.flips is None else f"{100 * score.flips:.1f}" for score in items]
        for name, items in list(scores.items())[1:]
    }
    if all(cell == "-" for row in rows.values() for cell in row):
        return None
    columns = ["model", *(score.task for score in next(iter(scores.values())))]
    lines = [[name, *cells] for name, cells in rows.items()]
    return TextTable(columns, lines, f"Answers other than those of {next(iter(scores))}, %")


def difference_table(scores: Mapping[str, Sequence[TaskScore]]) -> TextTable | None:
    """Return the table of scores less the dense model's, in points; None where none is known.

    Args:
        scores: By model, the dense one first, which has no row.
    """
    dense, *others = scores
    if not any(score.difference for name in others for score in scores[name]):
        return None
    lines = [[name, *map(_points, scores[name])] for name in others]
    columns = ["model", *(score.task for score in scores[dense])]
    return TextTable(columns, lines, f"Score less that of {dense}, points, with 95 % intervals")


def _points(score: TaskScore) -> str:
    found = score.difference
    if found is None:
        return "-"
    return f"{100 * found.value:+.1f} ({100 * found.low:+.1f} to {100 * found.high:+.1f})"


def fidelity_table(found: Mapping[str, Fidelity]) -> TextTable:
    """Return the table of how closely models follow the first."""
    columns = ["model", "same likeliest token, %", "KL, nats", "tokens until they part (median)"]
    columns.append("never part, %")
    rows = []
    for name, item in found.items():
        parts = f"over {item.new_tokens}" if item.parts_after is None else f"{item.parts_after:g}"
        line = [name, f"{100 * item.agreement:.1f}", f"{item.divergence:.4f}", parts]
        rows.append([*line, f"{100 * item.never_parts:.0f}"])
    first = next(iter(found))
    counts = f"{found[first].num_prompts} prompts, {found[first].num_tokens:,} tokens"
    return TextTable(columns, rows, f"On the answers of {first}: {counts}")


def exact_table(scores: Mapping[str, Sequence[ExactScore]]) -> TextTable:
    """Return the table of answers that were written exactly, in percent."""
    columns = ["model", *(score.kind for score in next(iter(scores.values())))]
    rows = [
        [name, *(f"{100 * item.value:.0f} ± {100 * item.stderr:.0f}" for item in items)]
        for name, items in scores.items()
    ]
    return TextTable(columns, rows, "Answers written exactly, %")


def ghost_table(ghosts: Sequence[Mapping[str, Any]]) -> TextTable:
    """Return the table of fitted ghosts, from `GhostFacts` as dicts."""
    columns = ["ghost for", "features", "bias", "first state"]
    columns += ["fit error", "held-out", "damping", "cond"]
    rows = [
        [
            layers_as_text(range(item["start"], item["stop"])),
            item["features"],
            "yes" if item["bias"] else "no",
            "yes" if item["first_state"] else "no",
            f"{item['fit_error']:.4f}",
            "-" if item["held_out_error"] is None else f"{item['held_out_error']:.4f}",
            f"{item['damping']:.1e}",
            f"{item['condition']:.1e}",
        ]
        for item in ghosts
    ]
    return TextTable(columns, rows)


def improvement_lines(facts: Mapping[str, Any]) -> list[str]:
    """Return what corrections and healing did, a line each, from a `GhostReport` as a dict."""
    lines = []
    corrections, healing = facts["corrections"], facts["healing"]
    if corrections:
        accepted = sum(item["accepted"] for item in corrections)
        lines.append(
            f"{accepted} of {len(corrections)} corrections: held-out divergence "
            f"{corrections[0]['before']:.4f} -> {corrections[-1]['after']:.4f}"
        )
    if healing is not None:
        lines.append(f"healing: {healing_text(healing)}")
    return lines


def score_table(scores: Sequence[Mapping[str, Any]], removed: Sequence[int]) -> TextTable:
    """Return the table of candidates, from `IntervalScore` as dicts, the best first."""
    chosen = set(removed)
    rows = [
        [
            layers_as_text(range(item["start"], item["stop"])),
            f"{item['score']:.5f}",
            *_corrected(item, scores),
            "removed" if chosen.issuperset(range(item["start"], item["stop"])) else "",
        ]
        for item in sorted(scores, key=lambda item: float(item["score"]))
    ]
    return TextTable(["layers", "score", *_corrected_column(scores), ""], rows)


def memory_line(num_bytes: int, candidates: str) -> str:
    """Return what a dry run prints: the bytes of the statistics, in a unit that one can read."""
    return f"{num_bytes} bytes ({num_bytes / 2**30:.2f} GiB) of statistics for {candidates}"


def budget_line(budget: Mapping[str, Any]) -> str:
    """Return what became of a bound on quality or speed, from `Budget` as a dict."""
    if budget["kind"] == "max_perplexity_increase":
        return (
            f"perplexity on held-out calibration text {budget['reached']:+.1%} "
            f"({budget['asked']:+.1%} allowed): {budget['remove']} layers"
        )
    return (
        f"decoding {budget['reached']:.2f} times as fast as measured here "
        f"({budget['asked']:g} asked for): {budget['remove']} layers"
    )


def set_table(sets: Sequence[Mapping[str, Any]]) -> TextTable:
    """Return the table of the sets that were raced, from `SetScore` as dicts, the best first."""
    rows = [
        [layers_as_text(item["removed"]), f"{item['score']:.5f}", *_corrected(item, sets)]
        for item in sets
    ]
    return TextTable(["layers", "loss", *_corrected_column(sets)], rows)


def _corrected_column(scores: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the heading of what a second look found, where one was taken."""
    return ["corrected"] if any(item.get("corrected") is not None for item in scores) else []


def _corrected(item: Mapping[str, Any], scores: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the cell below it."""
    value = item.get("corrected")
    return ["-" if value is None else f"{value:.5f}"] if _corrected_column(scores) else []
