"""gram_update on a GPU, skipped where there is none. tests/cuda_emulation runs the same kernels."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from support.gram_sums import assert_close, exact_sums, make_sums, make_weights
from torch import Tensor

from ghosted_fast.errors import BackendError
from ghosted_fast.ops import compiled, gram_update
from ghosted_fast.testing import outlier_activations

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not compiled.serves_cuda(), reason="the extension was built without CUDA: see `make cuda`"
    ),
]


def on_gpu(sums: dict[str, Tensor], device: str = "cuda") -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in sums.items()}


def on_cpu(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in sums.items()}


@pytest.mark.parametrize("weights", ["none", "power of 4", "any", "padding"])
@pytest.mark.parametrize(("norm_eps", "delta"), [(None, False), (None, True), (1e-5, True)])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize(("num_tokens", "size"), [(1, 8), (300, 136), (2100, 576)])
def test_values(
    num_tokens: int,
    size: int,
    dtype: torch.dtype,
    norm_eps: float | None,
    delta: bool,
    weights: str,
) -> None:
    x = outlier_activations(num_tokens, size, dtype)
    y = torch.randn(num_tokens, size).to(dtype)
    weight, sums = make_weights(weights, num_tokens), on_gpu(make_sums(size, size))
    on_device = None if weight is None else weight.cuda()
    options = {"norm_eps": norm_eps, "delta": delta, "backend": "native"}
    gram_update(x.cuda(), y.cuda(), on_device, **options, **sums)
    assert_close(on_cpu(sums), exact_sums(x, y, weight, norm_eps, delta))


def test_error_does_not_grow_with_the_tokens() -> None:
    x = outlier_activations(60_000, 16, BF16).abs()
    sums = on_gpu(make_sums(16, 16))
    for batch in x.cuda().split(20_000):
        gram_update(batch, batch, backend="native", **sums)
    assert_close(on_cpu(sums), exact_sums(x, x))


def test_bitwise_repeatable() -> None:
    x = outlier_activations(5000, 1024, BF16).cuda()
    results = [on_gpu(make_sums(1024, 1024)) for _ in range(3)]
    for sums in results:
        gram_update(x, x, norm_eps=1e-6, backend="native", **sums)
    for again in results[1:]:
        assert all(torch.equal(again[name], results[0][name]) for name in again)


def test_non_finite_names_the_token_and_adds_nothing() -> None:
    x, sums = torch.randn(300, 24).cuda(), on_gpu(make_sums(24, 24))
    x[277, 23] = math.nan
    with pytest.raises(RuntimeError, match="NaN or infinity in x at token 277"):
        gram_update(x, x, backend="native", **sums)
    assert not any(tensor.any() for tensor in sums.values())


def test_unserved_rows_run_without_the_kernel_or_are_refused() -> None:
    x, sums = torch.randn(30, 20), on_gpu(make_sums(20, 20))
    gram_update(x.cuda(), x.cuda(), **sums)
    assert_close(on_cpu(sums), exact_sums(x, x))
    with pytest.raises(BackendError, match="multiple of 8 columns, got 20"):
        gram_update(x.cuda(), x.cuda(), backend="native", **sums)


def test_on_the_current_stream() -> None:
    x, stream = torch.randn(4000, 512), torch.cuda.Stream()
    sums = on_gpu(make_sums(512, 512))
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        on_device = x.cuda(non_blocking=True) * 1.0
        gram_update(on_device, on_device, backend="native", **sums)
    torch.cuda.current_stream().wait_stream(stream)
    assert_close(on_cpu(sums), exact_sums(x, x))


def test_under_a_graph() -> None:
    x = torch.randn(200, 64)
    static, sums = x.cuda(), on_gpu(make_sums(64, 64))
    gram_update(static, static, norm_eps=1e-5, backend="native", **sums)  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gram_update(static, static, norm_eps=1e-5, backend="native", **sums)
    for tensor in sums.values():
        tensor.zero_()
    graph.replay()
    assert_close(on_cpu(sums), exact_sums(x, x, norm_eps=1e-5))
    graph.replay()
    assert_close(
        {name: tensor / 2 for name, tensor in on_cpu(sums).items()}, exact_sums(x, x, norm_eps=1e-5)
    )


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_no_nan_is_lost_under_a_graph(dtype: torch.dtype) -> None:
    """NaN of the hardware's own arithmetic; the eager call names its token, a replay adds it."""
    x, weight = torch.randn(200, 64).to(dtype).cuda(), torch.rand(200).cuda() + 0.5
    sums = on_gpu(make_sums(64, 64))
    gram_update(x, x, weight, delta=True, backend="native", **sums)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gram_update(x, x, weight, delta=True, backend="native", **sums)
    x[5, 7] = x[5, 7] * math.inf - x[5, 7] * math.inf
    graph.replay()
    assert sums["gram"][7, :8].isnan().all() and sums["cross"][7].isnan().all()
    sums = on_gpu(make_sums(64, 64))
    with pytest.raises(RuntimeError, match="in x at token 5"):
        gram_update(x, x, weight, delta=True, backend="native", **sums)


def test_all_kernels_are_loaded_before_a_capture() -> None:
    """In a process of its own: here other tests have loaded them."""
    code = (
        "import torch; from ghosted_fast.ops import gram_update\n"
        "x = torch.randn(64, 64, device='cuda')\n"
        "gram = torch.zeros(64, 64, device='cuda', dtype=torch.float64)\n"
        "gram_update(x.bfloat16(), gram=gram, backend='native')\n"
        "graph = torch.cuda.CUDAGraph()\n"
        "with torch.cuda.graph(graph):\n"
        "    gram_update(x, gram=gram, norm_eps=1e-5, backend='native')\n"
        "graph.replay(); print(bool(gram.isfinite().all()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "True", done.stderr


def test_compiles_without_a_graph_break() -> None:
    x, sums = torch.randn(90, 64), on_gpu(make_sums(64, 64))

    def step(rows: Tensor) -> None:
        gram_update(rows * 2, rows, **sums)

    torch.compile(step, fullgraph=True)(x.cuda())
    assert_close(on_cpu(sums), exact_sums(x * 2, x))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_on_the_device_of_the_tensors() -> None:
    x, sums = torch.randn(90, 64), on_gpu(make_sums(64, 64), "cuda:1")
    with torch.cuda.device(0):
        gram_update(x.to("cuda:1"), x.to("cuda:1"), backend="native", **sums)
        assert torch.cuda.current_device() == 0
    assert_close(on_cpu(sums), exact_sums(x, x))
