"""Runs checks in a process of their own, where a plugin has put an emulation in a GPU's place."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def run_checks(plugin: str, *arguments: str, launcher: tuple[str, ...] = ()) -> int:
    """Run pytest with a plugin of this folder; fail with its output if a check fails.

    Args:
        plugin: Name of the module that sets the emulation up.
        arguments: For pytest; files are taken from this folder.
        launcher: Modules that pytest is run under, for `python -m`.

    Returns:
        The number of checks that passed; none was skipped.
    """
    files = [str(HERE / part) if part.endswith(".py") else part for part in arguments]
    command = [sys.executable, "-m", *launcher, "pytest", "-x", "-p", f"ghosted_triton.{plugin}"]
    command += ["-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *files],
        capture_output=True,
        text=True,
        cwd=HERE.parents[1],
        env={**os.environ, "PYTHONPATH": str(HERE.parent)},
        check=False,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-8000:]
    summary = re.search(r"(\d+) passed", output)
    assert summary is not None and "skipped" not in output, output[-2000:]
    return int(summary[1])
