"""Which rows the compiled CUDA kernel does not serve, and who may ask for it by name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ghosted_fast.ops import backend_status, compiled, ghost_apply
from ghosted_fast.ops.backends import kernels_absence_reason, native, triton
from ghosted_fast.ops.operands import GhostOperands, GramOperands

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
    assert reason in native.unserved_rows(x, y)
    assert bool(native.unserved_rows(x, y)) == bool(reason)


class OnCuda(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    is_cpu = property(lambda self: False)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    device = property(lambda self: torch.device("cuda"))  # type: ignore[assignment]


@pytest.mark.parametrize("with_cuda", [False, True])
def test_only_a_cuda_build_serves_cuda_tensors(
    monkeypatch: pytest.MonkeyPatch, with_cuda: bool
) -> None:
    monkeypatch.setattr(compiled, "serves_cuda", lambda: with_cuda)
    x = torch.zeros(9, 16).as_subclass(OnCuda)
    elsewhere = "expected tensors on the CPU, got cuda"
    assert native.refusal("gram_update", GramOperands(x)) == ("" if with_cuda else elsewhere)
    assert native.refusal("ghost_apply", GhostOperands(x, x)) == elsewhere
    narrow = torch.zeros(9, 20).as_subclass(OnCuda)
    reason = native.refusal("gram_update", GramOperands(narrow))
    assert ("multiple of 8 columns" in reason) == with_cuda


@pytest.mark.parametrize("rows", [1, 512])
def test_fake_tensors_on_cuda_need_neither_kernel_nor_gpu(rows: int) -> None:
    """As torch.compile and torch.export have them."""
    with FakeTensorMode():
        x = torch.empty(2, rows, 2048, dtype=BF16, device="cuda")
        y = ghost_apply(x, torch.empty(2048, 2048, dtype=BF16, device="cuda"))
    assert (y.device.type, y.dtype, y.shape) == ("cuda", BF16, x.shape)


def test_torch_itself_solves_on_cuda_and_says_nothing() -> None:
    assert kernels_absence_reason("ghost_solve", "cuda") == ""
    assert "no compiled kernels for xpu" in kernels_absence_reason("ghost_solve", "xpu")
    assert kernels_absence_reason("gram_update", "cuda") == triton.absence_reason()


@pytest.mark.skipif(compiled.extension() is None, reason="the extension is absent")
def test_the_status_of_a_cuda_build_names_what_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "serves_cuda", lambda: True)
    (text,) = (text for name, _, text in backend_status() if name == "native")
    assert "CUDA C++ for gram_update" in text
