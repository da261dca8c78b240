"""Values: the kernels in Triton's interpreter, with bf16 repaired and truncating adders."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from ghosted_triton.proofs import run_checks

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("name", "least"), [("ghost_apply", 85), ("gram_update", 100)])
def test_values(name: str, least: int) -> None:
    assert run_checks("interpreter", f"checks_{name}.py") >= least


def test_traffic() -> None:
    assert run_checks("interpreter", "checks_traffic.py") >= 5


def test_dispatch() -> None:
    assert run_checks("interpreter", "checks_dispatch.py") >= 17
