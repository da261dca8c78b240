"""What is built again after a change, and what building says where it cannot."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


def configure(**environment: str) -> subprocess.CompletedProcess[str]:
    """Run setup.py as far as it chooses what to build."""
    return subprocess.run(
        [sys.executable, "setup.py", "--name"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("cpu", "install a C++17 compiler"),
        ("cuda", "install a C++17 compiler"),
        ("gpu", "expected auto, cpu, cuda or none"),
    ],
)
def test_refusals(choice: str, message: str) -> None:
    done = configure(GHOSTED_FAST_BUILD=choice, CXX="/nowhere/c++")
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


NO_NVCC = {"PATH": "/nowhere", "CUDACXX": "", "CUDA_HOME": "", "CUDA_PATH": ""}


@pytest.mark.skipif(
    any([*(Path(folder) / "nvidia").glob("cu*/bin/nvcc")] for folder in sys.path),
    reason="nvcc is among the packages of this Python",
)
def test_cuda_without_nvcc_says_where_it_looked() -> None:
    compiler = shutil.which("g++") or shutil.which("c++") or ""
    done = configure(GHOSTED_FAST_BUILD="cuda", CXX=compiler, **NO_NVCC)
    assert done.returncode != 0
    assert "no nvcc in $CUDACXX, $CUDA_HOME, $PATH" in done.stderr
    assert "pip install nvidia-cuda-nvcc" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_nvcc_that_is_named_must_be_there() -> None:
    done = configure(GHOSTED_FAST_BUILD="cuda", CUDACXX="/nowhere/nvcc")
    assert done.returncode != 0
    assert "CUDACXX=/nowhere/nvcc cannot be run" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("architectures", ["75", "sm_90", ""])
def test_architectures_are_checked(architectures: str) -> None:
    true = shutil.which("true") or ""
    done = configure(
        GHOSTED_FAST_BUILD="cuda", CUDACXX=true, GHOSTED_FAST_CUDA_ARCHITECTURES=architectures
    )
    assert done.returncode != 0
    assert "expected numbers >= 80 such as 80,90,100" in done.stderr


def test_auto_does_without_a_compiler_and_says_so() -> None:
    done = configure(GHOSTED_FAST_BUILD="auto", CXX="/nowhere/c++")
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler" in done.stderr and "plain torch" in done.stderr


def test_none_needs_no_compiler() -> None:
    done = configure(GHOSTED_FAST_BUILD="none", CXX="/nowhere/c++")
    assert done.returncode == 0, done.stderr
    assert "compiler" not in done.stderr


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with sources that compile in no time."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    sources = {"bindings": "", "cpu/one": '#include "one.h"\n', "cpu/other": ""}
    sources |= {
        path.relative_to(ROOT / "csrc").with_suffix("").as_posix(): ""
        for path in (ROOT / "csrc" / "cpu").rglob("path_*.cpp")
    }
    for name, text in sources.items():
        source = tmp_path / "csrc" / f"{name}.cpp"
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_text(f"{text}int {source.stem}();\n")
    (tmp_path / "csrc" / "cpu" / "one.h").write_text("\n")
    return tmp_path


def compiled(checkout: Path, **environment: str) -> list[str]:
    """Build, and return the names of the sources that were compiled."""
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", "lib"],
        cwd=checkout,
        env={**os.environ, "GHOSTED_FAST_BUILD": "cpu", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [*(checkout / "lib" / "ghosted_fast").glob("_C.*")]
    return sorted(re.findall(r"C\+\+ .*?(\w+)\.cpp", done.stdout))


needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler"
)


@needs_compiler
def test_only_what_changed_is_compiled_again(checkout: Path) -> None:
    first = compiled(checkout)
    assert {"bindings", "one", "other", "path_portable"} <= set(first)
    assert compiled(checkout) == []
    (checkout / "csrc" / "cpu" / "one.h").write_text("// changed\n")
    assert compiled(checkout) == ["one"]
    (checkout / "csrc" / "bindings.cpp").write_text("int changed();\n")
    assert compiled(checkout) == ["bindings"]


@needs_compiler
def test_every_command_is_written_down_and_each_path_has_its_flags(checkout: Path) -> None:
    first = compiled(checkout, MAX_JOBS="1")
    text = (checkout / "build" / "compile_commands.json").read_text()
    commands = {Path(entry["file"]).stem: entry["command"] for entry in json.loads(text)}
    assert sorted(commands) == first
    wide = {name for name in commands if "_avx512" in name or name == "path_amx"}
    assert all(
        ("-mavx2" in commands[name]) == ("_avx" in name or name in wide) for name in commands
    )
    assert all(("-mavx512f" in commands[name]) == (name in wide) for name in commands)


@needs_compiler
def test_a_source_that_does_not_compile_is_named(checkout: Path) -> None:
    (checkout / "csrc" / "cpu" / "one.h").write_text("#error no such thing\n")
    with pytest.raises(AssertionError) as failed:
        compiled(checkout)
    assert "one.h:1:2: error: #error no such thing" in str(failed.value)
    assert "ninja could not build ghosted_fast._C" in str(failed.value)
    assert "Traceback" not in str(failed.value)
