"""Gate, then time, then report.

Each variant's result is checked before any is timed. The variants of a case run in turn, so that
whatever slows the machine slows all of them; each timed run follows untimed ones of the same
variant, so that none pays for what its predecessor left in the caches. (torch repacks weights on
the way: its dirty lines would be written back during the next variant's run.) A row holds the
median and the 20th and 80th percentile, the share of the roof, and the ratio to each rival; losing
rows stay in. What the library promises itself is printed beside what was reached.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from _cases import Case, GateError, Row
from _report import report
from _roofline import Roof, measure_cuda_roof, measure_roof

# A variant is repeated until its runs of a case have taken this long, in seconds.
_SECONDS_PER_VARIANT = 0.25
_QUICK_SECONDS_PER_VARIANT = 0.1
_FEWEST_REPEATS = 3
_MOST_REPEATS = 100
# The untimed runs take as long as reading a last-level cache from memory twice, in seconds. Longer
# runs have done that by themselves.
_WARM_UP = 2e-3
_LONG_RUN = 0.1

# Runs a variant once and returns the seconds it took.
Clock = Callable[[Callable[[int], object], int], float]


def _percentile(sorted_values: list[float], share: float) -> float:
    return sorted_values[round(share * (len(sorted_values) - 1))]


def check_gates(case: Case) -> None:
    """Run the gates of a case.

    Raises:
        GateError: A variant's error is above what is allowed, or NaN.
    """
    for variant in case.variants:
        if variant.error is None:
            continue
        error = variant.error()
        if not error <= 1.0:
            raise GateError(
                f"{case.operator} {case.shape} {case.dtype}, {variant.name}: "
                f"error is {error:.3g} times what is allowed; nothing is reported"
            )


def _seconds_on_cpu(run: Callable[[int], object], i: int) -> float:
    start = time.perf_counter()
    run(i)
    return time.perf_counter() - start


def _seconds_on_gpu(run: Callable[[int], object], i: int) -> float:
    """Return the seconds between two events of the stream around a run, launches included."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run(i)
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3


def time_case(
    case: Case, quick: bool, seconds_of: Clock = _seconds_on_cpu
) -> dict[str, list[float]]:
    """Return the sorted times of each variant in milliseconds, the variants run in turn."""
    budget = _QUICK_SECONDS_PER_VARIANT if quick else _SECONDS_PER_VARIANT
    seconds: dict[str, float] = {}
    for variant in case.variants:  # warms up, and finds the number of repeats
        variant.run(0)
        seconds[variant.name] = seconds_of(variant.run, 1)
    slowest = max(seconds.values())
    repeats = min(max(int(budget / max(slowest, 1e-7)), _FEWEST_REPEATS), _MOST_REPEATS)
    times: dict[str, list[float]] = {variant.name: [] for variant in case.variants}
    for repeat in range(repeats):
        for variant in case.variants:
            start = time.perf_counter()
            while seconds[variant.name] < _LONG_RUN and time.perf_counter() < start + _WARM_UP:
                variant.run(2 * repeat)
            times[variant.name].append(seconds_of(variant.run, 2 * repeat + 1) * 1e3)
    return {name: sorted(values) for name, values in times.items()}


def measure(case: Case, quick: bool, seconds_of: Clock) -> list[Row]:
    """Gate and time one case. The rows' share of the roof is filled in when the roof is known.

    Raises:
        GateError: A result is wrong.
    """
    check_gates(case)
    times = time_case(case, quick, seconds_of)
    medians = {name: _percentile(values, 0.5) for name, values in times.items()}
    best_rival = min(medians[v.name] for v in case.variants if not v.is_ours)
    rows = []
    for variant in case.variants:
        median = medians[variant.name]
        num_bytes = case.num_bytes if variant.num_bytes is None else variant.num_bytes
        flops = dict(case.flops if variant.flops is None else variant.flops)
        row = Row(
            operator=case.operator,
            shape=case.shape,
            dtype=case.dtype,
            backend=variant.name,
            is_ours=variant.is_ours,
            threads=torch.get_num_threads(),
            ms=median,
            ms_p20=_percentile(times[variant.name], 0.2),
            ms_p80=_percentile(times[variant.name], 0.8),
            num_bytes=num_bytes,
            flops=flops,
            gbps=num_bytes / median / 1e6,
            gflops=sum(flops.values()) / median / 1e6,
            roof_share=0.0,
            roof_gbps=0.0,
            ratio_to_best_rival=best_rival / median,
            ratios={
                **{name: other / median for name, other in medians.items()},
                "best rival": best_rival / median,
            },
            goals=variant.goals,
        )
        rows.append(row)
    return rows


def compare_with_one_thread(rows: list[Row]) -> list[Row]:
    """Return the rows, those of more threads with their speed-up over one."""
    alone = {(row.shape, row.dtype, row.backend): row.ms for row in rows if row.threads == 1}
    compared = []
    for row in rows:
        one_thread = alone.get((row.shape, row.dtype, row.backend))
        if row.threads > 1 and one_thread is not None:
            row = replace(row, ratios={**row.ratios, "one thread": one_thread / row.ms})
        compared.append(row)
    return compared


def main(operator: str, description: str, make_cases: Callable[[bool], list[Case]]) -> None:
    """Run one benchmark on the processor from the command line.

    Args:
        operator: Names the benchmark and its file of results.
        description: For `--help`.
        make_cases: Returns the cases; its argument is whether to be quick.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="fewer shapes, fewer repeats")
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[1], help="torch's threads (default: 1)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the rows to this file")
    arguments = parser.parse_args()
    rows: list[Row] = []
    roofs: dict[int, Roof] = {}
    for threads in sorted(set(arguments.threads)):
        torch.set_num_threads(threads)
        measured, roofs[threads] = run_cases(
            lambda: make_cases(arguments.quick), arguments.quick, measure_roof, _seconds_on_cpu
        )
        rows += measured
    report(operator, compare_with_one_thread(rows), roofs, arguments.json, arguments.quick)


def main_on_gpu(operator: str, description: str, make_cases: Callable[[bool], list[Case]]) -> None:
    """Run one benchmark on a CUDA device from the command line. Arguments: see `main`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="fewer shapes, fewer repeats")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the rows to this file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("expected a CUDA device that torch can use, got none: run this on one")
    rows, roof = run_cases(
        lambda: make_cases(arguments.quick), arguments.quick, measure_cuda_roof, _seconds_on_gpu
    )
    roofs = {torch.get_num_threads(): roof}
    report(operator, rows, roofs, arguments.json, arguments.quick)


def run_cases(
    make_cases: Callable[[], list[Case]],
    quick: bool,
    roof_of: Callable[[], Roof],
    seconds_of: Clock,
) -> tuple[list[Row], Roof]:
    """Gate and time all cases, and hold each against the roofs measured before and after it.

    Raises:
        GateError: A result is wrong.
    """
    torch.manual_seed(0)
    before = highest = roof_of()
    measured: list[tuple[float, Row]] = []
    with torch.no_grad():
        for case in make_cases():
            rows = measure(case, quick, seconds_of)
            after = roof_of()
            # What memory gives changes with what other programs do: each case has its own roof.
            gbps = max(before.gbps, after.gbps)
            measured += [(gbps, row) for row in rows]
            before, highest = after, highest.highest(after)
    held = []
    for gbps, row in measured:
        roof = replace(highest, gbps=gbps)
        share = roof.ms(row.num_bytes, row.flops) / row.ms
        held.append(replace(row, roof_gbps=gbps, roof_share=share))
    return held, highest
