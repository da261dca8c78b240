"""Values: the kernels in Triton's interpreter, with bf16 repaired and truncating adders."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from proofs import run_checks


@pytest.mark.parametrize("name", ["ghost_apply", "gram_update"])
def test_values(name: str) -> None:
    assert run_checks("interpreter", f"checks_{name}.py") >= 100


def test_traffic() -> None:
    assert run_checks("interpreter", "checks_traffic.py") >= 6


def test_dispatch() -> None:
    assert run_checks("interpreter", "checks_dispatch.py") >= 5
