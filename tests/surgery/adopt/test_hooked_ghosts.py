"""Ghosts in other people's hooks: taken over where running them proves what they compute."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.hooks_of_others import HOOKS, NAMES, SIZE, closure, logits, operator, published
from torch import Tensor, nn

from ghosted_fast.errors import ArgumentError, UnsupportedModelError
from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.models.ghosted_layers import ghosts_of
from ghosted_fast.surgery.adopt.swap import swap_ghosts
from ghosted_fast.testing import random_tokens, relative_rms, tiny_model

# What a ghost's output may differ by from the same map in fp64.
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 2e-3}


def model_of(dtype: torch.dtype = torch.float32, num_layers: int = 4) -> Any:
    return tiny_model("llama", num_layers=num_layers, dtype=dtype)


def check_ghost(ghost: GhostLinear, weight: Tensor, bias: Tensor | None = None) -> None:
    """Compare a ghost with y = W x + b in fp64, on states of its dtype."""
    dtype = ghost.weight.dtype
    x = torch.randn(3, 50, SIZE, generator=torch.Generator().manual_seed(9)).to(dtype)
    exact = x.double() @ weight.double().T
    if bias is not None:
        exact = exact + bias.double()
    with torch.no_grad():
        assert relative_rms(ghost(x), exact) <= BOUNDS[dtype]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("hook", HOOKS, ids=NAMES)
def test_every_kind_of_hook(hook: Any, dtype: torch.dtype) -> None:
    model, weight = model_of(dtype), operator()
    layer = model.model.layers[1]
    plain = logits(model)
    hook(layer, weight)
    before = logits(model)
    assert relative_rms(plain, before) > 0.05
    assert swap_ghosts(model) == ["model.layers.1.ghost"]
    assert relative_rms(logits(model), before) < (1e-5 if dtype == torch.float32 else 3e-2)
    assert not layer._forward_hooks
    assert not layer._forward_hooks_with_kwargs
    check_ghost(layer.ghost, weight)
    assert sum("ghost" in name for name, _ in model.named_parameters()) == 1
    assert swap_ghosts(model) == []


def test_decoding_goes_on_as_before() -> None:
    model = model_of()
    published(model.model.layers[2], operator())
    tokens = random_tokens(2, 5)
    before = model.generate(tokens, max_new_tokens=12, do_sample=False)
    twin = copy.deepcopy(model)
    assert swap_ghosts(twin) == ["model.layers.2.ghost"]
    assert torch.equal(twin.generate(tokens, max_new_tokens=12, do_sample=False), before)


def pre_hook(weight: Tensor) -> Callable[..., Any]:
    return lambda _, args: ((args[0].float() @ weight.T).to(args[0].dtype), *args[1:])


def pre_hook_with_kwargs(weight: Tensor) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return ((args[0].float() @ weight.T).to(args[0].dtype), *args[1:]), kwargs

    return hook


@pytest.mark.parametrize("kwargs", [False, True])
@pytest.mark.parametrize(
    ("layer", "name"), [(0, "0.input_ghost"), (1, "0.ghost"), (3, "2.ghost"), (4, "3.ghost")]
)
def test_pre_hooks(layer: int, name: str, kwargs: bool) -> None:
    model, weight = model_of(), operator()
    module = model.model.layers[layer] if layer < 4 else model.model.norm
    if kwargs:
        module.register_forward_pre_hook(pre_hook_with_kwargs(weight), with_kwargs=True)
    else:
        module.register_forward_pre_hook(pre_hook(weight))
    before = logits(model)
    assert swap_ghosts(model) == [f"model.layers.{name}"]
    assert relative_rms(logits(model), before) < 1e-5
    assert not module._forward_pre_hooks
    assert not module._forward_pre_hooks_with_kwargs


def test_bias_is_what_becomes_of_zero() -> None:
    model, weight = model_of(torch.bfloat16), operator()
    linear = nn.Linear(SIZE, SIZE).to(torch.bfloat16)
    with torch.no_grad():
        linear.weight.copy_(weight - torch.eye(SIZE))
        linear.bias.normal_(0.0, 0.5)
    model.model.layers[1].register_forward_hook(lambda _, __, output: output + linear(output))
    assert swap_ghosts(model) == ["model.layers.1.ghost"]
    ghost = model.model.layers[1].ghost
    assert torch.equal(ghost.weight, linear.weight)
    assert torch.equal(ghost.bias, linear.bias)


def test_several_hooks_in_one_place_become_one_ghost() -> None:
    """Codes that have one operator for each removed layer hook two of them to one layer."""
    model, weights = model_of(), [operator(seed) for seed in range(3)]
    linear = nn.Linear(SIZE, SIZE)
    linear.weight.data = weights[1]
    closure(model.model.layers[1], weights[0])
    model.model.layers[1].register_forward_hook(lambda _, __, output: linear(output))
    model.model.layers[2].register_forward_pre_hook(pre_hook(weights[2]))
    before = logits(model)
    assert swap_ghosts(model) == ["model.layers.1.ghost"]
    assert relative_rms(logits(model), before) < 1e-5
    wide = [weight.double() for weight in weights]
    check_ghost(
        model.model.layers[1].ghost,
        wide[2] @ wide[1] @ wide[0],
        wide[2] @ linear.bias.detach().double(),
    )


def test_several_gaps_and_other_hooks_behind() -> None:
    model = model_of()
    seen: list[Tensor] = []
    for layer in (0, 2):
        published(model.model.layers[layer], operator(layer))
    model.model.layers[2].register_forward_hook(lambda _, __, output: seen.append(output))
    logits(model)
    assert swap_ghosts(model) == ["model.layers.0.ghost", "model.layers.2.ghost"]
    logits(model)
    assert len(seen) == 2
    assert relative_rms(seen[1], seen[0]) < 1e-5


def test_layers_that_return_tuples() -> None:
    model, weight = model_of(), operator()
    layer = model.model.layers[1]

    class InTuple(type(layer)):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
            return 2.0 * hidden_states, "rest"

    layer.__class__ = InTuple
    layer.register_forward_hook(lambda _, __, output: (output[0] @ weight.T, *output[1:]))
    x = torch.randn(2, 3, SIZE)
    before, _ = layer(x)
    assert swap_ghosts(model) == ["model.layers.1.ghost"]
    after, rest = layer(x)
    assert rest == "rest"
    assert relative_rms(after, before) < 1e-6


def test_recordings_of_transformers_are_no_hindrance() -> None:
    model = model_of()
    model(random_tokens(1, 3), output_hidden_states=True)  # which hooks every layer
    published(model.model.layers[1], operator())
    before = logits(model)
    assert swap_ghosts(model) == ["model.layers.1.ghost"]
    assert relative_rms(logits(model), before) < 1e-5


class Gone(nn.Module):
    """What some codes put where a layer was."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return hidden_states


def test_hooks_of_layers_without_weights() -> None:
    model, weight = model_of(), operator()
    model.model.layers[2] = Gone()
    closure(model.model.layers[2], weight)
    before = logits(model)
    assert swap_ghosts(model) == ["model.layers.2.ghost"]
    assert relative_rms(logits(model), before) < 1e-5
    check_ghost(model.model.layers[2].ghost, weight)


def test_hooks_without_a_matrix_are_never_run() -> None:
    model, calls = model_of(), []
    model.model.layers[1].register_forward_hook(lambda *_: calls.append(1))
    model.model.layers[1].register_forward_hook(lambda _, __, output: 2.0 * output)
    assert swap_ghosts(model) == []
    assert not calls
    assert len(model.model.layers[1]._forward_hooks) == 2


def test_hooks_that_only_look_are_left_alone() -> None:
    model, total = model_of(), torch.zeros(SIZE, SIZE)

    def gather(module: nn.Module, inputs: Any, output: Tensor) -> None:
        rows = output.flatten(0, 1).float()
        total.add_(rows.T @ rows)

    model.model.layers[1].register_forward_hook(gather)
    assert swap_ghosts(model) == []
    assert len(model.model.layers[1]._forward_hooks) == 1


def test_match_names_the_hooked_layers() -> None:
    model = model_of()
    for layer in (0, 2):
        closure(model.model.layers[layer], operator(layer))
    assert swap_ghosts(model, ["model.layers.2"]) == ["model.layers.2.ghost"]
    assert len(model.model.layers[0]._forward_hooks) == 1
    named = swap_ghosts(model, lambda name, _: name == "model.layers.0")
    assert named == ["model.layers.0.ghost"]
    with pytest.raises(ArgumentError, match=r"expected 'model.layers.1' to be .* with a hook"):
        swap_ghosts(model, ["model.layers.1"])


def half(weight: Tensor) -> Callable[..., Any]:
    """Apply an operator to all tokens but the first."""

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return torch.cat([output[:, :1], output[:, 1:] @ weight.T], dim=1)

    return hook


def of_input(weight: Tensor) -> Callable[..., Any]:
    return lambda _, inputs, output: output + inputs[0] @ weight.T


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (half, "the nearest, y = x @ A.T, differs by"),
        (of_input, "differs by"),
        (lambda w: lambda _, __, y: torch.tanh(y @ w.T), "differs by"),
        (lambda w: lambda _, __, y: y @ w.T / y.norm(dim=-1, keepdim=True), "NaN or infinity"),
        (lambda w: lambda _, __, y: y @ (2.5 * w).T, "differs by"),
        (lambda w: lambda _, __, y: (y @ w.T)[..., :4], r"does not return hidden states \[2, 3"),
        (lambda w: lambda _, __, y: y.nothing @ w.T, "it raised AttributeError"),
        (lambda w: lambda _, __, y: (y[0] @ w.T, None), "the rest of the layer's tuple"),
        (lambda w: lambda _, __, y: y @ (w / 0.0).T, "NaN or infinity"),
    ],
)
def test_other_hooks_with_a_matrix_are_refused(make: Any, message: str) -> None:
    model = model_of()
    closure(model.model.layers[0], operator(1))
    layer = model.model.layers[2]
    layer.register_forward_hook(make(operator()))
    with pytest.raises(ArgumentError, match=message) as caught:
        swap_ghosts(model)
    assert "on 'model.layers.2' to compute W x + b" in str(caught.value)
    assert len(layer._forward_hooks) == len(model.model.layers[0]._forward_hooks) == 1
    assert not list(ghosts_of(model.model.layers))


def test_a_small_ghost_is_read_the_right_way_in_low_precision() -> None:
    """The transposed matrix would pass for the right one within the rounding of bf16."""
    model, weight = model_of(torch.bfloat16), operator(size=2e-3)
    published(model.model.layers[1], weight)
    swap_ghosts(model)
    change = weight - torch.eye(SIZE)
    assert relative_rms(model.model.layers[1].ghost.weight, change) < 4e-3


def test_order_of_hooks_is_kept_or_refused() -> None:
    model = model_of()
    layer = model.model.layers[1]
    layer.register_forward_hook(lambda _, __, output: 2.0 * output)
    closure(layer, operator())
    with pytest.raises(ArgumentError, match=r"no other hook before .*closure.*register it again"):
        swap_ghosts(model)
    model = model_of()
    model.model.layers[0].register_forward_pre_hook(pre_hook(operator()))
    model.model.layers[0].register_forward_pre_hook(lambda _, args: (2.0 * args[0], *args[1:]))
    with pytest.raises(ArgumentError, match="no other hook behind"):
        swap_ghosts(model)
    assert len(model.model.layers[0]._forward_pre_hooks) == 2


def test_a_place_that_is_taken_is_refused() -> None:
    model = model_of()
    closure(model.model.layers[1], operator())
    swap_ghosts(model)
    closure(model.model.layers[1], operator(1))
    with pytest.raises(ArgumentError, match="got a GhostLinear at the output"):
        swap_ghosts(model)


def test_a_model_without_weights_is_refused() -> None:
    model = model_of().to("meta")
    closure(model.model.layers[1], operator())
    with pytest.raises(ArgumentError, match="weights are not loaded"):
        swap_ghosts(model)


def test_a_patched_layer_is_refused() -> None:
    model = model_of()
    layer = model.model.layers[1]
    closure(layer, operator())
    layer.forward = functools.partial(layer.forward)
    with pytest.raises(UnsupportedModelError, match="was replaced on the module itself"):
        swap_ghosts(model)
    assert len(layer._forward_hooks) == 1


def test_an_operator_that_the_layer_uses_itself_stays() -> None:
    model = model_of()
    layer = model.model.layers[1]
    layer.ghost = nn.Linear(SIZE, SIZE, bias=False)  # where ours is put
    layer.mlp = nn.Linear(SIZE, SIZE, bias=False)
    layer.register_forward_hook(lambda module, _, output: output + module.mlp(output))
    before, mlp = logits(model), layer.mlp
    assert "model.layers.1.ghost" in swap_ghosts(model)
    assert relative_rms(logits(model), before) < 1e-5
    assert layer.mlp is mlp
