"""Weights in turn, so that each has left the caches when it comes again."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable

import torch
from torch import Tensor

# More than the L2 cache of any GPU so far.
_DEVICE_BYTES = 256 << 20
_MOST_COPIES = 4096


def bytes_past_the_cache(device: torch.device) -> int:
    """Return how many bytes of weights to rotate, so that each comes from memory when its turn is.

    Four times the last-level cache, but at most 256 MiB: some machines report a cache that is
    shared with others.
    """
    if device.type != "cpu":
        return _DEVICE_BYTES
    try:
        cache = os.sysconf("SC_LEVEL3_CACHE_SIZE")
    except (ValueError, OSError, AttributeError):
        cache = 0
    return min(4 * max(cache, 16 << 20), 256 << 20)


class InTurn:
    """Hands out equal weights in turn.

    Their number has no divisor in common with the calls of a round, so that no variant keeps
    meeting the same copies: where the pages of a copy lie in memory shows in its speed.

    Args:
        weight: What is copied.
        total_bytes: What the copies take together, at least; up to the weight's own bytes, one copy
            is handed out. There are at most 4096: smaller weights stay in a cache.
        copy: Makes a copy.
    """

    def __init__(
        self,
        weight: Tensor,
        total_bytes: float,
        copy: Callable[[Tensor], Tensor] = Tensor.clone,
    ) -> None:
        count = min(math.ceil(total_bytes / weight.nbytes), _MOST_COPIES)
        if count > 1:
            count = next(n for n in itertools.count(count) if math.gcd(n, 6) == 1)
        self.count = max(count, 1)
        self._copies = itertools.cycle([copy(weight) for _ in range(self.count)])

    def __call__(self) -> Tensor:
        """Return the next one."""
        return next(self._copies)
