"""How much memory statistics may take, and how many passes that makes."""

from __future__ import annotations

import platform
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

import torch

from ghosted_fast import distributed
from ghosted_fast.errors import CalibrationError
from ghosted_fast.measure.system import free_memory
from ghosted_fast.options import GhostOptions
from ghosted_fast.statistics.interval import interval_bytes
from ghosted_fast.statistics.sample import Interval

T = TypeVar("T")
P = TypeVar("P", bound=Hashable)


def groups_within(
    items: Iterable[T],
    parts_of: Callable[[T], Iterable[P]],
    bytes_of: Callable[[P], int],
    budget: int,
) -> list[list[T]]:
    """Cut a list into groups whose statistics fit a budget together; one item alone may exceed it.

    Args:
        items: What is grouped, in order.
        parts_of: The statistics that an item needs; a group holds those that items share once.
        bytes_of: The bytes of one of them.
        budget: Bytes.
    """
    groups: list[list[T]] = []
    held: set[P] = set()
    for item in items:
        parts = set(parts_of(item))
        if not groups or sum(map(bytes_of, held | parts)) > budget:
            groups.append([])
            held = set()
        held |= parts
        groups[-1].append(item)
    return groups


def passes_within(
    intervals: Sequence[Interval], size: int, options: GhostOptions, budget: int
) -> list[list[Interval]]:
    """Cut a list of intervals into groups whose statistics fit a budget of bytes.

    Raises:
        CalibrationError: Not even one interval fits.
    """
    each = interval_bytes(size, options)
    if each > budget:
        raise CalibrationError(
            f"expected a memory budget of at least {each} bytes (the statistics of one interval: "
            f"hidden size {size}, {options.folds} folds), got {budget}: raise it, or use fewer "
            "folds"
        )
    return groups_within(intervals, lambda pair: [pair], lambda _: each, budget)


def default_memory_budget(device: torch.device) -> int:
    """Return half of the free memory beside a device's tensors, in bytes.

    In a process group it is the least that any rank has, where those of one machine share.
    """
    found = distributed.gather(((platform.node(), str(device)), free_memory(device)))
    places = [place for place, _ in found]
    return min(free // places.count(place) for place, free in found) // 2
