"""Check, then time: each variant in rounds with its rivals and the roofs.

All variants of a case are checked before any is timed; on a wrong result nothing is reported. With
more than one thread, ours is also timed on one thread in the same rounds.
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch

from ghosted_fast.bench_ops.cases import Case, Plan, Setting, Variant
from ghosted_fast.bench_ops.roofs import MEMORY, Roofs, roofs_of
from ghosted_fast.bench_ops.rows import Measured, Row, Run
from ghosted_fast.bench_ops.timers import Timed, Timer, timer_for
from ghosted_fast.errors import ArgumentError, BackendError, GateError
from ghosted_fast.measure.system import free_memory, machine_facts
from ghosted_fast.ops.backends import BACKENDS, backend_status
from ghosted_fast.text.progress import progress_bar
from ghosted_fast.timing.conditions import Watch
from ghosted_fast.timing.rounds import PRECISION, Rounds, time_variants

T = TypeVar("T")
_ONE_THREAD = ", one thread"
_BAR_STEPS = 1000
_BAR = "{desc}: {percentage:3.0f}% |{bar}| {elapsed}, {remaining} left{postfix}"


@dataclass(frozen=True)
class Effort:
    """How precisely, and how long.

    Attributes:
        precision: Half of the interval of a ratio at which it is known, as a share.
        seconds: When to stop at the latest, of each case.
        seed: Of the inputs.
    """

    precision: float = PRECISION
    seconds: float = 10.0
    seed: int = 0


def check_plans(plans: Sequence[Plan], setting: Setting) -> None:
    """Raise, before any work, unless all cases can be made and run here.

    Raises:
        ArgumentError: There is none, the device is absent, or the memory does not suffice.
        BackendError: The named backend does not serve one.
    """
    if not plans:
        raise ArgumentError("expected a case at least, got none")
    if setting.device.type == "cuda" and not torch.cuda.is_available():
        raise ArgumentError(
            "expected a CUDA device that torch can use for device cuda, got none: use cpu"
        )
    if setting.backend != "auto":
        _check_backend(plans, setting)
    largest = max(plans, key=lambda plan: plan.memory(setting))
    needed, there = largest.memory(setting), free_memory(setting.device)
    if needed > there:
        raise ArgumentError(
            f"{largest}: expected about {needed / 2**30:.1f} GiB of free memory, got "
            f"{there / 2**30:.1f}: ask for a smaller width, or fewer rows"
        )


def _check_backend(plans: Sequence[Plan], setting: Setting) -> None:
    name = setting.backend
    if name not in BACKENDS:
        raise BackendError(f"expected a backend of auto, {', '.join(BACKENDS)}, got {name!r}")
    if reason := BACKENDS[name].absence_reason():
        raise BackendError(f"backend {name!r}: {reason}; use 'auto'")
    for plan in plans:
        if reason := plan.refusal(setting):
            raise BackendError(f"backend {name!r} does not serve {plan}: {reason}")


def machine_of(setting: Setting) -> dict[str, str]:
    """Return what is measured on: processor, threads, versions, the device and the kernels."""
    native = next(text for name, _, text in backend_status() if name == "native")
    return {**machine_facts(), "device": setting.device.type, "native": native}


def run_plans(
    plans: Sequence[Plan], setting: Setting, effort: Effort, progress: bool = False
) -> Run:
    """Check and time all cases. An interrupt ends the run, which then holds what is known.

    Args:
        plans: The cases.
        setting: Where and by what they are computed.
        effort: How precisely, and how long.
        progress: Whether to show a bar.

    Raises:
        ArgumentError, BackendError: See `check_plans`.
        GateError: A result is wrong.
    """
    check_plans(plans, setting)
    watch, roofs, timer = Watch(), roofs_of(setting.device), timer_for(setting.device)
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    settings = {**asdict(effort), "backend": setting.backend}
    run = Run(machine_of(setting), settings, date, roofs.source)
    with progress_bar("cases", progress, of=_BAR_STEPS * len(plans)) as bar, torch.no_grad():
        bar.bar_format = _BAR
        try:
            for index, plan in enumerate(plans):
                bar.set_postfix_str(str(plan))

                def report(share: float, index: int = index) -> None:
                    bar.update(max(int(_BAR_STEPS * (index + share)) - bar.n, 0))

                run.cases.append(measure(plan, setting, effort, roofs, timer, report))
                report(1.0)
            run.complete = True
        except KeyboardInterrupt:
            pass
    run.conditions = watch.conditions()
    return run


def measure(
    plan: Plan,
    setting: Setting,
    effort: Effort,
    roofs: Roofs,
    timer: Timer,
    report: Callable[[float], object] | None = None,
) -> Measured:
    """Make, check and time one case.

    Raises:
        GateError: A result is wrong.
    """
    watch = Watch()
    torch.manual_seed(effort.seed)
    case = plan.make(setting)
    threads = torch.get_num_threads() if setting.device.type == "cpu" else 1
    errors, left_out = check_gates(plan, case, threads)
    variants = [variant for variant in case.variants if variant.name in errors]
    ready = {item.name: timer(item.run, item.copies, item.by_calls) for item in variants}
    if threads > 1:
        first = variants[0]
        alone = on_one_thread(lambda: timer(first.run, first.copies))
        ready[first.name + _ONE_THREAD] = Timed(
            functools.partial(on_one_thread, alone.sample), alone.note
        )
    limits = {kind: roofs.limits[kind] for kind in (MEMORY, *case.flops)}
    samples = {name: timed.sample for name, timed in ready.items()}
    samples |= {_roof_name(kind): timer(roof.run).sample for kind, roof in limits.items()}
    rounds = time_variants(samples, effort.precision, effort.seconds, after_pair=report)
    rows = []
    for variant in variants:
        timings = _timings(variant, case, variants, rounds, roofs)
        row = Row(
            operator=plan.operator,
            shape=plan.shape,
            width=plan.width,
            rows=plan.rows,
            dtype=plan.dtype_name,
            variant=variant.name,
            is_ours=variant.is_ours,
            backend=variant.backend,
            threads=threads,
            error=errors[variant.name],
            flops=case.flops,
            note=ready[variant.name].note,
            **timings,
        )
        rows.append(row)
    return Measured(
        rows=rows,
        roofs={
            kind: rounds.seconds(_roof_name(kind)).inverse.times(roof.work / 1e9)
            for kind, roof in limits.items()
        },
        left_out=left_out,
        pairs=rounds.pairs,
        settled=rounds.is_settled,
        conditions=watch.conditions(),
    )


def _timings(
    variant: Variant, case: Case, variants: Sequence[Variant], rounds: Rounds, roofs: Roofs
) -> dict[str, Any]:
    """Return the fields of a row that come out of the rounds."""
    name = variant.name
    num_bytes = case.num_bytes if variant.num_bytes is None else variant.num_bytes
    least, limit = roofs.least_seconds(
        num_bytes, case.flops, lambda kind: rounds.samples(_roof_name(kind))
    )
    rivals = [item.name for item in variants if not item.is_ours]
    best = min(rivals, key=lambda rival: float(rounds.seconds(rival)), default=None)
    alone = name + _ONE_THREAD
    return {
        "ms": rounds.seconds(name).times(1e3),
        "num_bytes": num_bytes,
        "roof_share": rounds.ratio(least, name),
        "roof_limit": limit,
        "ratios": {
            item.name: rounds.speedup(name, item.name) for item in variants if item is not variant
        },
        "best_rival": best,
        "one_thread": rounds.speedup(name, alone) if alone in rounds.names else None,
    }


def _roof_name(kind: str) -> str:
    return f"roof: {kind}"


def check_gates(
    plan: Plan, case: Case, threads: int = 1
) -> tuple[dict[str, float], dict[str, str]]:
    """Check the results of all variants; with more threads, of ours on one thread too.

    Returns:
        The error of each variant, and the reason of each rival that does not run here.

    Raises:
        GateError: An error is above what is allowed, or NaN.
    """
    errors: dict[str, float] = {}
    left_out: dict[str, str] = {}
    for variant in case.variants:
        try:
            errors[variant.name] = variant.error()
        except Exception as error:
            if variant.is_ours:
                raise
            left_out[variant.name] = (str(error).splitlines() or [type(error).__name__])[0]
            continue
        _check_error(plan, variant.name, errors[variant.name])
    if threads > 1:
        first = case.variants[0]
        _check_error(plan, first.name + _ONE_THREAD, on_one_thread(first.error))
    return errors, left_out


def _check_error(plan: Plan, name: str, error: float) -> None:
    if not error <= 1.0:
        raise GateError(
            f"{plan}, {name}: expected the result of fp64, got an error of {error:.3g} times what "
            "is allowed; nothing is reported"
        )


def on_one_thread(call: Callable[[], T]) -> T:
    """Run a call on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return call()
    finally:
        torch.set_num_threads(threads)
