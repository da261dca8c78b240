"""A machine whose speed the tests decide: variants and roofs that say how long they took."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

from ghosted_fast.bench_ops import runner
from ghosted_fast.bench_ops.cases import OURS, Case, Plan, Setting, Variant
from ghosted_fast.bench_ops.roofs import Roof, Roofs
from ghosted_fast.bench_ops.rows import Measured, Run
from ghosted_fast.bench_ops.timers import Timed
from ghosted_fast.timing.rounds import time_variants

SETTING = Setting(torch.device("cpu"))
NUM_BYTES, FLOPS = 4e6, 2e6
MEMORY_BYTES, COMPUTE_FLOPS = 2e7, 1e8


@dataclass
class Machine:
    """A machine.

    Attributes:
        seconds: Of a call of each variant and roof, on an undisturbed machine.
        noise: Standard deviation of the logarithm of a sample.
        slower: By how much the machine as a whole is slower, at a moment.
        ran: What ran, in order.
        clock: The time.
    """

    seconds: dict[str, float]
    noise: float = 0.0
    slower: Callable[[float], float] = lambda clock: 1.0
    seed: int = 0
    ran: list[str] = field(default_factory=list)
    clock: float = 0.0

    def __post_init__(self) -> None:
        self._draw = random.Random(self.seed)

    def run(self, name: str) -> float:
        """Let something run, and return its seconds."""
        self.ran.append(name)
        spent = self.seconds[name] * self.slower(self.clock)
        spent *= math.exp(self._draw.gauss(0.0, self.noise))
        self.clock += spent
        return spent

    def variants(self) -> list[Variant]:
        """Return what is no roof; the first is ours."""
        names = [name for name in self.seconds if name not in ("memory", "fp32")]
        return [
            Variant(
                name,
                functools.partial(self.run, name),
                lambda: 0.25,
                is_ours=name.startswith(OURS),
                backend="native" if name.startswith(OURS) else "torch",
            )
            for name in names
        ]

    def plan(self, shape: str = "d=8 rows=1") -> Plan:
        """Return a case of this machine's variants."""
        case = Case(NUM_BYTES, {"fp32": FLOPS}, self.variants())
        return Plan(
            "ghost_apply", shape, 8, 1, torch.float32, lambda _: case, lambda _: "", lambda _: 0
        )

    def roofs(self) -> Roofs:
        """Return this machine's limits."""
        memory = Roof(functools.partial(self.run, "memory"), MEMORY_BYTES)
        compute = Roof(functools.partial(self.run, "fp32"), COMPUTE_FLOPS)
        return Roofs("simulated", {"memory": memory, "fp32": compute})

    def timer(self, run: Callable[[], float], copies: int = 1, by_calls: bool = False) -> Timed:
        """Return what times a call: it says so itself."""
        return Timed(run)

    def measure(
        self, monkeypatch: pytest.MonkeyPatch, effort: runner.Effort | None = None
    ) -> Measured:
        """Return what the runner finds of the case."""
        by_this_clock = functools.partial(time_variants, clock=lambda: self.clock)
        monkeypatch.setattr(runner, "time_variants", by_this_clock)
        effort = effort or runner.Effort(0.01, 60.0)
        return runner.measure(self.plan(), SETTING, effort, self.roofs(), self.timer)

    def full_run(self, monkeypatch: pytest.MonkeyPatch) -> Run:
        """Return a run of the one case."""
        machine = {**runner.machine_of(SETTING), "threads": "1"}
        run = Run(machine, {"precision": 0.01}, "2026-01-01", "simulated")
        run.cases.append(self.measure(monkeypatch))
        run.complete = True
        return run


def machine(**changes: float) -> dict[str, float]:
    """Return the seconds of a machine, some of them changed by a factor."""
    seconds = {
        OURS: 5e-3,
        f"{OURS} int8": 4e-3,
        "torch": 1e-2,
        "other": 2e-2,
        "memory": 1e-2,
        "fp32": 4e-3,
    }
    return {
        name: value * changes.get(name.replace(" ", "_"), 1.0) for name, value in seconds.items()
    }
