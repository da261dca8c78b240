"""The Triton kernels on a real GPU: values, CUDA graphs, streams, devices, torch.compile."""

from __future__ import annotations

import math

import pytest
import torch

from ghosted_fast.errors import BackendError
from ghosted_fast.ops import ghost_apply, gram_update
from ghosted_fast.ops.operands import GhostOperands, GramOperands
from ghosted_fast.ops.reference import ghost_apply_reference, gram_update_reference
from ghosted_fast.testing import relative_rms, scaled_rms

pytestmark = pytest.mark.gpu

BF16, FP16, INT8 = torch.bfloat16, torch.float16, torch.int8


def make_weight(size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    if dtype == INT8:
        weight = torch.randint(-127, 128, (size, size), dtype=INT8, device="cuda")
        return weight, torch.rand(size, device="cuda") / (64 * size**0.5)
    return (torch.randn(size, size, device="cuda") / size**0.5).to(dtype), None


@pytest.mark.parametrize("size", [64, 576, 4096])
@pytest.mark.parametrize("types", [(x, w) for x in (BF16, FP16) for w in (x, INT8)], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 16, 17, 64, 300])
def test_ghost_apply(rows: int, types: tuple[torch.dtype, torch.dtype], size: int) -> None:
    x, (weight, scale) = (
        torch.randn(rows, size, device="cuda").to(types[0]),
        make_weight(size, types[1]),
    )
    for norm_eps in (None, 1e-5):
        y = ghost_apply(x, weight, None, scale, norm_eps=norm_eps, backend="triton")
        exact = ghost_apply_reference(GhostOperands(x, weight, None, scale, norm_eps))
        assert relative_rms(y, exact) <= torch.finfo(x.dtype).eps


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_many_rows_of_a_plain_ghost(dtype: torch.dtype) -> None:
    """What `auto` leaves to cuBLAS is as exact as the kernel, and may be captured."""
    x, (weight, _) = torch.randn(2, 2048, 2048, device="cuda").to(dtype), make_weight(2048, dtype)
    exact = ghost_apply_reference(GhostOperands(x, weight))
    assert relative_rms(ghost_apply(x, weight), exact) <= torch.finfo(dtype).eps
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ghost_apply(x, weight)
    graph.replay()
    assert relative_rms(y, exact) <= torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [BF16, FP16, torch.float32], ids=str)
def test_gram_update(dtype: torch.dtype) -> None:
    x, y = torch.randn(3000, 256, device="cuda").to(dtype), torch.randn(3000, 256, device="cuda")
    weight = torch.rand(3000, device="cuda")
    sums, exact = torch.zeros(2, 2, 256, 256, dtype=torch.float64, device="cuda")
    for norm_eps, delta in ((None, False), (1e-5, True)):
        sums.zero_(), exact.zero_()
        options = (x, y, weight, norm_eps, delta)
        gram_update_reference(GramOperands(*options, exact[0], exact[1]))
        gram_update(
            x,
            y,
            weight,
            norm_eps=norm_eps,
            delta=delta,
            gram=sums[0],
            cross=sums[1],
            backend="triton",
        )
        assert relative_rms(sums, exact) <= 1e-6
        assert scaled_rms(sums[0], exact[0], exact[0]) <= 1e-7


def test_cuda_graph_replays() -> None:
    x, (weight, _) = torch.randn(2, 1024, device="cuda").to(BF16), make_weight(1024, BF16)
    rows = torch.randn(300, 64, device="cuda").to(BF16)
    gram = torch.zeros(64, 64, dtype=torch.float64, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles outside of the capture
        ghost_apply(x, weight)
        gram_update(rows, gram=gram, backend="triton")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ghost_apply(x, weight)
        gram_update(rows, gram=gram, backend="triton")
    x.normal_(), rows.normal_(), gram.zero_()
    graph.replay()
    assert torch.equal(y, ghost_apply(x, weight))
    once = torch.zeros_like(gram)
    gram_update(rows, gram=once, backend="triton")
    assert torch.equal(gram, once)
    # A bad token adds nothing on replay, and there is nobody to tell.
    rows[5, 5] = math.nan
    graph.replay()
    assert torch.equal(gram, once)


def test_weights_that_are_powers_of_two_leave_nothing_to_compile_in_a_capture() -> None:
    rows, weight = torch.randn(320, 128, device="cuda").to(BF16), torch.ones(320, device="cuda")
    gram = torch.zeros(128, 128, dtype=torch.float64, device="cuda")
    gram_update(rows, None, weight, gram=gram, backend="triton")
    once, graph = gram.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gram_update(rows, None, weight, gram=gram, backend="triton")
    gram.zero_()
    graph.replay()
    assert relative_rms(gram, once) <= 1e-6


def test_compiles_without_a_graph_break() -> None:
    x, (weight, _) = torch.randn(4, 256, device="cuda").to(BF16), make_weight(256, BF16)
    run = torch.compile(lambda a, w: ghost_apply(a * 2, w, norm_eps=1e-5), fullgraph=True)
    assert relative_rms(run(x, weight), ghost_apply(x * 2, weight, norm_eps=1e-5)) <= 0.01
    arguments = (x, weight, None, None, 1e-5, None, None)
    torch.library.opcheck(torch.ops.ghosted_fast.ghost_apply.default, arguments)


def test_bad_token_is_named() -> None:
    x, gram = torch.randn(300, 64, device="cuda"), torch.zeros(64, 64).double().cuda()
    x[77, 3] = math.inf
    with pytest.raises(RuntimeError, match="NaN or infinity in x at token 77"):
        gram_update(x, gram=gram)
    assert not gram.any()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device or none")
def test_runs_on_the_device_of_its_tensors() -> None:
    x, (weight, _) = torch.randn(4, 256).to(BF16), make_weight(256, BF16)
    y = ghost_apply(x.to("cuda:1"), weight.to("cuda:1"))
    assert torch.equal(y.cpu(), ghost_apply(x.to("cuda:0"), weight).cpu())


def test_named_backend_says_why_it_cannot() -> None:
    x, weight = torch.randn(2, 100, device="cuda").to(BF16), torch.randn(100, 100, device="cuda")
    with pytest.raises(BackendError, match=r"backend 'triton': .* multiple of 64, got 100"):
        ghost_apply(x, weight.to(BF16), backend="triton")
