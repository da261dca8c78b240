"""Build a model with all the layers that its dense configuration describes, and keep some of them.

That is how a model is loaded whose kept layers no configuration can describe: what a layer is may
follow from its place by a rule ("every second one is sparse"). This file stands alone: its text is
saved beside the weights of ghosted models (`ghosted_fast.checkpoint.remote_code`).
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# Weights of the owner of the layers that have a part for each of them (Gemma 4).
_TABLES = ("embed_tokens_per_layer", "per_layer_model_projection")
_FIRST_SHARED = "first_kv_shared_layer_idx"
_OVERRIDES = "per_layer_config"
_COUNT = re.compile(r"(num|n)_(\w+_)?(layers?|blocks)")
_INDEX_WORDS = ("idx", "index", "layer_id", "layer_number", "layer_num", "block_id")


@contextmanager
def described_whole(config: Any) -> Iterator[list[int] | None]:
    """Let a configuration describe the dense model, if that is how the model is built.

    Yields:
        The layers that are kept; None where the configuration builds them alone.
    """
    record = config.ghost
    if record is None or "dense_config" not in record:
        yield None
        return
    config.ghost = None
    try:
        with with_values(text_config_of(config), record["dense_config"]):
            yield [i for i in range(record["num_hidden_layers"]) if i not in record["removed"]]
    finally:
        config.ghost = record


def take_layers_out(model: Any, config: Any, kept: list[int]) -> None:
    """Take the removed layers out of a model that was built whole."""
    owner, _, name = config.ghost["layers"].rpartition(".")
    owner = model.base_model.get_submodule(owner)
    layers = getattr(owner, name)
    keep_layers(owner, layers, kept)
    keep_ties(model, layers, kept)


def restore_values(config: Any) -> None:
    """Give a ghosted configuration the lists that its class does not accept as they are."""
    text = text_config_of(config)
    known = (config.ghost or {}).get("per_layer", {})
    config_class: Any = type(text)
    own = list_properties(config_class)
    set_values(text, {name: value for name, value in known.items() if name not in own})


def of_each_layer(name: str, dense: property) -> property:
    """Return a property of a ghosted configuration that says of each kept layer what it was.

    Args:
        name: Its name.
        dense: The dense configuration's property.
    """

    def get(self: Any) -> Any:
        known = (self.ghost or {}).get("per_layer", {})
        return list(known[name]) if name in known else dense.__get__(self)

    return property(get, dense.fset, doc=dense.__doc__)


@functools.cache
def list_properties(config_class: Hashable) -> tuple[str, ...]:
    """Return the properties that a configuration class adds to transformers' own."""
    from transformers import PreTrainedConfig

    return tuple(
        name
        for name in dir(config_class)
        if isinstance(getattr(config_class, name, None), property)
        and not hasattr(PreTrainedConfig, name)
    )


def text_config_of(config: Any) -> Any:
    """Return the configuration of the text decoder: that of the model itself, or a part of it."""
    return config.get_text_config(decoder=True)


def plain_values(config: Any) -> dict[str, Any]:
    """Return the public attributes of a text configuration, as they are written to JSON."""
    values = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    values.pop("ghost", None)
    if getattr(config, "is_heterogeneous", False):
        values[_OVERRIDES] = _overrides(config)
    return values


def set_values(text: Any, values: dict[str, Any]) -> None:
    """Set attributes of a text configuration, settings of single layers last: they must fit."""
    if _OVERRIDES in values:
        text.per_layer_config = None
    for name in sorted(values, key=_OVERRIDES.__eq__):
        setattr(text, name, copy.deepcopy(values[name]))


@contextmanager
def with_values(text: Any, values: dict[str, Any]) -> Iterator[None]:
    """Give a text configuration other values for as long as a model is built from it."""
    before = {name: copy.deepcopy(plain_values(text).get(name)) for name in values}
    set_values(text, values)
    try:
        yield
    finally:
        set_values(text, before)


def _overrides(config: Any) -> dict[str, Any]:
    spec = config._heterogeneity_spec.per_layer_overrides
    return {str(layer): copy.deepcopy(own) for layer, own in spec.items()}


def keep_layers(owner: nn.Module, layers: nn.ModuleList, kept: list[int]) -> None:
    """Leave the kept layers in the list, numbered anew, in place.

    Whatever in a layer holds the layer's own index is renumbered, by whatever name; constants that
    were computed from the index stay as they are.

    Args:
        owner: The module that runs the layers.
        layers: All of them.
        kept: Indices of those that stay, sorted.
    """
    every = list(layers)
    del layers[:]
    layers.extend(every[index] for index in kept)
    number_layers(dict(enumerate(every)), kept)
    cut_owner(owner, kept, len(every))


def keep_ties(model: Any, layers: nn.ModuleList, kept: list[int]) -> None:
    """Make what a model says of weights that are one weight fit the kept layers, in place.

    Args:
        model: A model out of which layers were taken.
        layers: Those that are left.
        kept: The indices that they had, sorted.
    """
    for module in model.modules():
        ties: dict[str, str] = vars(module).get("all_tied_weights_keys") or {}
        inside = module.named_modules() if ties else ()
        path = next((name for name, item in inside if item is layers), None)
        if path is None:
            continue
        left = _ties_left(ties, path, kept)
        vars(module)["all_tied_weights_keys"] = left
        if "." not in path:  # its own rules, of patterns, are about the layers that there were
            vars(module)["_tied_weights_keys"] = dict(left)


def _ties_left(ties: dict[str, str], path: str, kept: list[int]) -> dict[str, str]:
    """Return which weights are one weight among the kept layers, by their new names.

    Where the layer goes that a weight was named by, the next one that has it takes its place.

    Args:
        ties: For each weight that is another one, the name of that one.
        path: The path of the layers, which the names begin with.
        kept: Indices of the layers that stay, sorted.
    """
    held: dict[str, dict[str, None]] = {}
    for name, source in ties.items():
        places = held.setdefault(source, {})
        places.update(dict.fromkeys(filter(None, (_moved(n, path, kept) for n in (source, name)))))
    found = {}
    for places in held.values():
        first, *others = places or (None,)
        found.update({name: first for name in others if first is not None})
    return found


def _moved(name: str, path: str, kept: list[int]) -> str | None:
    """Return the name that a weight has among the kept layers, None if its layer is gone."""
    number, _, rest = name.removeprefix(f"{path}.").partition(".")
    if not name.startswith(f"{path}.") or not number.isdigit():
        return name
    return f"{path}.{kept.index(int(number))}.{rest}" if int(number) in kept else None


def number_layers(layers: dict[int, nn.Module], kept: list[int]) -> None:
    """Number layers anew, in place.

    Args:
        layers: Layers by the index that each was made with.
        kept: The indices of those that are kept; their places are the new indices.
    """
    held: dict[tuple[str, str], dict[int, int]] = {}
    tables: dict[tuple[str, str], dict[int, dict[int, Any]]] = {}
    for index, layer in layers.items():
        for path, module in layer.named_modules():
            for name, value in vars(module).items():
                if type(value) is int and any(word in name for word in _INDEX_WORDS):
                    held.setdefault((path, name), {})[index] = value
                elif type(value) is dict and value and value.keys() <= layers.keys():
                    tables.setdefault((path, name), {})[index] = value
    for (path, name), values in held.items():
        step = _step_of(values)
        for new, old in enumerate(kept):
            if step and old in values:
                module = layers[old].get_submodule(path)
                setattr(module, name, values[old] + step * (new - old))
    places = {old: new for new, old in enumerate(kept)}
    for (path, name), found in tables.items():
        if all(index in table for index, table in found.items()):  # what each finds its own in
            for old, table in found.items():
                new_table = {places[key]: table[key] for key in table if key in places}
                setattr(layers[old].get_submodule(path), name, new_table)


def _step_of(values: dict[int, int]) -> int:
    """Return by how much a number grows from layer to layer; 0 if it is no index.

    Args:
        values: The number in each layer, by the layer's index.
    """
    (first, start), *others = values.items()
    if not others:
        return 1 if start - first in (0, 1) else 0
    index, value = others[0]
    step = (value - start) // (index - first)
    same = all(number == start + step * (layer - first) for layer, number in others)
    # From 0 or from 1; two indices a layer (of two caches) from 0. A scale may grow as well.
    starts = range(max(step, 2))
    return step if same and step > 0 and start - step * first in starts else 0


def cut_owner(owner: Any, kept: list[int], count: int) -> None:
    """Make what the owner of the layers took from the configuration fit the kept layers."""
    described = getattr(owner, "config", None)  # cut by now
    for name, value in list(vars(owner).items()):
        if name.startswith("_") or name == _FIRST_SHARED:
            continue
        if type(value) is list and len(value) == count:
            vars(owner)[name] = [value[index] for index in kept]
        elif type(value) is list and type(getattr(described, name, None)) is list:
            vars(owner)[name] = list(getattr(described, name))  # indices of some layers
        elif type(value) is int and value == count and _COUNT.fullmatch(name):
            vars(owner)[name] = len(kept)
    if hasattr(owner, _FIRST_SHARED):
        first = getattr(owner, _FIRST_SHARED)
        vars(owner)[_FIRST_SHARED] = sum(layer < first for layer in kept)
    for name in _TABLES:
        if getattr(owner, name, None) is not None:
            _cut_table(getattr(owner, name), kept, count)
    if hasattr(owner, "has_sliding_layers"):
        kinds = owner.config.layer_types
        vars(owner)["has_sliding_layers"] = "sliding_attention" in kinds


def _cut_table(table: Any, kept: list[int], count: int) -> None:
    """Leave the parts of the kept layers in a table, in place; others may share its old weight."""
    embeds = isinstance(table, nn.Embedding)
    axis = 1 if embeds else 0
    old = table.weight
    index = torch.tensor(kept, device=old.device)
    parts = old.detach().unflatten(axis, (count, -1)).index_select(axis, index)
    table.weight = nn.Parameter(parts.flatten(axis, axis + 1), requires_grad=old.requires_grad)
    vars(table)["embedding_dim" if embeds else "out_features"] = table.weight.shape[axis]
