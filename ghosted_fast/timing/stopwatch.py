"""Seconds between marks on a device's own time line, without waiting at each mark."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

# A sample should last so long, in seconds: far above what the clock resolves and what the system
# takes away for a moment.
_LONG_ENOUGH = 5e-3
# Untimed runs before a sample take as long as reading a last-level cache from memory twice.
_WARM_UP = 2e-3


class Stopwatch:
    """Marks a processor's or a device's progress; of a CUDA device by events in its stream.

    Args:
        device: Where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Note the moment at which all work given so far is done."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._marks.append(event)
            return
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Return the seconds from each mark to the next, once the last is reached."""
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if self._device.type != "cuda":
            return [after - before for before, after in pairs]
        self._marks[-1].synchronize()
        return [float(before.elapsed_time(after)) / 1e3 for before, after in pairs]


def warm_sample(
    run: Callable[[], object], device: torch.device, calls: int, warm_up: bool = True
) -> float:
    """Return the seconds of one call, as the mean of some in a row after untimed ones.

    The untimed calls fetch what the previous variant displaced, so that none pays for another.

    Args:
        run: What is timed.
        device: Where it runs.
        calls: Calls that are timed together; see `calls_per_sample`.
        warm_up: Whether to begin with untimed calls.
    """
    began = time.perf_counter()
    while warm_up:
        run()
        warm_up = time.perf_counter() < began + _WARM_UP
    stopwatch = Stopwatch(device)
    stopwatch.mark()
    for _ in range(calls):
        run()
    stopwatch.mark()
    return stopwatch.seconds()[0] / calls


def calls_per_sample(seconds: float) -> int:
    """Return how many calls of so many seconds make a sample that is long enough."""
    return max(1, round(_LONG_ENOUGH / max(seconds, 1e-9)))
