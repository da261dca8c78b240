"""What takes a sample of a variant: gathered calls on the processor, CUDA graphs on a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ghosted_fast.timing.stopwatch import calls_per_sample, warm_sample

# Calls that take longer than this warm up by themselves, in seconds.
_LONG_CALL = 0.1
# A graph should take so long, in seconds: far above what its launch costs the processor.
_LONG_GRAPH = 1e-3
_MOST_CALLS_IN_A_GRAPH = 1024
_WARM_UPS = 3


@dataclass(frozen=True)
class Timed:
    """What times a variant.

    Attributes:
        sample: Returns the seconds of a call, warm.
        note: What is to be said of how it is timed; mostly nothing.
    """

    sample: Callable[[], float]
    note: str = ""


class Timer(Protocol):
    """Makes a variant ready to be timed."""

    def __call__(self, run: Callable[[], object], copies: int = 1, by_calls: bool = False) -> Timed:
        """Return what times `run`, which takes other weights in each of `copies` calls.

        Args:
            run: What is timed.
            copies: After how many calls the same weight comes again.
            by_calls: Whether no CUDA graph is wanted.
        """


def timer_for(device: torch.device) -> Timer:
    """Return the timer of a device."""
    if device.type == "cuda":
        return CudaTimer(device)
    return ProcessorTimer(device)


class ProcessorTimer:
    """Times calls by the clock, so many in a row that a sample is long enough.

    Args:
        device: The processor, or a device that is waited for at each mark.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, run: Callable[[], object], copies: int = 1, by_calls: bool = False) -> Timed:
        """Return what times `run`; see `Timer`."""
        seconds = warm_sample(run, self._device, 1)
        if seconds < _LONG_CALL:
            seconds = min(seconds, *(warm_sample(run, self._device, 1) for _ in range(2)))
        calls, warm_up = calls_per_sample(seconds), seconds < _LONG_CALL
        return Timed(lambda: warm_sample(run, self._device, calls, warm_up))


class CudaTimer:
    """Times replays of a CUDA graph between events, or calls where no graph can be captured.

    A graph holds as many calls as there are weights in turn, and so many that its launch does not
    count. What waits for the device, as torch's solvers do, cannot be captured. The wait itself
    would break the capture off and leave torch's allocator waiting for its end; so while calls are
    captured torch is in the mode in which a wait raises before it begins.

    Args:
        device: A CUDA device.
        cuda: `torch.cuda`, or what stands for it.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self._device, self._cuda = device, cuda

    def __call__(self, run: Callable[[], object], copies: int = 1, by_calls: bool = False) -> Timed:
        """Return what times `run`; see `Timer`."""
        self._warm_up(run)
        seconds = self._sample(run, 1)
        if by_calls:
            count = calls_per_sample(seconds)
            return Timed(lambda: self._sample(run, count), "by calls, as the library makes them")
        calls = max(copies, min(math.ceil(_LONG_GRAPH / seconds), _MOST_CALLS_IN_A_GRAPH))
        calls = copies * math.ceil(calls / copies)
        graph, refusal = self._captured(run, calls)
        if graph is None:
            count = calls_per_sample(seconds)
            return Timed(lambda: self._sample(run, count), f"no CUDA graph: {refusal}")
        replays = calls_per_sample(self._sample(graph.replay, 1))
        return Timed(lambda: self._sample(graph.replay, replays) / calls)

    def _warm_up(self, run: Callable[[], object]) -> None:
        """Run on a side stream, where kernels compile and libraries make their workspaces."""
        cuda, current = self._cuda, self._cuda.current_stream(self._device)
        side = cuda.Stream(self._device)
        side.wait_stream(current)
        with cuda.stream(side):
            for _ in range(_WARM_UPS):
                run()
        current.wait_stream(side)
        cuda.synchronize(self._device)

    def _captured(self, run: Callable[[], object], calls: int) -> tuple[Any, str]:
        """Return a graph of so many calls, or None and why there is none."""
        cuda = self._cuda
        graph = cuda.CUDAGraph()
        try:
            # A capture that breaks off stays on its own stream: the first block leads back.
            with (
                cuda.stream(cuda.current_stream(self._device)),
                cuda.graph(graph),
                self._no_waits(),
            ):
                for _ in range(calls):
                    run()
        except RuntimeError as error:
            cuda.synchronize(self._device)
            return None, (str(error).splitlines() or [type(error).__name__])[0]
        return graph, ""

    @contextmanager
    def _no_waits(self) -> Iterator[None]:
        """Have torch raise in place of waiting for the device."""
        before = self._cuda.get_sync_debug_mode()
        self._cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            self._cuda.set_sync_debug_mode(before)

    def _sample(self, run: Callable[[], object], count: int) -> float:
        """Return the seconds of a call between events, after an untimed one."""
        run()
        return warm_sample(run, self._device, count, warm_up=False)
