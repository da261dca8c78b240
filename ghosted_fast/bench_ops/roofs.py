"""What the machine gives at best: bytes and flops per second, timed in the rounds of each case.

On the processor, flops are those of multiply-adds from registers and bytes those of reading memory,
by `roof.cpp`, compiled for this very processor. Without a compiler torch's square products and
`torch.sum` stand in for them; on other devices, its products and a copy do.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from ghosted_fast._env import compiler
from ghosted_fast.timing.rounds import Rounds, time_variants
from ghosted_fast.timing.stopwatch import warm_sample

_SOURCE = Path(__file__).parent / "roof.cpp"
_STEPS = 2_000_000
_STREAM_BYTES = 256 << 20
_DEVICE_STREAM_BYTES = 512 << 20
_MATRIX_SIZE = 1024
_DEVICE_MATRIX_SIZES = {"bf16": 8192, "fp32": 4096, "fp64": 2048}
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
MEMORY = "memory"
KINDS = tuple(_DTYPES)


@dataclass(frozen=True)
class Roof:
    """One limit of the machine.

    Attributes:
        run: Does work that only this limit holds back.
        work: The bytes of a call, of the limit `MEMORY`, else its flops.
    """

    run: Callable[[], object]
    work: float


@dataclass(frozen=True)
class Roofs:
    """The limits of a device.

    Attributes:
        source: What measures them.
        limits: `MEMORY`, and the multiply-adds of each kind. Where a processor has no bf16
            multiply-add, or a slower one, that kind is fp32's.
    """

    source: str
    limits: Mapping[str, Roof]

    def least_seconds(
        self,
        num_bytes: float,
        flops: Mapping[str, float],
        samples: Callable[[str], Sequence[float]],
    ) -> tuple[list[float], str]:
        """Return the least time for so much work in each round, and which limit decides.

        Args:
            num_bytes: Bytes that are moved.
            flops: Flops that are done, by kind.
            samples: Returns a limit's seconds, round by round.
        """
        memory = [seconds * num_bytes / self.limits[MEMORY].work for seconds in samples(MEMORY)]
        compute = [0.0] * len(memory)
        for kind, count in flops.items():
            share = count / self.limits[kind].work
            compute = [a + share * b for a, b in zip(compute, samples(kind), strict=True)]
        least = [max(pair) for pair in zip(memory, compute, strict=True)]
        return least, MEMORY if sum(memory) >= sum(compute) else "+".join(flops)


def roofs_of(device: torch.device) -> Roofs:
    """Return the limits of a device; of the processor, for torch's current number of threads."""
    if device.type != "cpu":
        return _torch_roofs(device, _DEVICE_STREAM_BYTES, _DEVICE_MATRIX_SIZES)
    library = _library()
    if library is None:
        sizes = dict.fromkeys(KINDS, _MATRIX_SIZE)
        return _torch_roofs(device, _STREAM_BYTES, sizes)
    return _compiled_roofs(library)


def measure_roofs(seconds: float = 1.0) -> dict[str, float]:
    """Return what the processor gives: bytes per second of `MEMORY`, and flops of each kind."""
    roofs, cpu = roofs_of(torch.device("cpu")), torch.device("cpu")
    samples = {
        name: functools.partial(warm_sample, roof.run, cpu, 1)
        for name, roof in roofs.limits.items()
    }
    rounds: Rounds = time_variants(samples, seconds=seconds)
    return {name: roof.work / float(rounds.seconds(name)) for name, roof in roofs.limits.items()}


@functools.cache
def _library() -> ctypes.CDLL | None:
    """Return the compiled `roof.cpp`, or None without a compiler."""
    command = (compiler() or sysconfig.get_config_var("CXX") or "g++").split()
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "roof.so"
        flags = ["-O3", "-march=native", "-shared", "-fPIC"]
        try:
            subprocess.run(
                [*command, *flags, str(_SOURCE), "-o", str(target)],
                check=True,
                capture_output=True,
            )
            library = ctypes.CDLL(str(target))
        except (OSError, subprocess.CalledProcessError):
            return None
    for kind in KINDS:
        getattr(library, f"roof_{kind}").restype = ctypes.c_double
    return library


def _compiled_roofs(library: ctypes.CDLL) -> Roofs:
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads)
    stream = torch.empty(_STREAM_BYTES // 8, dtype=torch.int64)
    library.roof_use_huge_pages(ctypes.c_void_p(stream.data_ptr()), ctypes.c_size_t(stream.nbytes))
    stream.fill_(1)
    share = _STREAM_BYTES // threads // 64 * 64
    read_sinks, sinks = (ctypes.c_uint64 * threads)(), (ctypes.c_double * threads)()

    def read(i: int) -> None:
        address = ctypes.c_void_p(stream.data_ptr() + i * share)
        library.roof_read(address, ctypes.c_size_t(share), ctypes.byref(read_sinks, 8 * i))

    def multiply(kind: str, i: int) -> None:
        function = getattr(library, f"roof_{kind}")
        function(ctypes.c_int64(_STEPS), ctypes.byref(sinks, 8 * i))

    def on_all_threads(call: Callable[[int], object]) -> Callable[[], object]:
        return lambda: list(pool.map(call, range(threads)))  # ctypes lets them run at once

    limits = {MEMORY: Roof(on_all_threads(read), float(share * threads))}
    for kind in KINDS:
        flops = getattr(library, f"roof_{kind}")(ctypes.c_int64(1), sinks) * _STEPS * threads
        if flops:
            limits[kind] = Roof(on_all_threads(functools.partial(multiply, kind)), flops)
    return Roofs("multiply-adds and reads, compiled for this processor", _with_bf16(limits))


def _with_bf16(limits: dict[str, Roof]) -> dict[str, Roof]:
    """Return the limits, bf16's taken by fp32 where the processor's own is not faster."""

    def speed(kind: str) -> float:
        roof = limits[kind]
        seconds = [warm_sample(roof.run, torch.device("cpu"), 1) for _ in range(3)]
        return roof.work / min(seconds)

    if "bf16" not in limits or speed("bf16") < speed("fp32"):
        limits["bf16"] = limits["fp32"]
    return limits


def _torch_roofs(device: torch.device, num_bytes: int, sizes: Mapping[str, int]) -> Roofs:
    source = torch.ones(num_bytes // 8, dtype=torch.int64, device=device)
    if device.type == "cpu":
        name, memory = "torch's sum and products", Roof(source.sum, float(num_bytes))
    else:
        target = torch.empty_like(source)
        copy = functools.partial(target.copy_, source)
        name, memory = "torch's copy and products", Roof(copy, 2.0 * num_bytes)
    limits = {MEMORY: memory}
    for kind, dtype in _DTYPES.items():
        size = sizes[kind]
        matrix = torch.randn(size, size, device=device).to(dtype)
        limits[kind] = Roof(functools.partial(torch.matmul, matrix, matrix), 2.0 * size**3)
    return Roofs(name, limits)
