"""Compiles for 64-bit Arm and runs the programs: on this machine, or on a processor in software."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from support.cpu_paths import ARM_PATHS, ROOT, import_setup

CPU = ROOT / "csrc" / "cpu"
KERNELS = CPU / "kernels"
IS_ARM = platform.machine().lower() in ("aarch64", "arm64")
COMPILER = os.environ.get("CXX", "g++") if IS_ARM else "aarch64-linux-gnu-g++"
OBJDUMP = "objdump" if IS_ARM else "aarch64-linux-gnu-objdump"
QEMU = "qemu-aarch64"
# Where Debian's cross compiler has its libraries.
SYSROOT = "/usr/aarch64-linux-gnu"
PATHS = (*ARM_PATHS, "portable")


def missing_tools() -> str:
    """Return why nothing can be compiled for Arm and run here; empty if it can."""
    for tool in (COMPILER.split()[0], OBJDUMP, QEMU):
        if shutil.which(tool) is None:
            return f"no {tool}; apt-get install g++-aarch64-linux-gnu qemu-user brings it"
    return ""


def flags_of(path: str) -> list[str]:
    """Return the flags with which setup.py compiles a path on Arm."""
    setup = import_setup()
    return [*setup.FLAGS, "-DGHOSTED_FAST_ARM=1", *setup.ARM_PATHS.get(path, [])]


def build(name: str, sources: Sequence[Path], flags: Sequence[str]) -> Path:
    """Return what is compiled of sources, made once for the same files and flags.

    Raises:
        AssertionError: It does not compile; says why.
    """
    digest = hashlib.sha256(repr((COMPILER, list(flags), [str(path) for path in sources])).encode())
    tests = ROOT / "tests"
    used = {*sources, *CPU.parent.glob("*.h"), *CPU.rglob("*.h"), *KERNELS.glob("*.cpp")}
    used |= {*(tests / "sanitizers").glob("*.h"), *(tests / "arm_emulation").glob("*.h")}
    for path in sorted(used):
        digest.update(path.read_bytes())
    made = ROOT / "build" / "arm_emulation" / digest.hexdigest()[:16] / name
    if made.exists():
        return made
    made.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=made.parent) as folder:
        command = [*COMPILER.split(), *flags, *map(str, sources), "-o", f"{folder}/{name}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{name} does not compile: {done.stderr}"
        (Path(folder) / name).replace(made)
    return made


def object_of(source: Path) -> Path:
    """Return the object of a source that does not know torch, compiled as setup.py does.

    Programs are linked of these, and their machine code is read: each is compiled once.
    """
    flags = [*flags_of(source.stem.removeprefix("path_")), f"-I{CPU}", "-c"]
    return build(f"{source.stem}.o", [source], flags)


def run(program: Path, processor: str) -> subprocess.CompletedProcess[str]:
    """Run a program on a processor that qemu knows."""
    command = [QEMU, "-cpu", processor, *([] if IS_ARM else ["-L", SYSROOT]), str(program)]
    return subprocess.run(command, capture_output=True, text=True, check=False)
