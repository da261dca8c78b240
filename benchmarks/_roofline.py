"""What this machine gives at best, measured in the same run: bytes and flops per second."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_MATRIX_SIZE = 1024
_STREAM_BYTES = 256 << 20


@dataclass(frozen=True)
class Roof:
    """The limits that operators are held against.

    Attributes:
        gbps: Bytes read from memory, GB/s, by `torch.sum` over 256 MiB.
        gflops: Flops per second by the fastest of torch's square products in fp32 and bf16, GF/s.
        gflops_fp64: The same in fp64.
    """

    gbps: float
    gflops: float
    gflops_fp64: float

    def highest(self, other: Roof) -> Roof:
        """Return the higher of each roof."""
        return Roof(
            max(self.gbps, other.gbps),
            max(self.gflops, other.gflops),
            max(self.gflops_fp64, other.gflops_fp64),
        )

    def ms(self, num_bytes: float, flops: float, fp64: bool = False) -> float:
        """Return the least time for so many bytes and flops, in milliseconds."""
        peak = self.gflops_fp64 if fp64 else self.gflops
        return max(num_bytes / self.gbps, flops / peak) / 1e6


def _best_seconds(call: Callable[[], object], repeats: int = 7) -> float:
    call()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def measure_roof() -> Roof:
    """Measure the roofs with torch's current number of threads."""
    stream = torch.ones(_STREAM_BYTES // 4)
    gbps = _STREAM_BYTES / _best_seconds(stream.sum, repeats=5) / 1e9
    flops = 2.0 * _MATRIX_SIZE**3

    def product_gflops(dtype: torch.dtype) -> float:
        a = torch.randn(_MATRIX_SIZE, _MATRIX_SIZE).to(dtype)
        return flops / _best_seconds(lambda: a @ a) / 1e9

    return Roof(
        gbps,
        max(product_gflops(torch.float32), product_gflops(torch.bfloat16)),
        product_gflops(torch.float64),
    )


def bytes_past_the_cache() -> int:
    """Return how many bytes of inputs to rotate, so that each comes from memory when its turn is.

    Twice the last-level cache, but at most 256 MiB: some machines report a cache that is shared
    with others.
    """
    try:
        cache = os.sysconf("SC_LEVEL3_CACHE_SIZE")
    except (ValueError, OSError):
        cache = 0
    return min(2 * max(cache, 16 << 20), 256 << 20)
