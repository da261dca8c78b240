"""Where the time of a run goes: named spans, one within another, always on.

A span costs two looks at the clock and an entry in a dict: some microseconds, in places that take
milliseconds. What is recorded is what this process waited for; on an accelerator the work itself
may be done later, in a span that waits for it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass
class Spans:
    """The spans of a run, by their paths: `("correct", "trials")` is a part of `("correct",)`.

    They stand in the order in which they were first entered.

    Attributes:
        seconds: Wall-clock time of all visits together.
        visits: How often each was entered.
    """

    seconds: dict[tuple[str, ...], float] = field(default_factory=dict)
    visits: dict[tuple[str, ...], int] = field(default_factory=dict)
    _open: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, dict[str, float]]:
        """Return seconds, and visits, by path as text: `correct/trials`."""
        return {
            "/".join(path): {"seconds": seconds, "visits": self.visits[path]}
            for path, seconds in self.seconds.items()
        }


_RECORDED: ContextVar[Spans | None] = ContextVar("spans", default=None)


@contextmanager
def recording() -> Iterator[Spans]:
    """Record the spans that are entered meanwhile; a recording within another is its own."""
    spans = Spans()
    token = _RECORDED.set(spans)
    try:
        yield spans
    finally:
        _RECORDED.reset(token)


@contextmanager
def span(name: str) -> Iterator[None]:
    """Add the time of what is done to the span of that name, within those that are open."""
    spans = _RECORDED.get()
    if spans is None:
        yield
        return
    outer, spans._open = spans._open, (*spans._open, name)
    path = spans._open
    spans.seconds.setdefault(path, 0.0)
    spans.visits[path] = spans.visits.get(path, 0) + 1
    began = time.perf_counter()
    try:
        yield
    finally:
        spans.seconds[path] += time.perf_counter() - began
        spans._open = outer


@contextmanager
def adding_time(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the time of what is done to an entry, and to the span of that name."""
    began = time.perf_counter()
    try:
        with span(name):
            yield
    finally:
        seconds[name] += time.perf_counter() - began


def own_seconds(spans: Mapping[str, Mapping[str, float]], path: str) -> float:
    """Return the time of a span that is in none of the spans directly within it.

    Args:
        spans: As `Spans.to_dict` returns them.
        path: One of them.
    """
    depth = path.count("/") + 1
    within = (
        found["seconds"]
        for name, found in spans.items()
        if name.startswith(f"{path}/") and name.count("/") == depth
    )
    return spans[path]["seconds"] - sum(within)
