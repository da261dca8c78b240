"""What decoder layers take from one another: looked at once, in a short forward pass.

A ghost maps one hidden state [batch, length, hidden_size] to another. Where layers hand on more
than that (a router's state, several streams), nothing that stands in for a layer can.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ghosted_fast.errors import UnsupportedModelError
from ghosted_fast.models.built_whole import text_config_of

_LENGTH = 4
# What a layer returns: a sequence of some length, or None for the hidden state alone.
Returned = tuple[type, int] | None
_KNOWN: WeakKeyDictionary[nn.Module, list[Returned]] = WeakKeyDictionary()


def returns_of(model: Any, layers: nn.ModuleList, width: int) -> list[Returned]:
    """Return what each layer returns: a sequence and its length, or None for the state alone.

    Args:
        model: The model that runs the layers, all of them.
        layers: Its decoder layers.
        width: Width of the hidden state.

    Raises:
        UnsupportedModelError: The layers hand on a state of another shape, or a second one.
    """
    if layers not in _KNOWN:
        _KNOWN[layers] = _look(model, layers, width)
    return _KNOWN[layers]


def as_returned(hidden: Tensor, returned: Returned) -> Any:
    """Return a hidden state in the form in which a layer returns it."""
    if returned is None:
        return hidden
    sequence, length = returned
    return sequence((hidden, *[None] * (length - 1)))


def state_in(output: Any) -> Tensor:
    """Return the hidden state in what a layer returned."""
    found: Tensor = output[0] if isinstance(output, tuple | list) else output
    return found


def with_state(output: Any, hidden: Tensor) -> Any:
    """Return what a layer returned with another hidden state in it."""
    if isinstance(output, tuple | list):
        return type(output)((hidden, *output[1:]))
    return hidden


def hidden_state(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the hidden state among the arguments of a layer."""
    return args[0] if args else kwargs["hidden_states"]


def plain_tokens(model: Any, length: int = _LENGTH) -> Tensor:
    """Return a few different tokens [1, length] that mean nothing special to a model."""
    config = model.config
    special: set[int] = set()
    for owner in (config, text_config_of(config)):
        for name, value in vars(owner).items():
            if name.endswith(("token_id", "token_index")):
                special |= set(value if isinstance(value, list) else [value])
    vocabulary = int(text_config_of(config).vocab_size)
    tokens = [token for token in range(vocabulary) if token not in special][:length]
    return torch.tensor([tokens], device=next(model.parameters()).device)


def _look(model: Any, layers: nn.ModuleList, width: int) -> list[Returned]:
    returned: list[Returned] = []
    handed: dict[int, str] = {}
    name = type(model).__name__

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = hidden_state(args, kwargs)
        shape = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
        if shape != (1, _LENGTH, width):
            raise UnsupportedModelError(
                f"the layers of {name} hand on a state of shape {shape} for {_LENGTH} tokens: "
                f"expected (1, {_LENGTH}, {width}), a vector of hidden_size for each token, which "
                "is what a ghost maps"
            )
        for key, tensor in _tensors((*args[1:], *kwargs.items())):
            if id(tensor) in handed:
                raise UnsupportedModelError(
                    f"each layer of {name} hands a second state to the next, beside the hidden "
                    f"state ({key or handed[id(tensor)]}): nothing that stands in for a layer can "
                    "give it"
                )

    def after(_: nn.Module, __: Any, output: Any) -> None:
        several = isinstance(output, tuple | list)
        returned.append((type(output), len(output)) if several else None)
        handed.clear()
        alive.append(output)
        if several:
            handed.update({id(t): f"output {i}" for i, t in _tensors(enumerate(output)) if i})

    alive: list[Any] = []  # so that no two tensors have one id
    handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    handles += [layer.register_forward_hook(after) for layer in layers]
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            model(plain_tokens(model), use_cache=False)
    except UnsupportedModelError:
        raise
    except Exception as error:  # whatever the family's own code asks for
        raise UnsupportedModelError(
            f"{name} does not run on text alone ({type(error).__name__}: {error}): expected a "
            "model that gives logits for token ids"
        ) from error
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    if len(returned) != len(layers):
        raise UnsupportedModelError(
            f"{name} runs its {len(layers)} layers {len(returned)} times in one pass: expected "
            "each of them once"
        )
    return returned


def _tensors(values: Any) -> Iterator[tuple[Any, Tensor]]:
    """Yield the tensors among values or (name, value) pairs, with their names."""
    for entry in values:
        key, value = entry if isinstance(entry, tuple) and len(entry) == 2 else (None, entry)
        if isinstance(value, Tensor):
            yield key, value
        elif isinstance(value, tuple | list):
            for item in value:
                if isinstance(item, Tensor):
                    yield key, item
