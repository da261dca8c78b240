"""Decoder layers that carry ghosts, and decoders that tell them where the first tokens are.

A ghosted layer is the kept layer itself, with its class swapped for a subclass of the same name:
parameters keep their names, hooks and `_no_split_modules` keep working, and outputs recorded by
transformers include the ghost.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import MethodType
from typing import Any

from torch import Tensor, nn

from ghosted_fast.errors import UnsupportedModelError
from ghosted_fast.models.first_token import FirstTokens, mark_of, marked_at, parameters_of
from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.models.runtime_classes import bases_of, maker, subclass_for

OUTPUT, INPUT = "output", "input"
_ATTRIBUTES = {OUTPUT: "ghost", INPUT: "input_ghost"}
_IS_FIRST = "ghost_is_first"


def _named_after(base: type) -> dict[str, Any]:
    """Return the names of a class, for a subclass that transformers must take for it."""
    return {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }


@maker("layer")
def _ghosted_layer_class(base: Any) -> type:
    """Make the class of layers with a ghost after their output, before their input, or both."""

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        is_first = kwargs.pop(_IS_FIRST, None)
        if self.first_tokens is not None:
            is_first = self.first_tokens.on(hidden_states.device)
        if self.input_ghost is not None:
            hidden_states = self.input_ghost(hidden_states, is_first)
        output = base.forward(self, hidden_states, *args, **kwargs)
        if self.ghost is None:
            return output
        if isinstance(output, tuple | list):
            return type(output)((self.ghost(output[0], is_first), *output[1:]))
        return self.ghost(output, is_first)

    return type(
        base.__name__,
        bases_of(base),
        {
            **_named_after(base),
            "forward": functools.wraps(base.forward)(forward),
            "first_tokens": None,
        },
    )


@maker("base")
def _first_token_base_class(base: Any) -> type:
    """Make the class of base models that leave the mark where ghosts find it."""
    names = parameters_of(base)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.first_tokens.mark = mark_of(names, args, kwargs)
        return base.forward(self, **kwargs)

    return type(
        base.__name__,
        bases_of(base),
        {**_named_after(base), "forward": functools.wraps(base.forward)(forward)},
    )


@maker("decoder")
def _first_token_decoder_class(base: Any) -> type:
    """Make the class of decoders that mark the first attended tokens for their ghosted layers."""
    names = parameters_of(base)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        is_first = mark_of(names, args, kwargs)
        if is_first is not None:
            kwargs[_IS_FIRST] = is_first
        return base.forward(self, **kwargs)

    return type(
        base.__name__,
        bases_of(base),
        {**_named_after(base), "forward": functools.wraps(base.forward)(forward)},
    )


def swap_class(module: nn.Module, step: str) -> None:
    """Change a module's class to the one derived from it by a step, in place.

    Args:
        module: The module; see `check_swappable`.
        step: Name of a maker of derived classes.
    """
    check_swappable(module)
    new: Any = subclass_for(step, type(module))
    if "_old_forward" in vars(module):
        vars(module)["_old_forward"] = MethodType(new.forward, module)
    module.__class__ = new


def check_swappable(module: nn.Module) -> None:
    """Raise unless a module's class decides what runs when it is called.

    Raises:
        UnsupportedModelError: Another library has replaced `forward` on the module itself.
    """
    # accelerate replaces it too, and keeps the method that its wrapper calls.
    original = getattr(vars(module).get("_old_forward"), "__func__", None)
    if "forward" in vars(module) and original is not type(module).forward:
        raise UnsupportedModelError(
            f"{type(module).__name__}.forward was replaced on the module itself: remove the patch, "
            "remove the layers, then patch again"
        )


def ghost_of(layer: nn.Module, side: str) -> GhostLinear | None:
    """Return the ghost behind a layer's output, or before its input.

    Args:
        layer: A decoder layer, ghosted or not.
        side: `OUTPUT` or `INPUT`.
    """
    ghost = getattr(layer, _ATTRIBUTES[side], None)
    return ghost if isinstance(ghost, GhostLinear) else None


def ghosts_of(layers: nn.ModuleList) -> Iterator[tuple[int, str, GhostLinear]]:
    """Yield the layer index, side and module of every ghost, in the order they act."""
    for index, layer in enumerate(layers):
        for side in (INPUT, OUTPUT):
            ghost = ghost_of(layer, side)
            if ghost is not None:
                yield index, side, ghost


def attach_ghosts(
    base: nn.Module,
    owner: nn.Module,
    layers: nn.ModuleList,
    ghosts: list[tuple[int, str, GhostLinear]],
) -> None:
    """Put ghosts into kept layers, in place.

    Args:
        base: The base model: what is called with the tokens.
        owner: The module that runs the layers: the base itself, or deep inside it.
        layers: The kept layers.
        ghosts: Layer index, side and module of each ghost.
    """
    for index, side, ghost in ghosts:
        _become_ghosted_layer(layers[index])
        setattr(layers[index], _ATTRIBUTES[side], ghost)
    if not any(ghost.first_state is not None for _, _, ghost in ghosts):
        return
    where, by_keyword = marked_at(base, owner)
    if by_keyword:
        # Layers without a ghost drop the mark before their attention functions see it.
        for layer in layers:
            _become_ghosted_layer(layer)
        swap_class(owner, "decoder")
        return
    if not hasattr(where, "first_tokens"):
        swap_class(where, "base")
        vars(where)["first_tokens"] = FirstTokens()
    for index, _, _ in ghosts:
        vars(layers[index])["first_tokens"] = where.first_tokens


def _become_ghosted_layer(layer: nn.Module) -> None:
    swap_class(layer, "layer")
    for attribute in _ATTRIBUTES.values():
        if attribute not in layer._modules:
            layer.register_module(attribute, None)
