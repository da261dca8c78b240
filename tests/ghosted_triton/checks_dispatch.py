"""The choice of kernels for CUDA tensors, with a GPU pretended and the interpreter under it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import pytest
import torch

from ghosted_fast.errors import ArgumentError, BackendError
from ghosted_fast.ops import _define
from ghosted_fast.ops.backends import insist, triton
from ghosted_fast.ops.operands import GhostOperands, GramOperands, SolveOperands
from ghosted_fast.ops.reference import ghost_apply_expression, gram_update_reference
from ghosted_fast.testing import relative_rms

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.manual_seed(0)
    monkeypatch.setattr(triton, "absence_reason", lambda: "")
    monkeypatch.setattr(triton, "_DEVICE_TYPE", "cpu")
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: contextlib.nullcontext())
    _define._warn_plain.cache_clear()
    yield


def apply_on_cuda(operands: GhostOperands) -> torch.Tensor:
    """What torch calls for tensors on a GPU."""
    return _define.run_on_cuda("ghost_apply", operands, ghost_apply_expression)


def update_on_cuda(operands: GramOperands) -> None:
    _define.run_on_cuda("gram_update", operands, gram_update_reference)


def test_served_shapes_run_on_triton() -> None:
    x, weight = torch.randn(3, 64).to(BF16), torch.randn(64, 64).to(BF16) / 8
    operands = GhostOperands(x, weight, norm_eps=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = apply_on_cuda(operands)
        again = insist("triton", "ghost_apply", operands)
    assert torch.equal(y, again)
    assert relative_rms(y, ghost_apply_expression(operands)) <= 0.01


def test_many_rows_of_a_plain_ghost_are_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where the products are the bound on paper: at 512 rows of 2048, not at 256."""
    from ghosted_fast.kernels import _tuning
    from ghosted_fast.kernels import ghost_apply as kernels

    for key, rows, others in ((90, 512, 256), (80, 256, 128), (100, 512, 256)):
        assert _tuning.is_bound_by_products(key, rows, 2048)
        assert not _tuning.is_bound_by_products(key, others, 2048)
    x, weight = torch.randn(2, 40, 64).to(BF16), torch.randn(64, 64).to(BF16) / 8
    products, launches, torchs = [], [], torch.addmm
    monkeypatch.setattr(
        torch, "addmm", lambda *args, **to: products.append(args) or torchs(*args, **to)
    )
    monkeypatch.setattr(triton, "run", lambda *args: launches.append(args) or x)
    apply_on_cuda(GhostOperands(x, weight))
    assert (len(products), len(launches)) == (0, 1)  # 80 rows
    asked: list[tuple[int, ...]] = []

    def always(table: int, num_tokens: int, hidden_size: int) -> bool:
        asked.append((table, num_tokens, hidden_size))
        return True

    monkeypatch.setattr(kernels, "is_bound_by_products", always)
    plain = GhostOperands(x, weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = apply_on_cuda(plain)
    assert (len(products), len(launches), asked) == (1, 1, [(90, 80, 64)])
    assert y.shape == x.shape and relative_rms(y, ghost_apply_expression(plain)) <= 0.01
    integer, scale = torch.ones(64, 64, dtype=torch.int8), torch.full((64,), 0.01)
    fused = (
        GhostOperands(x, weight, norm_eps=1e-5),
        GhostOperands(x, weight, torch.zeros(64, dtype=BF16)),
        GhostOperands(x, integer, None, scale),
        GhostOperands(x, weight, None, None, None, x[0, 0], torch.zeros(2, 40, dtype=torch.bool)),
    )
    for operands in fused:
        apply_on_cuda(operands)
    insist("triton", "ghost_apply", plain)  # named: no other takes its place
    assert (len(products), len(launches)) == (1, 1 + len(fused) + 1)


@pytest.mark.parametrize(
    ("capability", "rows"),
    [((8, 0), 166), ((8, 6), 178), ((8, 9), 178), ((9, 0), 345), ((10, 0), 327), ((10, 3), 327)],
)
def test_from_how_many_rows_on_cublas_has_a_ghost(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], rows: int
) -> None:
    """By the table of the device, at d = 4096; tensors on no device, a device that is pretended."""
    from ghosted_fast.kernels import _tuning
    from ghosted_fast.kernels import ghost_apply as kernels

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    _tuning._capability.cache_clear()
    key = _tuning.architecture(torch.device("cuda", 0))
    _tuning._capability.cache_clear()
    monkeypatch.setattr(kernels, "architecture", lambda device: key)
    monkeypatch.setattr(triton, "_DEVICE_TYPE", "meta")
    asked: list[str] = []
    product = lambda bias, *_, **to: asked.append("cuBLAS") or bias  # noqa: E731
    monkeypatch.setattr(torch, "addmm", product)
    monkeypatch.setattr(triton, "run", lambda *args: asked.append("Triton"))
    weight = torch.empty(4096, 4096, dtype=BF16, device="meta")
    for count in (1, rows - 1, rows, 8 * rows):
        apply_on_cuda(GhostOperands(torch.empty(count, 4096, dtype=BF16, device="meta"), weight))
    assert asked == ["Triton", "Triton", "cuBLAS", "cuBLAS"]


def test_under_torch_compile_each_call_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph for any number of rows: what runs is decided by those that come."""
    from ghosted_fast.kernels import ghost_apply as kernels

    library = torch.library.Library("ghosted_fast_pretended", "DEF")
    monkeypatch.setattr(_define, "NAMESPACE", "ghosted_fast_pretended")
    monkeypatch.setattr(_define, "library", library)
    monkeypatch.setattr(_define, "_IS_CUDA", False)
    monkeypatch.setattr(_define, "run_plain", _define.run_on_cuda)  # for tensors on the CPU too
    _define.define(
        "ghost_apply",
        str(torch.ops.ghosted_fast.ghost_apply.default._schema).partition("ghost_apply")[2],
        GhostOperands,
        fake=lambda operands: operands.x.new_empty(operands.x.shape),
        plain=ghost_apply_expression,
    )
    operator = torch.ops.ghosted_fast_pretended.ghost_apply.default
    many = lambda table, rows, size: rows >= 100  # noqa: E731
    monkeypatch.setattr(kernels, "is_bound_by_products", many)
    products, graphs, torchs = [], [], torch.addmm
    monkeypatch.setattr(
        torch, "addmm", lambda *args, **to: products.append(args) or torchs(*args, **to)
    )

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    def step(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return operator(x * 2, weight, None, None, None, None, None) * 2

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=count)
    weight = torch.randn(64, 64).to(BF16) / 8
    for rows, cublas in ((40, 0), (120, 1), (50, 1)):
        x = torch.randn(rows, 64).to(BF16)
        exact = ghost_apply_expression(GhostOperands(x * 2, weight)) * 2
        assert relative_rms(compiled(x, weight), exact) <= 0.01
        assert (len(products), len(graphs)) == (cublas, 1)


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
    operands = GhostOperands(x, weight)
    with pytest.warns(RuntimeWarning, match=f"ghost_apply runs on plain torch: .*{reason}") as seen:
        y, _ = apply_on_cuda(operands), apply_on_cuda(operands)
    assert len(seen) == 1
    assert torch.equal(y, ghost_apply_expression(operands))
    with pytest.raises(BackendError, match=f"backend 'triton': .*{reason}"):
        insist("triton", "ghost_apply", operands)


def test_gram_update() -> None:
    for size, reason in ((32, ""), (33, "multiple of 16 elements")):
        x = torch.randn(9, size).to(BF16)
        gram, exact = torch.zeros(2, size, size, dtype=torch.float64)
        gram_update_reference(GramOperands(x, gram=exact))
        operands = GramOperands(x, gram=gram)
        if not reason:
            insist("triton", "gram_update", operands)
        else:
            with pytest.warns(RuntimeWarning, match=reason):
                update_on_cuda(operands)
            with pytest.raises(BackendError, match=reason):
                insist("triton", "gram_update", operands)
        assert relative_rms(gram, exact) <= 1e-6


def test_what_triton_does_not_have_is_refused() -> None:
    operands = SolveOperands(torch.eye(4).double(), torch.eye(4).double(), 0.1)
    with pytest.raises(BackendError, match="one of ghost_apply, gram_update, got ghost_solve"):
        insist("triton", "ghost_solve", operands)
    x, weight = torch.randn(3, 64).to(BF16), torch.randn(64, 64).to(BF16).requires_grad_()
    with pytest.raises(BackendError, match="expected inputs without gradients"):
        insist("triton", "ghost_apply", GhostOperands(x, weight))


def test_absent_triton_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "absence_reason", lambda: "the package triton is not here")
    x, weight = torch.randn(3, 64).to(BF16), torch.randn(64, 64).to(BF16)
    with pytest.warns(RuntimeWarning, match="the package triton is not here"):
        apply_on_cuda(GhostOperands(x, weight))


def test_arguments_are_checked_first() -> None:
    with pytest.raises(ArgumentError, match="weight of shape"):
        apply_on_cuda(GhostOperands(torch.randn(3, 64), torch.randn(63, 64)))
    with pytest.raises(TypeError, match="expected gram in torch"):
        update_on_cuda(GramOperands(torch.randn(3, 64), gram=torch.eye(64)))
