"""The swap of other people's ghosts: modules of many forms become the library's, in place."""

from __future__ import annotations

import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ghosted_fast.errors import ArgumentError
from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.surgery.adopt.swap import swap_ghosts
from ghosted_fast.testing import random_tokens, relative_rms, tiny_model

SIZE = 32


def hidden(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 5, SIZE, generator=torch.Generator().manual_seed(0)).to(dtype)


class ResidualGhost(nn.Module):
    """As published code writes it: x + W x, called like a layer, returning a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(SIZE, SIZE, bias=False)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        return (hidden_states + self.proj(hidden_states),)


class StandIn(ResidualGhost):
    """The same in the place of a decoder layer, whose callers expect a tensor."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        return hidden_states + self.proj(hidden_states)


class FullGhost(nn.Module):
    """The full operator, returning a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.linear(x)


class NormedGhost(nn.Module):
    """A form that a swap cannot know: it must be left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x / x.norm(dim=-1, keepdim=True))


class NeedsMore(FullGhost):
    """A ghost whose forward takes more than a hidden state."""

    def forward(self, x: Tensor, factor: float, **kwargs: Any) -> Tensor:
        return factor * self.linear(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [ResidualGhost, FullGhost, lambda: nn.Linear(SIZE, SIZE)])
def test_swap_keeps_what_a_module_computes(make: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    holder = nn.ModuleDict({"ghost": make().to(dtype)})
    module, x = holder["ghost"], hidden(dtype=dtype)
    calls: list[int] = []
    hook = module.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        before = module(x)
        assert swap_ghosts(holder) == ["ghost"]
        after = module(x)
    assert holder["ghost"] is module
    assert len(calls) == 2
    hook.remove()
    assert type(before) is type(after)
    before, after = (y[0] if isinstance(y, tuple) else y for y in (before, after))
    assert relative_rms(after, before) < (1e-6 if dtype == torch.float32 else 1e-2)
    assert sum(isinstance(part, GhostLinear) for part in holder.modules()) == 1
    assert not any(isinstance(part, nn.Linear) for part in holder.modules())
    with torch.no_grad():
        twin = pickle.loads(pickle.dumps(holder))["ghost"](x)
    assert torch.equal(twin[0] if isinstance(twin, tuple) else twin, after)
    assert swap_ghosts(holder) == []


def test_swap_of_a_ghost_held_by_a_hook() -> None:
    model, tokens = tiny_model("llama", num_layers=4), random_tokens(1, 5)
    model.ghosts = nn.ModuleList([nn.Linear(SIZE, SIZE, bias=False)])
    ghost = model.ghosts[0]
    model.model.layers[1].register_forward_hook(lambda _, __, output: output + ghost(output))
    with torch.no_grad():
        before = model(tokens).logits
        assert swap_ghosts(model, ["ghosts.0"]) == ["ghosts.0"]
        assert relative_rms(model(tokens).logits, before) < 1e-5
    assert isinstance(ghost, GhostLinear)


def test_swap_of_a_ghost_among_the_layers() -> None:
    model, tokens = tiny_model("llama", num_layers=4), random_tokens(1, 5)
    model.model.layers[2] = StandIn()
    with torch.no_grad():
        before = model(tokens, use_cache=False).logits
        assert swap_ghosts(model) == ["model.layers.2"]
        assert relative_rms(model(tokens, use_cache=False).logits, before) < 1e-5
    assert sum(isinstance(part, GhostLinear) for part in model.modules()) == 1


def test_projections_are_never_swapped_by_themselves() -> None:
    model = tiny_model("opt", num_layers=2)
    projection = model.model.decoder.layers[0].self_attn.q_proj
    assert projection.in_features == projection.out_features == SIZE
    assert swap_ghosts(model) == []
    assert type(projection) is nn.Linear
    name = "model.decoder.layers.0.self_attn.q_proj"
    assert swap_ghosts(model, lambda found, _: found == name) == [name]


@pytest.mark.parametrize("make", [NormedGhost, NeedsMore, lambda: nn.Linear(SIZE, 2 * SIZE)])
def test_unknown_forms_are_left_alone_or_refused(make: Any) -> None:
    holder = nn.ModuleDict({"ghost": make()})
    assert swap_ghosts(holder) == []
    with pytest.raises(ArgumentError, match=r"expected 'ghost' to be a square nn.Linear"):
        swap_ghosts(holder, ["ghost"])
    assert not any(isinstance(part, GhostLinear) for part in holder.modules())


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ArgumentError, match="names of modules"):
        swap_ghosts(nn.ModuleDict(), ["ghost"])


def test_state_of_a_swapped_ghost_saves_and_loads() -> None:
    torch.manual_seed(0)
    holder, x = nn.ModuleDict({"ghost": ResidualGhost()}), hidden()
    names = set(holder.state_dict())
    swap_ghosts(holder)
    assert set(holder.state_dict()) == names
    file = io.BytesIO()
    torch.save(holder.state_dict(), file)
    file.seek(0)
    other = nn.ModuleDict({"ghost": ResidualGhost()})
    swap_ghosts(other)
    other.load_state_dict(torch.load(file))
    with torch.no_grad():
        assert torch.equal(other["ghost"](x)[0], holder["ghost"](x)[0])
