"""What building says where it cannot build the extension."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


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
        ("cuda", "no CUDA kernels"),
        ("gpu", "expected auto, cpu, cuda or none"),
    ],
)
def test_refusals(choice: str, message: str) -> None:
    done = configure(GHOSTED_FAST_BUILD=choice, CXX="/nowhere/c++")
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_auto_does_without_a_compiler_and_says_so() -> None:
    done = configure(GHOSTED_FAST_BUILD="auto", CXX="/nowhere/c++")
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler" in done.stderr and "plain torch" in done.stderr


def test_none_needs_no_compiler() -> None:
    done = configure(GHOSTED_FAST_BUILD="none", CXX="/nowhere/c++")
    assert done.returncode == 0, done.stderr
    assert "compiler" not in done.stderr
