"""GhostLinear: what it computes, how it reads its weight, and what is kept of it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.dense_reference import ghost_formula, random_ghost
from torch import Tensor, nn

from ghosted_fast.errors import ArgumentError
from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.ops import compiled, crossings
from ghosted_fast.ops.crossings import LYING, PACKED, TORCH, Crossings
from ghosted_fast.ops.packing import PACKED_DTYPES
from ghosted_fast.testing import relative_rms

SIZE = 32
FORMS: list[dict[str, Any]] = [
    {},
    {"bias": True},
    {"norm_eps": 1e-5},
    {"bias": True, "norm_eps": 1e-2, "first_state": True},
]


def hidden(seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 5, SIZE, generator=generator).to(dtype)


@pytest.mark.parametrize("options", FORMS)
def test_forward_is_the_formula(options: dict[str, Any]) -> None:
    ghost, x = random_ghost(0, **options), hidden()
    is_first = torch.zeros(2, 5, dtype=torch.bool)
    is_first[0, 0] = is_first[1, 3] = True
    assert relative_rms(ghost(x, is_first), ghost_formula(ghost, x, is_first)) < 1e-6
    nowhere = torch.zeros_like(is_first)
    assert relative_rms(ghost(x), ghost_formula(ghost, x, nowhere)) < 1e-6


@pytest.mark.parametrize("options", FORMS)
def test_new_ghost_is_the_identity(options: dict[str, Any]) -> None:
    assert torch.equal(GhostLinear(SIZE, **options)(hidden()), hidden())


def packed_of(ghost: GhostLinear) -> Any:
    return None if ghost._packed is None else ghost._packed.weight


@pytest.mark.skipif(compiled.extension() is None, reason="only the compiled kernels read it")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weight_follows_the_weight(dtype: torch.dtype) -> None:
    ghost, x = random_ghost(0).to(dtype), hidden(dtype=dtype)
    bound = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    nowhere = torch.zeros(2, 5, dtype=torch.bool)

    def check() -> None:
        with torch.no_grad():
            assert relative_rms(ghost(x), ghost_formula(ghost, x, nowhere)) < bound
        assert packed_of(ghost) is not None

    def swap_data() -> None:
        ghost.weight.data = -2 * ghost.weight.data

    def new_parameter() -> None:
        ghost.weight = nn.Parameter(ghost.weight.detach() / 3)

    def load() -> None:
        ghost.load_state_dict(random_ghost(3).state_dict())

    check()
    first = packed_of(ghost)
    check()
    assert packed_of(ghost) is first
    with torch.no_grad():
        ghost.weight.mul_(2)
    check()
    assert packed_of(ghost) is not first
    for change in (
        swap_data,
        new_parameter,
        lambda: ghost.load_state_dict(random_ghost(3).state_dict()),
    ):
        change()
        check()
    ghost.weight.data.neg_()  # not counted
    ghost.forget_packed()
    check()


@pytest.mark.skipif(compiled.extension() is None, reason="only the compiled kernels read it")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_packed_weight_follows_changes_that_are_not_counted(
    dtype: torch.dtype, transposed: bool
) -> None:
    ghost = GhostLinear(48, dtype=dtype)
    drawn = (0.1 * torch.randn(48, 48, generator=torch.Generator().manual_seed(0))).to(dtype)
    ghost.weight = nn.Parameter(drawn.mT if transposed else drawn)
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        before = ghost(x)
        ghost.weight.data += 0.25  # as an adapter is merged
        after = ghost(x)
        ghost.forget_packed()
        assert torch.equal(after, ghost(x)) and not torch.equal(before, after)


def test_packed_weight_is_no_state() -> None:
    ghost, x = random_ghost(0).requires_grad_(False), hidden()
    keys = set(ghost.state_dict())
    y = ghost(x)
    assert packed_of(ghost) is not None and set(ghost.state_dict()) == keys
    for again in (copy.deepcopy(ghost), pickle.loads(pickle.dumps(ghost))):
        assert packed_of(again) is None and torch.equal(again(x), y)


@pytest.mark.slow
def test_packed_weight_only_where_it_serves() -> None:
    with torch.no_grad():
        half = random_ghost(0).half()
        half(hidden(dtype=torch.float16))
        small = random_ghost(0).quantize("int8")
        small(hidden())
    training = random_ghost(0)
    training(hidden())
    with torch.inference_mode():
        uncounted = random_ghost(0)
        uncounted(hidden())
    compiled = random_ghost(0).requires_grad_(False)
    torch.compile(compiled, fullgraph=True, backend="aot_eager")(hidden())
    for ghost in (half, small, training, uncounted, compiled):
        assert packed_of(ghost) is None


@pytest.fixture
def known_crossings() -> Iterator[None]:
    yield
    crossings._crossings_here.cache_clear()
    crossings._is_handed_over.cache_clear()


@pytest.mark.skipif(compiled.extension() is None, reason="only the compiled kernels read it")
@pytest.mark.parametrize("dtype", PACKED_DTYPES)
def test_packed_weight_only_where_it_is_faster(
    known_crossings: None, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    extension = compiled.extension()
    assert extension is not None

    def lies_from(size: int) -> None:
        choices = ((PACKED, PACKED), (LYING, PACKED))
        known = {(extension.cpu_path(), dtype): Crossings(choices, (3,), (size,))}
        monkeypatch.setattr(crossings, "CROSSINGS", known)
        crossings._crossings_here.cache_clear()

    lies_from(SIZE)
    ghost, x = random_ghost(0).to(dtype).requires_grad_(False), hidden(dtype=dtype).flatten(0, 1)
    few, is_packed = ghost(x[:3]), [packed_of(ghost) is not None]
    many = ghost(x[:4])
    is_packed.append(packed_of(ghost) is not None)
    assert is_packed == [False, True]
    assert relative_rms(few, many[:3].double()) < (1e-6 if dtype == torch.float32 else 5e-3)
    lies_from(SIZE + 1)
    ghost.forget_packed()
    ghost(x[:3])
    assert packed_of(ghost) is not None


@pytest.mark.skipif(compiled.extension() is None, reason="only the compiled kernels read it")
@pytest.mark.parametrize("options", FORMS)
def test_a_ghost_that_is_left_to_torch_is_a_plain_one(
    known_crossings: None, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    extension = compiled.extension()
    assert extension is not None
    known = {(extension.cpu_path(), torch.float32): Crossings(((TORCH,),))}
    monkeypatch.setattr(crossings, "CROSSINGS", known)
    crossings._crossings_here.cache_clear()
    ghost, x = random_ghost(0, **options).requires_grad_(False), hidden()
    assert relative_rms(ghost(x), ghost_formula(ghost, x, torch.zeros(2, 5).bool())) < 1e-6
    assert (packed_of(ghost) is None) == (not options)


def test_gradients_reach_every_parameter() -> None:
    ghost, x = random_ghost(0, bias=True, norm_eps=1e-5, first_state=True), hidden()
    is_first = torch.zeros(2, 5, dtype=torch.bool)
    is_first[:, 0] = True
    x.requires_grad_()
    ghost(x, is_first).square().sum().backward()
    for tensor in (x, *ghost.parameters()):
        assert tensor.grad is not None and tensor.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_from_linear_computes_the_same(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for bias in (False, True):
        linear = nn.Linear(SIZE, SIZE, bias=bias).to(dtype)
        x = hidden(dtype=dtype)
        bound = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
        with torch.no_grad():
            residual = GhostLinear.from_linear(linear)
            assert relative_rms(residual(x), x + linear(x)) < bound
            full = GhostLinear.from_linear(linear, residual=False)
            assert relative_rms(full(x), linear(x)) < bound
        assert residual.weight.dtype == full.weight.dtype == dtype
        assert residual.weight.data_ptr() != linear.weight.data_ptr()


def test_from_linear_subtracts_the_identity_before_rounding() -> None:
    linear = nn.Linear(SIZE, SIZE, bias=False)
    exact = torch.eye(SIZE) + torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    linear.weight.data = exact.to(torch.bfloat16)
    ghost = GhostLinear.from_linear(linear, residual=False)
    wanted = (linear.weight.float() - torch.eye(SIZE)).to(torch.bfloat16)
    assert torch.equal(ghost.weight, wanted)


def test_from_linear_normed() -> None:
    linear = nn.Linear(SIZE, SIZE)
    ghost = GhostLinear.from_linear(linear, norm_eps=1e-5)
    x = hidden()
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    with torch.no_grad():
        assert relative_rms(ghost(x), x + linear(normed)) < 1e-6
    with pytest.raises(ArgumentError, match="residual=True with norm_eps"):
        GhostLinear.from_linear(linear, residual=False, norm_eps=1e-5)


@pytest.mark.parametrize("options", FORMS)
def test_quantized_error_is_half_a_step_per_weight(options: dict[str, Any]) -> None:
    ghost, x = random_ghost(0, **options), hidden()
    exact = ghost.weight.detach().clone()
    exact[3] = 0.0
    with torch.no_grad():
        ghost.weight.copy_(exact)
    assert ghost.quantize("int8") is ghost
    assert ghost.quantization == "int8"
    assert ghost.weight.dtype == torch.int8 and ghost.scale is not None
    steps = exact.abs().amax(1) / 127.0
    stored = ghost.scale[:, None] * ghost.weight
    assert ((stored - exact).abs() <= 0.5001 * steps[:, None]).all()
    assert (ghost.weight.abs().amax(1)[steps > 0] == 127).all()
    again = ghost.weight.clone()
    assert torch.equal(ghost.quantize().weight, again)
    plain = random_ghost(0, **options)
    with torch.no_grad():
        plain.weight.copy_(stored)
        assert relative_rms(ghost(x), plain(x)) < 1e-6


def test_quantized_state_round_trips() -> None:
    ghost = random_ghost(0, bias=True, first_state=True).quantize()
    twin = GhostLinear(SIZE, bias=True, first_state=True).quantize()
    twin.load_state_dict(ghost.state_dict())
    assert torch.equal(twin(hidden()), ghost(hidden()))
    assert set(ghost.state_dict()) == {"weight", "scale", "bias", "first_state"}


def test_cast_keeps_the_scale_of_an_int8_weight() -> None:
    ghost = random_ghost(0, bias=True).quantize()
    scale = ghost.scale
    for cast in (lambda: ghost.to(torch.bfloat16), ghost.half, ghost.float, ghost.bfloat16):
        cast()
        assert ghost.scale is not None and ghost.scale.dtype == torch.float32
        assert torch.equal(ghost.scale, scale)
        assert ghost.weight.dtype == torch.int8
    assert ghost.bias is not None and ghost.bias.dtype == torch.bfloat16
    assert ghost(hidden(dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert ghost.to("meta").scale.is_meta


def test_ghost_copies_pickles_and_describes_itself() -> None:
    ghost = random_ghost(0, bias=True, norm_eps=1e-5, first_state=True).quantize()
    for twin in (copy.deepcopy(ghost), pickle.loads(pickle.dumps(ghost))):
        assert torch.equal(twin(hidden()), ghost(hidden()))
    text = "GhostLinear(32, bias=True, first_state=True, norm_eps=1e-05, quantization=int8)"
    assert repr(ghost) == text
    assert repr(GhostLinear(4)) == "GhostLinear(4, bias=False, first_state=False)"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GhostLinear(0), "hidden_size >= 1"),
        (lambda: GhostLinear(4, norm_eps=-1.0), "norm_eps >= 0"),
        (lambda: GhostLinear(4, norm_eps=float("nan")), "norm_eps >= 0"),
        (lambda: GhostLinear(4).quantize("int4"), "'int8', got 'int4'"),
        (lambda: GhostLinear.from_linear(nn.Linear(4, 5)), "square floating-point"),
        (lambda: GhostLinear.from_linear(nn.Conv1d(4, 4, 1)), "square floating-point"),
    ],
)
def test_arguments_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make()


def test_weight_that_is_not_finite_is_not_quantized() -> None:
    ghost = GhostLinear(4)
    with torch.no_grad():
        ghost.weight[1, 2] = float("inf")
    with pytest.raises(ArgumentError, match="finite weight"):
        ghost.quantize()
    assert ghost.quantization is None
