"""What decoder layers take from one another: looked at once, in a short forward pass.

A ghost maps one hidden state [batch, length, hidden_size] to another. Where layers hand on more
than that (a router's state, several streams), nothing that stands in for a layer can: a layer whose
second state others use must be kept with them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ghosted_fast.errors import NonFiniteError, UnsupportedModelError
from ghosted_fast.facts import layers_as_text, named_layers, runs_of
from ghosted_fast.models.built_whole import text_config_of
from ghosted_fast.models.checked.usable import (
    check_finite_logits,
    check_in_memory,
    has_stand_ins,
)

_LENGTH = 4


@dataclass(frozen=True)
class Returned:
    """What a layer returns, where that is a sequence with the hidden state at its start.

    Attributes:
        sequence: Its type.
        length: How many entries it has.
        handed: Which entries the next layer takes, with the names that it takes them by.
    """

    sequence: type
    length: int
    handed: tuple[tuple[int, str], ...] = ()


@dataclass
class Contract:
    """What the layers of a model take from one another.

    Attributes:
        returns: What each layer returns; None for the hidden state alone.
        resting: Layers that do not run where there is only text.
        makers: For each layer that uses a second state, the layer that made it.
        second: What the layers call that state, "" if there is none.
    """

    returns: list[Returned | None]
    resting: frozenset[int]
    makers: dict[int, int]
    second: str = ""

    def why_needed(self, removed: Collection[int]) -> str | None:
        """Return why some layers cannot be removed together, None if they can."""
        users = [layer for layer in self.makers if layer not in removed]
        needed = {self.makers[layer] for layer in users} & set(removed)
        if needed:
            using = [layer for layer in users if self.makers[layer] in needed]
            return (
                f"expected {named_layers(needed)} to be kept: {named_layers(using)} of this model "
                f"would miss what is handed on there beside the hidden state ({self.second}), "
                "unless removed too"
            )
        resting = self.resting & set(removed)
        if resting:
            return (
                f"expected {named_layers(resting)} to be kept: on text alone, as it is calibrated, "
                "the model does not run what reads pictures or sound"
            )
        for start, stop in runs_of(removed):
            if self.beside(start, stop) is None:
                gap = range(start, stop)
                one = f"one of the layers {layers_as_text(gap)}" if gap[1:] else named_layers(gap)
                return (
                    f"expected {one} to be kept: no layer beside them, where a ghost would be, "
                    "runs on text alone"
                )
        return None

    def beside(self, start: int, stop: int) -> int | None:
        """Return the layer that holds the ghost of a gap, None if there is none.

        It is the one before the gap; the one behind it, if that one does not run on text alone.

        Args:
            start: The first layer that is removed.
            stop: The first that is kept behind it.
        """
        near = (start - 1, stop)
        return next((i for i in near if 0 <= i < len(self.returns) and i not in self.resting), None)


_KNOWN: WeakKeyDictionary[nn.ModuleList, Contract] = WeakKeyDictionary()


def contract_of(model: Any, layers: nn.ModuleList, width: int) -> Contract:
    """Return what the layers of a model take from one another, looked at once.

    Args:
        model: The model that runs the layers, all of them.
        layers: Its decoder layers.
        width: Width of the hidden state.

    Raises:
        UnsupportedModelError: The layers hand on a state of another shape, or a second one that
            each of them changes.
    """
    known = _KNOWN.get(layers)
    if known is None or len(known.returns) != len(layers):
        known = _KNOWN[layers] = _Look(model, layers, width).contract()
    return known


def as_returned(hidden: Tensor, returned: Returned | None, given: dict[str, Any]) -> Any:
    """Return a hidden state in the form in which a layer returns it.

    Args:
        hidden: The state.
        returned: The form.
        given: What the layer was given by name; a second state among it is handed on.
    """
    if returned is None:
        return hidden
    entries: list[Any] = [hidden, *[None] * (returned.length - 1)]
    for place, name in returned.handed:
        entries[place] = given.get(name)
    return returned.sequence(entries)


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
    return torch.tensor([tokens], device=device_of(model))


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first weight in memory; the processor if none is."""
    return next((w.device for w in model.parameters() if not w.is_meta), torch.device("cpu"))


class _Look:
    """A short forward pass in which the layers are watched."""

    def __init__(self, model: Any, layers: nn.ModuleList, width: int) -> None:
        self.model, self.layers, self.width = model, layers, width
        self.name = type(model).__name__
        self.returned: dict[int, Returned | None] = {}
        self.makers: dict[int, int] = {}
        self.second: set[str] = set()
        # By the id of a second state: the layer that made it, the entry it was last returned in.
        self.handed: dict[int, tuple[int, int]] = {}
        self.alive: list[Any] = []  # so that no two tensors have one id
        self.taken: set[tuple[int, str]] = set()  # entry, and the name that it is taken by

    def contract(self) -> Contract:
        """Run the pass and return what came of it."""
        handles = []
        for index, layer in enumerate(self.layers):
            before, after = partial(self._before, index), partial(self._after, index)
            handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(layer.register_forward_hook(after, with_kwargs=True))
        training = self.model.training
        self.model.eval()
        try:
            is_lent = has_stand_ins(self.model)
            if not is_lent:
                check_in_memory(self.model)
            with torch.inference_mode():
                output = self.model(plain_tokens(self.model), use_cache=False)
            if not is_lent:
                check_finite_logits(self.model, getattr(output, "logits", None))
        except (UnsupportedModelError, NonFiniteError):
            raise
        except Exception as error:  # whatever the family's own code asks for
            raise UnsupportedModelError(
                f"{self.name} does not run on text alone ({type(error).__name__}: {error}): "
                "expected a model that gives logits for token ids"
            ) from error
        finally:
            self.model.train(training)
            for handle in handles:
                handle.remove()
        return self._found()

    def _found(self) -> Contract:
        count = len(self.layers)
        handed = tuple(sorted(self.taken))
        found = [self.returned.get(index) for index in range(count)]
        returns = [item and replace(item, handed=handed) for item in found]
        resting = frozenset(range(count)) - self.returned.keys()
        if 0 in resting:
            raise UnsupportedModelError(
                f"{self.name} does not run its first layer on text alone: expected a model that "
                "does"
            )
        return Contract(returns, resting, self.makers, ", ".join(sorted(self.second)))

    def _before(
        self, index: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if index in self.returned:
            raise UnsupportedModelError(
                f"{self.name} runs its layer {index} more than once in one pass: expected each "
                "layer once"
            )
        hidden = hidden_state(args, kwargs)
        shape = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
        if shape != (1, _LENGTH, self.width):
            raise UnsupportedModelError(
                f"the layers of {self.name} hand on a state of shape {shape} for {_LENGTH} tokens: "
                f"expected (1, {_LENGTH}, {self.width}), a vector of hidden_size for each token, "
                "which is what a ghost maps"
            )
        for key, tensor in _tensors((*args[1:], *kwargs.items())):
            named = isinstance(key, str) and isinstance(kwargs.get(key), Tensor)
            if id(tensor) in self.handed and not named:
                self._refuse(f"output {self.handed[id(tensor)][1]}")

    def _after(
        self, index: int, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        several = isinstance(output, tuple | list)
        self.returned[index] = Returned(type(output), len(output)) if several else None
        used = set()
        for key, tensor in _tensors(tuple(kwargs.items())):
            if id(tensor) not in self.handed:
                continue
            maker, place = self.handed[id(tensor)]
            self.taken.add((place, key))
            other = torch.zeros_like(tensor) if tensor.any() else torch.ones_like(tensor)
            instead = layer.forward(*args, **{**kwargs, key: other})
            if not torch.equal(state_in(instead), state_in(output)):
                self.makers[index] = maker
                self.second.add(key)
                used.add(key)
        before, self.handed = self.handed, {}
        self.alive.append(output)
        if several:
            for place, tensor in _tensors(enumerate(output)):
                if place:
                    maker = before[id(tensor)][0] if id(tensor) in before else index
                    if maker == index and used:
                        self._refuse(used.pop())
                    self.handed[id(tensor)] = (maker, place)

    def _refuse(self, state: str) -> None:
        raise UnsupportedModelError(
            f"each layer of {self.name} hands a second state to the next, beside the hidden "
            f"state ({state}): nothing that stands in for a layer can give it"
        )


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
