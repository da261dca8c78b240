"""What building says where it cannot build the extension."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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
