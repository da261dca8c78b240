"""The oldest torch that pyproject.toml allows: the sources ask for nothing that came later.

Torch's headers hide what is newer than TORCH_TARGET_VERSION. So the newest headers tell what the
oldest torch must have; `make test-oldest` runs with that torch itself.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SOURCES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "csrc").rglob("*.cpp")
    if path.parent.name in ("csrc", "cpu", "cuda")
)

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


def oldest(name: str, requirements: list[str]) -> Version:
    """Return the lower bound of a package."""
    (found,) = (item for item in map(Requirement, requirements) if item.name == name)
    (bound,) = (item.version for item in found.specifier if item.operator == ">=")
    return Version(bound)


TORCH = oldest("torch", PROJECT["project"]["dependencies"])


def compiler(target: Version) -> list[str]:
    """Return g++ with the headers of this torch, as those of an older one."""
    import pybind11
    from torch.utils import cpp_extension

    number = f"-DTORCH_TARGET_VERSION=0x{target.major:02x}{target.minor:02x}000000000000"
    folders = [pybind11.get_include(), *cpp_extension.include_paths()]
    folders.append(sysconfig.get_paths()["include"])
    includes = [part for folder in folders for part in ("-isystem", folder)]
    return ["g++", "-std=c++17", number, "-DGHOSTED_FAST_CUDA", *includes]


def compiles(source: str, target: Version) -> str:
    """Return what g++ says of a source; empty where it compiles."""
    names = ("BUILD_KIND", "CUDA_BUILD", "COMPILER", "TORCH_VERSION", "COMPILED_PATHS")
    facts = [f'-DGHOSTED_FAST_{name}=""' for name in names]
    command = [*compiler(target), *facts, "-fsyntax-only", source]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stderr if done.returncode else ""


def test_the_ranges_agree() -> None:
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert f'OLDEST_TORCH = "{TORCH}"' in setup
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    triton = oldest("triton", PROJECT["project"]["optional-dependencies"]["triton"])
    transformers = oldest("transformers", PROJECT["project"]["dependencies"])
    found = dict(re.findall(r"^OLDEST_(\w+) \?= ([\d.]+)$", makefile, re.MULTILINE))
    assert found == {
        "TORCH": str(TORCH),
        "TRITON": str(triton),
        "TRANSFORMERS": str(transformers),
    }


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("source", SOURCES)
def test_sources_compile_for_the_oldest_torch(source: str) -> None:
    assert compiles(source, TORCH) == ""


@pytest.mark.slow
@needs_compiler
def test_the_bound_is_no_higher_than_it_must_be() -> None:
    before = Version(f"{TORCH.major}.{TORCH.minor - 1}")
    assert "const_data_ptr" in compiles("csrc/cuda/operators.cpp", before)


@pytest.mark.slow
@needs_compiler
def test_the_stream_is_a_call_of_torch_from_the_first_that_has_it(tmp_path: Path) -> None:
    header = (ROOT / "csrc" / "cuda" / "current_stream.h").read_text(encoding="utf-8")
    (first,) = {Version(".".join(it)) for it in re.findall(r"TORCH_VERSION_(\d+)_(\d+)_0", header)}
    if Version(version("torch")) < first:
        pytest.skip(f"the headers of torch {version('torch')} do not know the call")
    asking = tmp_path / "asking.cpp"
    asking.write_text(
        "#include <torch/csrc/stable/accelerator.h>\n"
        "void* stream() { return torch::stable::accelerator::getCurrentStream(0).nativeHandle(); }"
    )
    assert compiles(str(asking), first) == ""
    before = Version(f"{first.major}.{first.minor - 1}")
    assert "nativeHandle" in compiles(str(asking), before)


ASK = """
import ctypes, sys
if sys.argv[2]:
    ctypes.CDLL(sys.argv[2])
library = ctypes.CDLL(sys.argv[1])
library.stream_on.restype = ctypes.c_void_p
print(library.stream_on(3))
"""


@pytest.mark.slow
@needs_compiler
def test_before_torch_2_13_the_stream_is_found_by_its_name(tmp_path: Path) -> None:
    from torch.utils import cpp_extension

    stand_in = tmp_path / "stand_in.cpp"
    stand_in.write_text(
        'extern "C" int aoti_torch_get_current_cuda_stream(int device, void** stream) {\n'
        "  *stream = reinterpret_cast<void*>(4096l + device);\n  return 0;\n}\n"
    )
    cuda, asking = tmp_path / "libtorch_cuda.so", tmp_path / "asking.so"
    shared = ["-shared", "-fPIC", "-o"]
    subprocess.run(
        ["g++", *shared, str(cuda), str(stand_in), "-Wl,-soname,libtorch_cuda.so"], check=True
    )
    folders = cpp_extension.library_paths()
    links = [flag for folder in folders for flag in (f"-L{folder}", f"-Wl,-rpath,{folder}")]
    source = ROOT / "tests" / "cuda_emulation" / "current_stream.cpp"
    command = [*compiler(TORCH), f"-I{ROOT / 'csrc' / 'cuda'}", *shared, str(asking), str(source)]
    subprocess.run([*command, *links, "-ltorch_cpu", "-ltorch", "-lc10"], check=True)

    def ask(library: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", ASK, str(asking), library],
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout

    assert ask(str(cuda)).strip() == "4099"
    assert "expected aoti_torch_get_current_cuda_stream in libtorch_cuda.so, got none" in ask("")
