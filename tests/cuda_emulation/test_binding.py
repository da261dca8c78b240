"""The binding of the CUDA kernels over the emulated ones: messages, fallback, graph capture."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cuda_emulation.emulator import build_binding, unavailable
from support.gram_sums import assert_close, exact_sums, make_sums, make_weights
from torch import Tensor

from ghosted_fast.ops import gram_update as _gram_update  # noqa: F401  (defines the fallback)
from ghosted_fast.testing import outlier_activations

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(unavailable()), reason=unavailable()),
]
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    path = build_binding()
    torch.ops.load_library(path)
    library = ctypes.CDLL(str(path))
    library.emulation_launched_blocks.restype = ctypes.c_longlong
    return library


@pytest.fixture
def configure(library: ctypes.CDLL) -> Iterator[Callable[[bool, int], None]]:
    """Sets whether the stream is being captured, and the device's compute capability."""
    torch.manual_seed(0)
    library.emulation_launched_blocks()
    yield library.emulation_configure
    library.emulation_configure(False, 8)


def update(x: Tensor, y: Tensor | None, weight: Tensor | None = None, **options: Any) -> None:
    torch.ops.ghosted_fast_emulation.gram_update(
        x,
        y,
        weight,
        options.get("norm_eps"),
        options.get("delta", False),
        options.get("gram"),
        options.get("cross"),
        options.get("moments"),
    )


@pytest.mark.parametrize("weights", ["none", "padding"])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_values(
    configure: Callable[..., None], library: ctypes.CDLL, dtype: torch.dtype, weights: str
) -> None:
    x, y = outlier_activations(70, 24, dtype), torch.randn(70, 24).to(dtype)
    weight, sums = make_weights(weights, 70), make_sums(24, 24)
    update(x, y, weight, delta=True, **sums)
    assert library.emulation_launched_blocks() > 0
    assert_close(sums, exact_sums(x, y, weight, delta=True))


def test_strided_weights(configure: Callable[..., None]) -> None:
    x = torch.randn(40, 16)
    weight, sums = torch.rand(80)[::2], make_sums(16, 16)
    update(x, x, weight, **sums)
    assert_close(sums, exact_sums(x, x, weight))


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (torch.randn(9, 20), torch.randn(9, 16)),
        (torch.randn(9, 16), torch.randn(9, 20)),
        (torch.randn(9, 40)[:, 1:17], torch.randn(9, 16)),
        (torch.randn(9, 16), torch.randn(9, 22).to(BF16)[:, :16]),
    ],
    ids=["hidden size", "outputs", "start of x", "rows of y"],
)
def test_what_the_kernel_does_not_serve_goes_on(
    configure: Callable[..., None], library: ctypes.CDLL, x: Tensor, y: Tensor
) -> None:
    sums = make_sums(x.shape[1], y.shape[1])
    update(x, y, **sums)
    assert library.emulation_launched_blocks() == 0
    assert_close(sums, exact_sums(x, y))


def test_the_fallback_names_the_token_too(configure: Callable[..., None]) -> None:
    x = torch.randn(9, 20)
    x[7, 3] = math.nan
    sums = make_sums(20, 20)
    with pytest.raises(RuntimeError, match="NaN or infinity in x at token 7"):
        update(x, x, **sums)
    assert not any(tensor.any() for tensor in sums.values())


def test_devices_before_sm_80_go_on(configure: Callable[..., None], library: ctypes.CDLL) -> None:
    configure(False, 7)
    x, sums = torch.randn(9, 16), make_sums(16, 16)
    update(x, x, **sums)
    assert library.emulation_launched_blocks() == 0
    assert_close(sums, exact_sums(x, x))


@pytest.mark.parametrize("device", [1, 0])
def test_kernels_run_on_the_device_of_the_tensors(
    configure: Callable[..., None], library: ctypes.CDLL, device: int
) -> None:
    """Torch's runtime knows the current device; the extension's own must be told."""
    x, sums = torch.randn(9, 16), make_sums(16, 16)
    library.emulation_put_tensors_on(device)
    update(x, x, **sums)
    library.emulation_put_tensors_on(0)
    assert library.emulation_launched_blocks() > 0
    assert_close(sums, exact_sums(x, x))


def test_no_tokens_launch_nothing(configure: Callable[..., None], library: ctypes.CDLL) -> None:
    sums = make_sums(16, 16)
    update(torch.randn(0, 16), torch.randn(0, 16), **sums)
    assert library.emulation_launched_blocks() == 0
    assert not any(tensor.any() for tensor in sums.values())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["x", "y"])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_non_finite_names_the_token_and_adds_nothing(
    configure: Callable[..., None], dtype: torch.dtype, name: str, value: float
) -> None:
    rows = {"x": torch.randn(300, 24).to(dtype), "y": torch.randn(300, 24).to(dtype)}
    rows[name][277, 23] = value
    rows[name][290, 0] = value
    sums = make_sums(24, 24)
    with pytest.raises(RuntimeError, match=f"NaN or infinity in {name} at token 277; nothing"):
        update(**rows, **sums)
    assert not any(tensor.any() for tensor in sums.values())


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_bad_weight_names_the_token(configure: Callable[..., None], value: float) -> None:
    weight, sums = torch.ones(20), make_sums(8, 8)
    weight[[4, 15]] = value
    message = rf"finite token weights >= 0, got {value:.0f} at token 4"
    with pytest.raises(RuntimeError, match=message.replace("nan", "-?nan")):
        update(torch.randn(20, 8), torch.randn(20, 8), weight, **sums)
    assert not any(tensor.any() for tensor in sums.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.randn(5, 8).double()}, "x in bfloat16, float16 or float32"),
        ({"x": torch.randn(2, 5, 8)}, r"x of shape \[tokens, hidden_size\]"),
        ({"x": torch.randn(8, 5).t()}, "x with neighbouring columns side by side"),
        ({"y": torch.randn(4, 8)}, r"y of shape \[5, outputs\], got \[4, 8\]"),
        ({"y": torch.randn(5, 16), "cross": None}, r"y of shape \[5, 8\] for delta or moments"),
        ({"y": None}, "y for cross or delta, got None"),
        ({"norm_eps": 0.0}, "norm_eps > 0 or None, got 0"),
        ({"weight": torch.ones(5).double()}, "token_weight in Float, got Double"),
        ({"gram": torch.zeros(8, 8)}, "gram in Double, got Float"),
        ({"cross": torch.zeros(8, 16).double()[:, ::2]}, "a contiguous cross"),
        ({"moments": torch.zeros(2, 8).double()}, r"moments of shape \[3, 8\]"),
    ],
)
def test_errors(configure: Callable[..., None], changes: dict[str, Any], message: str) -> None:
    usual = {"x": torch.randn(5, 8), "y": torch.randn(5, 8), **make_sums(8, 8)}
    with pytest.raises(RuntimeError, match=f"gram_update: expected {message}"):
        update(**{**usual, **changes})


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("weights", ["none", "any"])
def test_under_graph_capture_nothing_is_read_back(
    configure: Callable[..., None], dtype: torch.dtype, weights: str
) -> None:
    x, y = outlier_activations(40, 16, dtype), torch.randn(40, 16).to(dtype)
    weight, sums = make_weights(weights, 40), make_sums(16, 16)
    update(x[:1], y[:1])  # as torch asks for before a capture; other kernels run in it
    configure(True, 8)
    update(x, y, weight, norm_eps=1e-5, **sums)
    assert_close(sums, exact_sums(x, y, weight, norm_eps=1e-5))
    x[3, 5] = math.nan
    update(x, y, weight, **sums)
    assert sums["gram"][5, :6].isnan().all() and sums["cross"][5].isnan().all()
