"""Compiles the launches of an operator for GPUs that are not here, and reads their machine code.

The signature of a kernel (types, alignments, constants) is taken from a real call of the operator,
so what is read is what a GPU would run. The disassemblers are those of the triton wheel.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

_BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
}
_OPCODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)


@dataclass(frozen=True)
class Launch:
    """A kernel and the arguments it would have been launched with."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)


@dataclass(frozen=True)
class MachineCode:
    """What a cubin says of itself.

    Attributes:
        registers: Per thread.
        stack: Bytes per thread.
        shared: Bytes per program, static and dynamic.
        opcodes: How often each machine instruction stands in the code.
    """

    registers: int
    stack: int
    shared: int
    opcodes: Counter[str]

    def count(self, pattern: str) -> int:
        """Return the number of instructions whose name matches from its start."""
        return sum(n for name, n in self.opcodes.items() if re.match(pattern, name))

    @property
    def spills(self) -> int:
        return self.count(r"(LDL|STL)\b")

    def narrow_accesses(self) -> dict[str, int]:
        """Return the global accesses, cp.async included, of 8 or 16 bits."""
        pattern = re.compile(r"(LDG|STG|LDGSTS)\..*\b(U8|S8|U16|S16)\b")
        return {name: n for name, n in self.opcodes.items() if pattern.match(name)}


@contextmanager
def captured() -> Iterator[list[Launch]]:
    """Record the launches inside in place of running them."""
    launches: list[Launch] = []
    original = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names = [parameter.name for parameter in self.params]
        arguments = dict(zip(names, args, strict=False))
        arguments.update((name, value) for name, value in kwargs.items() if name in names)
        options = {name: value for name, value in kwargs.items() if name not in names}
        assert set(options) <= {*_OPTIONS, "debug"}, options
        options.pop("debug", None)
        launches.append(Launch(self, tuple(grid), arguments, options))

    JITFunction.run = run
    try:
        yield launches
    finally:
        JITFunction.run = original


def launches_of(call: Callable[[], object]) -> list[Launch]:
    """Return what a call of an operator launches."""
    with captured() as launches:
        call()
    return launches


def compiled(launch: Launch, capability: int) -> MachineCode:
    """Compile a launch for a compute capability and read the result."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for place, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constants[(place,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            if value.data_ptr() % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    source = ASTSource(launch.kernel, signature, constexprs=constants, attrs=attributes)
    done = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    return _read(done.asm["cubin"], done.metadata.shared)


def _read(cubin: bytes, dynamic_shared: int) -> MachineCode:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _output("cuobjdump", "-res-usage", str(path))
        text = _output("nvdisasm", "-c", str(path))

    def largest(key: str) -> int:
        return max(int(value) for value in re.findall(rf"{key}:(\d+)", usage))

    opcodes = Counter(match.group(1) for match in _OPCODE.finditer(text))
    assert opcodes, "the disassembler printed no instruction"
    return MachineCode(
        largest("REG"), largest("STACK"), largest("SHARED") + dynamic_shared, opcodes
    )


def _output(program: str, *arguments: str) -> str:
    done = subprocess.run(
        [str(_BINARIES / program), *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout
