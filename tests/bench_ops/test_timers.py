"""Samples of the processor, and CUDA graphs on a machine that only pretends to have a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from ghosted_fast.bench_ops.timers import CudaTimer, ProcessorTimer, timer_for
from ghosted_fast.timing import stopwatch

CUDA = torch.device("cuda")


class FakeCuda:
    """What `torch.cuda` does, on one time line: kernels take time when they run, not when captured.

    A kernel that is launched on a stream which captures goes into the graph. A wait during a
    capture breaks it off, unless the debug mode raises first.
    """

    def __init__(self) -> None:
        self.clock = 0.0
        self.stream_now = "default"
        self.capturing: FakeGraph | None = None
        self.broken = False
        self.sync_mode: int | str = 0
        self.log: list[str] = []
        self.streams = 0

    # What work calls.
    def kernel(self, seconds: float) -> None:
        if self.capturing is not None:
            self.capturing.kernels.append(seconds)
            return
        self.clock += seconds
        self.log.append(f"kernel on {self.stream_now}")

    def wait(self) -> None:
        if self.sync_mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation\nmore")
        self.break_off()

    def break_off(self) -> None:
        if self.capturing is not None:
            self.broken = True
            raise RuntimeError("operation not permitted when stream is capturing")

    # What torch.cuda has.
    def Stream(self, device: torch.device) -> FakeStream:  # noqa: N802
        self.streams += 1
        return FakeStream(self, f"side {self.streams}")

    def current_stream(self, device: torch.device) -> FakeStream:
        return FakeStream(self, self.stream_now)

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.stream_now = self.stream_now, stream.name
        try:
            yield
        finally:
            self.stream_now = before

    def CUDAGraph(self) -> FakeGraph:  # noqa: N802
        return FakeGraph(self)

    def graph(self, graph: FakeGraph) -> FakeCapture:
        return FakeCapture(self, graph)

    def synchronize(self, device: torch.device) -> None:
        self.log.append("synchronize")

    def get_sync_debug_mode(self) -> int | str:
        return self.sync_mode

    def set_sync_debug_mode(self, mode: int | str) -> None:
        self.sync_mode = mode


class FakeStream:
    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self.cuda, self.name = cuda, name

    def wait_stream(self, other: FakeStream) -> None:
        self.cuda.log.append(f"{self.name} waits for {other.name}")


class FakeGraph:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.kernels, self.replays = cuda, list[float](), 0

    def replay(self) -> None:
        self.replays += 1
        self.cuda.clock += sum(self.kernels) + 1e-6


class FakeCapture:
    """As torch's: a capture that broke off ends with an error, and on its own stream."""

    def __init__(self, cuda: FakeCuda, graph: FakeGraph) -> None:
        self.cuda, self.graph = cuda, graph

    def __enter__(self) -> None:
        assert self.cuda.sync_mode == 0, "torch waits for the device before it captures"
        self.before, self.cuda.stream_now = self.cuda.stream_now, "capture"
        self.cuda.capturing = self.graph

    def __exit__(self, *_: object) -> None:
        self.cuda.capturing = None
        if self.cuda.broken:
            raise RuntimeError("capture was invalidated")
        self.cuda.stream_now = self.before


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()

    class FakeWatch:
        def __init__(self, device: torch.device) -> None:
            self.marks: list[float] = []

        def mark(self) -> None:
            self.marks.append(fake.clock)

        def seconds(self) -> list[float]:
            return [b - a for a, b in zip(self.marks, self.marks[1:], strict=False)]

    monkeypatch.setattr(stopwatch, "Stopwatch", FakeWatch)
    return fake


def kernels_of(cuda: FakeCuda, seconds: float, copies: int) -> tuple[list[int], Callable[[], None]]:
    """Return a list of the copies that calls took, and the call."""
    taken: list[int] = []

    def run() -> None:
        taken.append(len(taken) % copies)
        cuda.kernel(seconds)

    return taken, run


@pytest.mark.parametrize(("seconds", "copies"), [(4e-6, 5), (4e-6, 385), (5e-3, 1), (1e-5, 1)])
def test_calls_are_captured_over_all_weights(cuda: FakeCuda, seconds: float, copies: int) -> None:
    taken, run = kernels_of(cuda, seconds, copies)
    timed = CudaTimer(CUDA, cuda)(run, copies)
    assert timed.note == ""
    before = len(taken)
    sample = timed.sample()
    assert len(taken) == before, "a sample replays; it launches nothing by itself"
    # The launch of a replay, a microsecond here, is shared by the calls of the graph.
    assert sample == pytest.approx(seconds, rel=0.01)


def test_a_graph_has_whole_turns_of_the_weights_and_is_long(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[FakeGraph] = []
    make = cuda.CUDAGraph
    monkeypatch.setattr(cuda, "CUDAGraph", lambda: graphs.append(make()) or graphs[-1])
    for seconds, copies in ((4e-6, 7), (1e-9, 1), (1e-9, 7), (2e-6, 3000), (0.5, 1)):
        _, run = kernels_of(cuda, seconds, copies)
        CudaTimer(CUDA, cuda)(run, copies)
    counts = [len(graph.kernels) for graph in graphs]
    assert counts == [252, 1024, 1029, 3000, 1]


def test_replays_make_a_sample_long_enough(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[FakeGraph] = []
    make = cuda.CUDAGraph
    monkeypatch.setattr(cuda, "CUDAGraph", lambda: graphs.append(make()) or graphs[-1])
    _, run = kernels_of(cuda, 1e-5, 1)
    timed = CudaTimer(CUDA, cuda)(run)
    before = graphs[0].replays
    timed.sample()
    assert graphs[0].replays - before == 1 + 5, "one untimed, and five of a millisecond"


def test_kernels_compile_on_a_side_stream_before_the_capture(cuda: FakeCuda) -> None:
    _, run = kernels_of(cuda, 1e-3, 1)
    CudaTimer(CUDA, cuda)(run)
    expected = ["side 1 waits for default", *["kernel on side 1"] * 3, "default waits for side 1"]
    assert cuda.log[:6] == [*expected, "synchronize"]


def test_what_is_wanted_by_calls_is_never_captured(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "CUDAGraph", lambda: pytest.fail("a graph was made"))
    taken, run = kernels_of(cuda, 1e-4, 1)
    timed = CudaTimer(CUDA, cuda)(run, by_calls=True)
    before = len(taken)
    assert timed.sample() == pytest.approx(1e-4) and "by calls" in timed.note
    assert len(taken) - before == 1 + 50, "one untimed, and five milliseconds of them"


@pytest.mark.parametrize("seen_by_torch", [True, False])
def test_what_waits_is_timed_without_a_graph(cuda: FakeCuda, seen_by_torch: bool) -> None:
    """Also a wait that torch does not see, as inside a library: that breaks the capture off."""
    calls: list[None] = []

    def run() -> None:
        calls.append(None)
        cuda.kernel(2e-3)
        (cuda.wait if seen_by_torch else cuda.break_off)()

    timed = CudaTimer(CUDA, cuda)(run)
    expected = "called a synchronizing CUDA operation" if seen_by_torch else "capture was"
    assert timed.note.startswith(f"no CUDA graph: {expected}") and "\n" not in timed.note
    assert cuda.broken is not seen_by_torch
    assert (cuda.stream_now, cuda.sync_mode) == ("default", 0)
    before = len(calls)
    assert timed.sample() == pytest.approx(2e-3)
    assert len(calls) - before == 1 + 2, "one untimed, and two that are long enough together"


def test_waits_are_allowed_again_after_a_capture(cuda: FakeCuda) -> None:
    _, run = kernels_of(cuda, 1e-3, 1)
    cuda.sync_mode = 0
    CudaTimer(CUDA, cuda)(run)
    assert cuda.sync_mode == 0


def test_short_calls_are_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = [0.0], []

    def run() -> None:
        calls.append(clock[0])
        clock[0] += 1e-4

    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: clock[0])
    timed = ProcessorTimer(torch.device("cpu"))(run)
    before = len(calls)
    assert timed.sample() == pytest.approx(1e-4) and timed.note == ""
    warm_ups = len(calls) - before - 50
    assert 20 <= warm_ups <= 21, "two milliseconds of untimed calls, then 5 ms of timed ones"


def test_long_calls_warm_up_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = [0.0], []

    def run() -> None:
        calls.append(None)
        clock[0] += 0.5

    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: clock[0])
    timed = ProcessorTimer(torch.device("cpu"))(run)
    before = len(calls)
    timed.sample()
    assert len(calls) - before == 1


def test_timers_of_devices() -> None:
    assert isinstance(timer_for(CUDA), CudaTimer)
    assert isinstance(timer_for(torch.device("cpu")), ProcessorTimer)
