"""How much memory statistics may take, and how many passes that makes."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence

import torch

from ghosted_fast import distributed
from ghosted_fast.errors import CalibrationError
from ghosted_fast.options import GhostOptions
from ghosted_fast.statistics.interval import interval_bytes


def passes_within(
    intervals: Sequence[tuple[int, int]], size: int, options: GhostOptions, budget: int
) -> list[list[tuple[int, int]]]:
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
    per_pass = budget // each
    return [list(intervals[i : i + per_pass]) for i in range(0, len(intervals), per_pass)]


def default_memory_budget(device: torch.device) -> int:
    """Return half of the free memory beside a device's tensors, in bytes.

    In a process group it is the least that any rank has, where those of one machine share.
    """
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    found = distributed.gather(((platform.node(), str(device)), free))
    places = [place for place, _ in found]
    return min(free // places.count(place) for place, free in found) // 2
