"""Which rows the compiled CUDA kernel does not serve, and who may ask for it by name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ghosted_fast import _native
from ghosted_fast.errors import BackendError
from ghosted_fast.ops._cuda import unserved_by_native

BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("x", "y", "reason"),
    [
        (torch.zeros(9, 16), None, ""),
        (torch.zeros(9, 16).to(BF16), torch.zeros(9, 24), ""),
        (torch.zeros(0, 16), torch.zeros(0, 16), ""),
        (torch.zeros(9, 40)[:, 8:24], None, ""),
        (torch.zeros(9, 20), None, "x with a multiple of 8 columns, got 20"),
        (torch.zeros(9, 16), torch.zeros(9, 12), "y with a multiple of 8 columns, got 12"),
        (torch.zeros(9, 40)[:, 1:17], None, "rows of x that start at multiples of 16 bytes"),
        (torch.zeros(9, 20).to(BF16)[:, :16], None, "rows of x that start at multiples of 16"),
    ],
)
def test_unserved_rows(x: Tensor, y: Tensor | None, reason: str) -> None:
    assert reason in unserved_by_native(x, y)
    assert bool(unserved_by_native(x, y)) == bool(reason)


@pytest.mark.skipif(_native.extension() is None, reason="the extension is absent")
@pytest.mark.parametrize("with_cuda", [False, True])
def test_only_a_cuda_build_serves_cuda_tensors(
    monkeypatch: pytest.MonkeyPatch, with_cuda: bool
) -> None:
    monkeypatch.setattr(_native, "serves_cuda", lambda: with_cuda)
    device = torch.device("cuda")
    if with_cuda:
        _native.require_backend("native", device, "gram_update")
    else:
        with pytest.raises(BackendError, match="expected tensors on the CPU, got cuda"):
            _native.require_backend("native", device, "gram_update")
    with pytest.raises(BackendError, match="expected tensors on the CPU, got cuda"):
        _native.require_backend("native", device, "ghost_apply")


@pytest.mark.skipif(_native.extension() is None, reason="the extension is absent")
def test_the_status_of_a_cuda_build_names_what_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "serves_cuda", lambda: True)
    (text,) = (text for name, _, text in _native.backend_status() if name == "native")
    assert "CUDA C++ for gram_update" in text
