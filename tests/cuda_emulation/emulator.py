"""Compiles csrc/cuda for the host, under the sanitizers, and runs it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent.parent
HERE = Path(__file__).parent
DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
FLAGS = ["-x", "c++", "-std=c++17", "-O2", "-g1", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
INCLUDES = ["-DGHOSTED_FAST_EMULATION", f"-I{ROOT / 'csrc' / 'cuda'}", f"-I{HERE}"]
NO_TOKEN = -1
NAN_BYTE, FINITE_BYTE = 0xFF, 0x3F
# As sm_80 was measured to add, and as later devices may: all 16 products of an instruction at once.
AMPERE, LATER = (8, 0), (16, 25)


def unavailable() -> str:
    """Return why the emulation cannot run here; empty if it can."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return f"the emulation's fibers are written for x86-64, this is {platform.machine()}"
    return "" if shutil.which("g++") else "the emulation needs g++"


def _compile(source: str, output: str, flags: list[str]) -> Path:
    """Compile a file of this folder, once for the same sources, and return what was made."""
    csrc = ROOT / "csrc"
    files = [*csrc.glob("*.h"), *(csrc / "cuda").glob("*")]
    digest = hashlib.sha256()
    for path in sorted([*files, *HERE.glob("*.h"), HERE / source, Path(__file__)]):
        digest.update(path.read_bytes())
    made = ROOT / "build" / "cuda_emulation" / digest.hexdigest()[:16] / output
    if made.exists():
        return made
    made.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=made.parent) as folder:
        command = ["g++", *FLAGS, *INCLUDES, str(HERE / source), "-o", f"{folder}/{output}", *flags]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{source} does not compile: {done.stderr}"
        (Path(folder) / output).replace(made)
    return made


def build_driver() -> Path:
    """Return the compiled driver.cpp, with the sanitizers."""
    return _compile("driver.cpp", "driver", SANITIZERS)


def build_binding() -> Path:
    """Return the compiled binding.cpp, a library of operators."""
    from torch.utils import cpp_extension

    flags = ["-shared", "-fPIC", "-fvisibility-inlines-hidden", "-Wl,--no-as-needed", "-ltorch_cpu"]
    flags += [part for folder in cpp_extension.include_paths() for part in ("-isystem", folder)]
    flags += [f"-L{folder}" for folder in cpp_extension.library_paths()]
    return _compile("binding.cpp", "binding.so", flags)


@dataclass
class Run:
    """What a run found and counted; see driver.cpp for the names."""

    counts: dict[str, int] = field(default_factory=dict)

    def __getattr__(self, name: str) -> int:
        try:
            return self.counts[name]
        except KeyError:
            raise AttributeError(name) from None


def _bytes_of(rows: Tensor) -> bytes:
    """Return the memory from the first element to the last, gaps between strided rows included."""
    size = 0
    if rows.numel():
        size = 1 + sum(
            (n - 1) * stride for n, stride in zip(rows.shape, rows.stride(), strict=True)
        )
    return rows.as_strided((size,), (1,)).contiguous().view(torch.uint8).numpy().tobytes()


def emulate(
    x: Tensor,
    y: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    norm_eps: float | None = None,
    delta: bool = False,
    gram: Tensor | None = None,
    cross: Tensor | None = None,
    moments: Tensor | None = None,
    order: int = 1,
    captured: bool = False,
    garbage: int = NAN_BYTE,
    adder: tuple[int, int] = AMPERE,
) -> Run:
    """Run gram_update of csrc/cuda on the host. Arguments as for `ops.gram_update`, and:

    Args:
        order: Seed of the order in which the warps run.
        captured: Whether to run as under graph capture, where nothing is read back or loaded.
        garbage: What every byte of scratch and shared memory is before it is written.
        adder: Products that are added at once, and bits below the largest that each keeps or 0.

    Raises:
        AssertionError: The emulation or a sanitizer found something; says what.
    """
    numbers: dict[str, float] = {
        "num_tokens": x.shape[0],
        "hidden_size": x.shape[1],
        "num_outputs": 0 if y is None else y.shape[1],
        "norm_eps": norm_eps or 0.0,
        "delta": int(delta),
        "order": order,
        "captured": int(captured),
        "garbage": garbage,
        "adder_terms": adder[0],
        "adder_bits": adder[1],
    }
    operands = {"x": x, "y": y, "weight": weight, "gram": gram, "cross": cross, "moments": moments}
    with tempfile.TemporaryDirectory() as folder:
        for name, tensor in operands.items():
            if tensor is None:
                continue
            (Path(folder) / name).write_bytes(_bytes_of(tensor))
            if name in ("x", "y"):
                numbers[f"{name}_dtype"] = DTYPES[tensor.dtype]
                numbers[f"{name}_stride"] = tensor.stride(0)
        command = [str(build_driver()), folder, *(f"{k}={v!r}" for k, v in numbers.items())]
        environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0"}
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, check=False, timeout=300
        )
        assert done.returncode == 0, done.stderr
        for name, tensor in (("gram", gram), ("cross", cross), ("moments", moments)):
            if tensor is not None and tensor.numel():
                data = bytearray((Path(folder) / name).read_bytes())
                tensor.copy_(torch.frombuffer(data, dtype=tensor.dtype).view(tensor.shape))
    run = Run(json.loads(done.stdout))
    assert run.counts.get("error", 0) == 0, f"CUDA's error {run.error}"
    return run
