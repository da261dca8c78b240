"""Compiles csrc/cuda for an architecture, and reads the machine code."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from support.cuda_toolchain import find_nvcc, find_tool

ROOT = Path(__file__).parent.parent.parent
_INSTRUCTION = re.compile(
    r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE
)
_SECTION = re.compile(r"^//-+ \.text\.(\S+) -+$", re.MULTILINE)
_USAGE = re.compile(r"Function (\S+):\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class Kernel:
    """The machine code of one kernel."""

    registers: int
    stack_bytes: int
    shared_bytes: int  # static; from sm_90 on 1024 of them are the system's
    local_bytes: int
    instructions: Counter[str]
    listing: str

    def count(self, pattern: str) -> int:
        """Return the number of instructions whose whole name matches."""
        return sum(n for name, n in self.instructions.items() if re.fullmatch(pattern, name))

    def names(self, pattern: str) -> set[str]:
        """Return the names of the instructions that match."""
        return {name for name in self.instructions if re.fullmatch(pattern, name)}

    def operands(self, name: str) -> list[str]:
        """Return what follows the name of the instructions whose name begins so."""
        return re.findall(rf"\b{name}\S*\s+(.*?)\s*;", self.listing)


def compile_kernels(architecture: int, folder: Path) -> dict[str, Kernel]:
    """Return the kernels of csrc/cuda/gram_update.cu by their mangled names.

    Raises:
        AssertionError: It does not compile; says why.
    """
    cubin = folder / f"gram_update_{architecture}.cubin"
    source = ROOT / "csrc" / "cuda" / "gram_update.cu"
    flags = ["-std=c++17", "-O3", "-cubin", f"-arch=sm_{architecture}", "-Werror", "all-warnings"]
    _run(find_nvcc(), *flags, str(source), "-o", str(cubin))
    usage = {name: values for name, *values in _USAGE.findall(_dump_usage(cubin))}
    listing = _run(find_tool("nvdisasm"), "-c", str(cubin))
    starts = [*_SECTION.finditer(listing)]
    kernels = {}
    for start, end in zip(starts, [*starts[1:], None], strict=True):
        text = listing[start.end() : end.start() if end else None]
        registers, stack, shared, local = map(int, usage[start[1]])
        instructions = Counter(_INSTRUCTION.findall(text))
        kernels[start[1]] = Kernel(registers, stack, shared, local, instructions, text)
    return kernels


def _dump_usage(cubin: Path) -> str:
    return _run(find_tool("cuobjdump"), "-res-usage", str(cubin))


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
