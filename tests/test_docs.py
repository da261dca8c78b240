"""Pages that a program prints are what it prints now."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_gpu_page_is_what_its_program_prints() -> None:
    program = ROOT / "benchmarks" / "gpu_roofline.py"
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, check=True)
    assert (ROOT / "docs" / "gpu-roofline.md").read_text(encoding="utf-8") == done.stdout
