"""The choice of kernels for CUDA tensors, with a GPU pretended and the interpreter under it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import pytest
import torch

from ghosted_fast import _native
from ghosted_fast.errors import ArgumentError, BackendError
from ghosted_fast.ops import _cuda
from ghosted_fast.ops.reference import ghost_apply_expression, gram_update_reference
from ghosted_fast.testing import relative_rms

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.manual_seed(0)
    monkeypatch.setattr(_native, "triton_absence_reason", lambda: "")
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: contextlib.nullcontext())
    _cuda._warn_plain.cache_clear()
    yield


def test_served_shapes_run_on_triton() -> None:
    x, weight = torch.randn(3, 64).to(BF16), torch.randn(64, 64).to(BF16) / 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = _cuda.ghost_apply(x, weight, None, None, 1e-5, None, None)
        again, normed = _cuda.ghost_apply_rms_norm(
            x, weight, torch.ones(64, dtype=BF16), 1e-6, None, None, 1e-5, None, None, insist=True
        )
    assert torch.equal(y, again) and normed.shape == x.shape
    assert relative_rms(y, ghost_apply_expression(x, weight, norm_eps=1e-5)) <= 0.01


REFUSED = [
    (torch.randn(3, 64), torch.randn(64, 64), "expected x in bfloat16 or float16, got torch.flo"),
    (torch.randn(3, 96).to(BF16), torch.randn(96, 96).to(BF16), "multiple of 64, got 96"),
    (torch.randn(3, 64).to(BF16), torch.randn(64, 64).to(BF16).t(), "expected a contiguous weight"),
    (torch.randn(193).to(BF16)[1:].view(3, 64), torch.randn(64, 64).to(BF16), "multiples of 16"),
]


@pytest.mark.parametrize(("x", "weight", "reason"), REFUSED, ids=[r for *_, r in REFUSED])
def test_others_run_the_expression_with_one_warning_or_say_why_not(
    x: torch.Tensor, weight: torch.Tensor, reason: str
) -> None:
    arguments = (x, weight, None, None, None, None, None)
    with pytest.warns(RuntimeWarning, match=f"plain torch: .*{reason}") as seen:
        y, _ = _cuda.ghost_apply(*arguments), _cuda.ghost_apply(*arguments)
    assert len(seen) == 1
    assert torch.equal(y, ghost_apply_expression(x, weight))
    with pytest.raises(BackendError, match=f"backend 'triton': .*{reason}"):
        _cuda.ghost_apply(*arguments, insist=True)


def test_gram_update() -> None:
    for size, reason in ((32, ""), (33, "multiple of 16 elements")):
        x = torch.randn(9, size).to(BF16)
        gram, exact = torch.zeros(2, size, size, dtype=torch.float64)
        gram_update_reference(x, None, None, None, False, exact, None, None)
        arguments = (x, None, None, None, False, gram, None, None)
        if not reason:
            _cuda.gram_update(*arguments, insist=True)
        else:
            with pytest.warns(RuntimeWarning, match=reason):
                _cuda.gram_update(*arguments)
            with pytest.raises(BackendError, match=reason):
                _cuda.gram_update(*arguments, insist=True)
        assert relative_rms(gram, exact) <= 1e-6


def test_absent_triton_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "triton_absence_reason", lambda: "the package triton is not here")
    x, weight = torch.randn(3, 64).to(BF16), torch.randn(64, 64).to(BF16)
    with pytest.warns(RuntimeWarning, match="the package triton is not here"):
        _cuda.ghost_apply(x, weight, None, None, None, None, None)


def test_arguments_are_checked_first() -> None:
    with pytest.raises(ArgumentError, match="weight of shape"):
        _cuda.ghost_apply(torch.randn(3, 64), torch.randn(63, 64), *[None] * 5)
    with pytest.raises(TypeError, match="expected gram in torch"):
        _cuda.gram_update(torch.randn(3, 64), None, None, None, False, torch.eye(64), None, None)
