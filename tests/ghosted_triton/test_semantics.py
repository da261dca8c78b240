"""Bounds and races: what Triton's front end makes of the kernels, executed on the CPU.

Every access is checked against its tensor's real size, and every element against other programs
that touch it. Products are summed one by one here, another order than the interpreter's.
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("ttsem", reason="ttsem is absent: make setup installs it")

from ghosted_triton.proofs import run_checks

pytestmark = pytest.mark.slow

SANITIZER = ("ttsem.sanitize",)


@pytest.mark.parametrize(("name", "least"), [("ghost_apply", 46), ("gram_update", 60)])
def test_no_access_out_of_bounds_and_no_race(name: str, least: int) -> None:
    chosen = ("-m", "not interpreter", f"checks_{name}.py")
    assert run_checks("semantics", *chosen, launcher=SANITIZER) >= least


def test_it_would_be_found(tmp_path: Path) -> None:
    """A kernel that writes one element too many, and one whose programs write the same."""
    for body, finding in (("offsets <= n", "past the end"), ("offsets < n", "race")):
        stride = 8 if finding == "race" else 16
        file = tmp_path / f"test_{finding.split()[0]}.py"
        file.write_text(
            "import torch, triton, triton.language as tl\n"
            "@triton.jit\n"
            "def kernel(x, n, STRIDE: tl.constexpr):\n"
            "    offsets = tl.program_id(0) * STRIDE + tl.arange(0, 16)\n"
            f"    tl.store(x + offsets, tl.program_id(0), mask={body})\n"
            "def test_it():\n"
            f"    kernel[(2,)](torch.zeros(24, dtype=torch.int32), 24, {stride})\n"
        )
        with pytest.raises(AssertionError, match=finding):
            run_checks("semantics", str(file), launcher=SANITIZER)
