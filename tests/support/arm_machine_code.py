"""Reads the loops of an object file for 64-bit Arm."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from support.arm_toolchain import OBJDUMP

_FUNCTION = re.compile(r"^[0-9a-f]+ <(.+)>:$")
_INSTRUCTION = re.compile(r"^\s*([0-9a-f]+):\s+(\S+)\s*(.*)$")
_TARGET = re.compile(r"([0-9a-f]+) <")
_BRANCHES = re.compile(r"b|b\..+|cbn?z|tbn?z")


@dataclass(frozen=True)
class Instruction:
    """One line of the listing."""

    address: int
    name: str
    operands: str


@dataclass(frozen=True)
class Loop:
    """The instructions from a branch's target to the branch, without a loop inside."""

    function: str
    body: tuple[Instruction, ...]

    def count(self, name: str, operands: str = "") -> int:
        """Return the number of instructions of that name whose operands match from the start."""
        return sum(
            each.name == name and re.match(operands, each.operands) is not None
            for each in self.body
        )

    def vector_loads(self) -> int:
        """Return the number of vector registers that are loaded."""
        single = self.count("ldr", r"[qd]\d") + self.count("ldur", r"[qd]\d") + self.count("ld1r")
        return single + 2 * self.count("ldp", r"[qd]\d")

    def spills(self) -> list[str]:
        """Return the vectors that are kept on the stack for want of registers."""
        return [
            f"{each.name} {each.operands}"
            for each in self.body
            if re.match(r"[qdv]\d.*\[sp", each.operands)
        ]


def loops_of(made: Path) -> list[Loop]:
    """Return the innermost loops of an object file."""
    command = [OBJDUMP, "-d", "--no-show-raw-insn", str(made)]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: list[Loop] = []
    name, body = "", list[Instruction]()
    for line in [*listing.splitlines(), "0 <end>:"]:
        if start := _FUNCTION.match(line):
            found += _innermost(name, body)
            name, body = start[1], []
        elif instruction := _INSTRUCTION.match(line):
            body.append(Instruction(int(instruction[1], 16), instruction[2], instruction[3]))
    return found


def _innermost(function: str, body: list[Instruction]) -> list[Loop]:
    loops = []
    for end, instruction in enumerate(body):
        target = _TARGET.search(instruction.operands)
        if not _BRANCHES.fullmatch(instruction.name) or target is None:
            continue
        begin = (int(target[1], 16) - body[0].address) // 4
        if 0 <= begin <= end:
            loops.append((begin, end))
    return [
        Loop(function, tuple(body[begin : end + 1]))
        for begin, end in loops
        if not any(
            (begin, end) != other and begin <= other[0] and other[1] <= end for other in loops
        )
    ]
