"""The streams of a device that is not there: all that events leave open happens in any order."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from threading import RLock
from typing import Any

import torch
from torch import Tensor

_COMPUTE, _LAYERS, _IN, _OUT = "compute", "layers", "in", "out"


@dataclass(frozen=True, eq=False)
class Place:
    """An event: behind so many pieces of work of a stream."""

    streams: SimulatedStreams
    stream: str
    count: int

    def synchronize(self) -> None:
        """Let the host wait, while the streams work in any order."""
        self.streams.run_until(self)


class SimulatedStreams:
    """Streams whose work is done late, in an order that is drawn, and that keeps to events alone.

    Memory holds NaN, or bytes that are NaN as numbers, until it is written.

    Args:
        seed: Of the order.
        computes_at_once: For code that computes on the processor, at once: what is waited for is
            done as soon as computing waits for it, and not before.
    """

    device = torch.device("cpu")

    def __init__(self, seed: int = 0, computes_at_once: bool = False) -> None:
        self._draw = random.Random(seed)
        self._at_once = computes_at_once
        self._work: dict[str, deque[tuple[Callable[[], Any], Place | None]]] = {
            name: deque() for name in (_COMPUTE, _LAYERS, _IN, _OUT)
        }
        self._asked: Counter[str] = Counter()
        self._done: Counter[str] = Counter()
        self._lock = RLock()  # a thread reads

    def computing(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def host(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        with torch.inference_mode(False):
            found = torch.empty(tuple(shape), dtype=dtype)
            return found.fill_(float("nan") if dtype.is_floating_point else 255)

    memory = host

    def compute(self, work: Callable[[], Any]) -> None:
        """Ask the computing stream for a piece of work."""
        self._ask(_COMPUTE, work, None)

    def mark(self) -> Place:
        return Place(self, _COMPUTE, self._asked[_COMPUTE])

    def wait(self, event: Place) -> None:
        place = self._ask(_COMPUTE, lambda: None, event)
        if self._at_once:
            place.synchronize()

    def fill(self, there: Tensor, held: Tensor, after: Place | None) -> Place:
        return self._ask(_LAYERS, lambda: there.copy_(held), after)

    def send(self, states: Tensor) -> tuple[Tensor, Place]:
        held, there = states.clone(), torch.full_like(states, float("nan"))
        return there, self._ask(_IN, lambda: there.copy_(held), None)

    def fetch(self, held: Tensor, states: Tensor, after: Place) -> Place:
        return self._ask(_OUT, lambda: held.copy_(states), after)

    def run_until(self, event: Place | None) -> None:
        """Do what was asked for until an event; None for all of it."""
        with self._lock:
            while any(self._work.values()) if event is None else not self._is_over(event):
                assert self._step(), "the streams wait for one another"

    def _ask(self, stream: str, work: Callable[[], Any], after: Place | None) -> Place:
        with self._lock:
            self._work[stream].append((work, after))
            self._asked[stream] += 1
            place = Place(self, stream, self._asked[stream])
            while self._draw.random() < 0.5 and self._step():
                pass
            return place

    def _step(self) -> bool:
        """Do a piece of work that waits for nothing; return whether there is any."""
        ready = [
            name
            for name, work in self._work.items()
            if work and (work[0][1] is None or self._is_over(work[0][1]))
        ]
        if not ready:
            return False
        name = self._draw.choice(ready)
        work, _ = self._work[name].popleft()
        with torch.inference_mode():
            work()
        self._done[name] += 1
        return True

    def _is_over(self, event: Place) -> bool:
        return self._done[event.stream] >= event.count
