"""What this machine gives at best, measured in the same run: bytes and flops per second.

Flops are those of multiply-adds from registers and bytes those of reading memory, by `roof.cpp`,
compiled for this very processor. Without a compiler the fastest of torch's square products and
`torch.sum` stand in for them.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import os
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_SOURCE = Path(__file__).parent / "roof.cpp"
_ROUNDS = 2_000_000
_STREAM_BYTES = 256 << 20
_MATRIX_SIZE = 1024
_REPEATS = 5
KINDS = ("bf16", "fp32", "fp64")


@dataclass(frozen=True)
class Roof:
    """The limits that operators are held against.

    Attributes:
        gbps: Bytes read from memory, GB/s, by all threads together.
        gflops: Flops per second of bf16, fp32 and fp64 multiply-adds, GF/s, by all threads
            together. Where the processor has no bf16 multiply-add: that of fp32.
    """

    gbps: float
    gflops: Mapping[str, float]

    def highest(self, other: Roof) -> Roof:
        """Return the higher of each roof."""
        return Roof(
            max(self.gbps, other.gbps),
            {kind: max(self.gflops[kind], other.gflops[kind]) for kind in KINDS},
        )

    def ms(self, num_bytes: float, flops: Mapping[str, float]) -> float:
        """Return the least time for so many bytes, and flops of each kind, in milliseconds."""
        seconds = sum(count / self.gflops[kind] for kind, count in flops.items())
        return max(num_bytes / self.gbps, seconds) / 1e6

    def __str__(self) -> str:
        peaks = ", ".join(f"{kind} {self.gflops[kind]:.0f} GF/s" for kind in KINDS)
        return f"{self.gbps:.1f} GB/s, {peaks}"


@functools.cache
def _library() -> ctypes.CDLL | None:
    """Return the compiled `roof.cpp`, or None without a compiler."""
    compiler = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "g++"
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "roof.so"
        flags = ["-O3", "-march=native", "-shared", "-fPIC"]
        command = [*compiler.split(), *flags, str(_SOURCE), "-o", str(target)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        library = ctypes.CDLL(str(target))
    for kind in KINDS:
        getattr(library, f"roof_{kind}").restype = ctypes.c_double
    return library


def _best_seconds(call: Callable[[], object]) -> float:
    call()
    best = float("inf")
    for _ in range(_REPEATS):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def _on_all_threads(call: Callable[[int], object]) -> float:
    """Return the seconds for a call on each of torch's threads at once; ctypes lets them."""
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        return _best_seconds(lambda: list(pool.map(call, range(threads))))


def measure_roof() -> Roof:
    """Measure the roofs with torch's current number of threads."""
    library, threads = _library(), torch.get_num_threads()
    stream = torch.empty(_STREAM_BYTES // 8, dtype=torch.int64)
    if library is not None:
        library.roof_use_huge_pages(
            ctypes.c_void_p(stream.data_ptr()), ctypes.c_size_t(stream.nbytes)
        )
    stream.fill_(1)
    if library is None:
        return _torch_roof(stream)
    gflops = {}
    for kind in KINDS:
        function, sink = getattr(library, f"roof_{kind}"), (ctypes.c_double * threads)()
        flops = function(ctypes.c_int64(1), sink) * _ROUNDS * threads

        def multiply(i: int) -> None:
            function(ctypes.c_int64(_ROUNDS), ctypes.byref(sink, 8 * i))  # noqa: B023

        gflops[kind] = flops / _on_all_threads(multiply) / 1e9
    gflops["bf16"] = max(gflops["bf16"], gflops["fp32"])
    share = _STREAM_BYTES // threads // 64 * 64
    sinks = (ctypes.c_uint64 * threads)()

    def read(i: int) -> None:
        address = ctypes.c_void_p(stream.data_ptr() + i * share)
        library.roof_read(address, ctypes.c_size_t(share), ctypes.byref(sinks, 8 * i))

    return Roof(share * threads / _on_all_threads(read) / 1e9, gflops)


def _torch_roof(stream: torch.Tensor) -> Roof:
    def product_gflops(dtype: torch.dtype) -> float:
        a = torch.randn(_MATRIX_SIZE, _MATRIX_SIZE).to(dtype)
        return 2.0 * _MATRIX_SIZE**3 / _best_seconds(lambda: a @ a) / 1e9

    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
    gflops = {kind: product_gflops(dtype) for kind, dtype in dtypes.items()}
    return Roof(_STREAM_BYTES / _best_seconds(stream.sum) / 1e9, gflops)


def measure_cuda_roof() -> Roof:
    """Measure the roofs of the current CUDA device by torch: a copy, and square products."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)

    def seconds(call: Callable[[], object]) -> float:
        def synchronised() -> None:
            call()
            torch.cuda.synchronize()

        return _best_seconds(synchronised)

    def product_gflops(dtype: torch.dtype, size: int) -> float:
        a = torch.randn(size, size, device="cuda").to(dtype)
        return 2.0 * size**3 / seconds(lambda: a @ a) / 1e9

    gflops = {
        "bf16": product_gflops(torch.bfloat16, 8192),
        "fp32": product_gflops(torch.float32, 4096),
        "fp64": product_gflops(torch.float64, 2048),
    }
    return Roof(2.0 * source.nbytes / seconds(lambda: target.copy_(source)) / 1e9, gflops)


def bytes_past_the_cache() -> int:
    """Return how many bytes of inputs to rotate, so that each comes from memory when its turn is.

    Four times the last-level cache, but at most 256 MiB: some machines report a cache that is
    shared with others.
    """
    try:
        cache = os.sysconf("SC_LEVEL3_CACHE_SIZE")
    except (ValueError, OSError):
        cache = 0
    return min(4 * max(cache, 16 << 20), 256 << 20)


def in_turn(
    weight: Tensor, total_bytes: float, copy: Callable[[Tensor], Tensor] = Tensor.clone
) -> Callable[[], Tensor]:
    """Return what hands out equal weights in turn, so many that each has left the caches.

    Their number has no divisor in common with the calls of a round, so that no variant keeps
    meeting the same copies: where the pages of a copy lie in memory shows in its speed.

    Args:
        weight: What is copied.
        total_bytes: What the copies take together, at least; up to the weight's own bytes, one copy
            is handed out.
        copy: Makes a copy.
    """
    count = math.ceil(total_bytes / weight.nbytes)
    if count > 1:
        count = next(n for n in itertools.count(count) if math.gcd(n, 6) == 1)
    return itertools.cycle([copy(weight) for _ in range(count)]).__next__
