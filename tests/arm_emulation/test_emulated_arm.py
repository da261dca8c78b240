"""The kernels for Arm, as the cross compiler makes them with setup.py's flags, under qemu.

`tests/sanitizers/kernels.cpp` compares exact numbers of every dtype, `driver.cpp` random ones: with
fp64, on one and three threads, and in memory that ends at a page that nobody may touch.
"""

from __future__ import annotations

import subprocess
import sysconfig
from pathlib import Path

import pybind11
import pytest
from support.arm_toolchain import (
    CPU,
    KERNELS,
    OBJDUMP,
    PATHS,
    build,
    flags_of,
    missing_tools,
    object_of,
    run,
)
from support.cpu_paths import ROOT, TABLES
from torch.utils import cpp_extension

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing_tools()), reason=missing_tools()),
]
HERE = Path(__file__).parent
SANITIZERS = ROOT / "tests" / "sanitizers"
INCLUDES = [f"-I{CPU}", f"-I{SANITIZERS}"]
# A path, and a processor: "max" has all that qemu knows, Cortex-A72 nothing beyond Armv8.0.
RUNS = [("neonbf16", "max"), ("neon", "cortex-a72"), ("portable", "cortex-a72")]
GUARDS = [HERE / "guarded_memory.cpp", CPU / "token_order.cpp"]


def output_of(program: Path, processor: str) -> str:
    done = run(program, processor)
    assert done.returncode == 0, f"{done.returncode}: {done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.mark.parametrize(("path", "processor"), RUNS)
def test_exact_numbers_of_every_dtype(path: str, processor: str) -> None:
    kernels, order = KERNELS / f"path_{path}.cpp", CPU / "token_order.cpp"
    sources = [SANITIZERS / "kernels.cpp", HERE / "guarded_memory.cpp"]
    sources += [object_of(kernels), object_of(order)]
    flags = [*flags_of(path), *INCLUDES, f"-DPATH_TABLE={TABLES[path]}"]
    program = build(f"kernels_{path}", sources, flags)
    assert output_of(program, processor) == f"{path}: 0 failures\n"


@pytest.mark.parametrize(("path", "processor"), RUNS)
def test_rounding_and_threads(path: str, processor: str) -> None:
    flags = [*flags_of(path), *INCLUDES, f"-DPATH_TABLE={TABLES[path]}"]
    flags += [f'-DPATH_FILE="kernels/path_{path}.cpp"']
    program = build(f"driver_{path}", [HERE / "driver.cpp", *GUARDS], flags)
    lines = output_of(program, processor).splitlines()
    assert lines[-1] == "0 failures"
    assert {line.split()[0] for line in lines[:-1]} == {"gram", "apply", "solve"}


def objects() -> list[Path]:
    """The files of the extension that do not know torch, compiled as setup.py does."""
    sources = [CPU / "dispatch.cpp", CPU / "arm_support.cpp", CPU / "amx_support.cpp"]
    sources += [CPU / "token_order.cpp", *(KERNELS / f"path_{path}.cpp" for path in PATHS)]
    return [object_of(source) for source in sources]


@pytest.mark.parametrize(
    ("processor", "paths", "problem"),
    [
        ("max", "neonbf16 neon portable", ""),
        ("cortex-a72", "neon portable", "has no bf16 products (FEAT_BF16)"),
        ("neoverse-n1", "neon portable", "has no bf16 products (FEAT_BF16)"),
    ],
)
def test_the_best_path_is_chosen(processor: str, paths: str, problem: str) -> None:
    flags = [*flags_of("portable"), *INCLUDES]
    program = build("choice", [HERE / "choice.cpp", *objects()], flags)
    named, used, why = output_of(program, processor).rstrip("\n").split(" | ")
    assert (named, used) == (paths, paths.split(maxsplit=1)[0])
    assert why.endswith(problem) and bool(why) == bool(problem)


def test_a_path_with_more_than_the_processor_has_would_end_it() -> None:
    """So the runs above prove that "neon" uses nothing beyond Armv8.0."""
    flags = [*flags_of("neonbf16"), *INCLUDES, f"-DPATH_TABLE={TABLES['neonbf16']}"]
    flags += ['-DPATH_FILE="kernels/path_neonbf16.cpp"']
    program = build("driver_neonbf16", [HERE / "driver.cpp", *GUARDS], flags)
    assert run(program, "cortex-a72").returncode != 0


@pytest.mark.parametrize("source", sorted(CPU.glob("*.cpp")), ids=lambda path: path.stem)
def test_the_extension_compiles(source: Path) -> None:
    """With torch's headers, which are the same for all processors."""
    folders = [
        *cpp_extension.include_paths(),
        pybind11.get_include(),
        sysconfig.get_path("include"),
    ]
    flags = [*flags_of("portable"), "-Werror", *(f"-isystem{folder}" for folder in folders)]
    build(f"{source.stem}.o", [source], [*flags, "-c"])


def test_without_linux_nothing_of_linux_is_called() -> None:
    """As on macOS: what `__linux__` guards is gone, and the rest compiles."""
    for source in (CPU / "arm_support.cpp", CPU / "amx_support.cpp"):
        flags = [*flags_of("portable"), "-U__linux__", "-c"]
        made = build(f"other_{source.stem}.o", [source], flags)
        command = [OBJDUMP, "--syms", str(made)]
        symbols = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        assert "problem" in symbols
        assert not any(call in symbols for call in ("getauxval", "syscall", "madvise"))
