"""Make a configuration describe the layers that are kept.

Most of what depends on a layer's place stands in lists: one entry per layer, or the indices of some
layers. They are cut. A rule ("every second layer") cannot be cut, so a model of such a family is
built with all its layers from the dense configuration, and the removed ones are taken out: see
`ghosted_fast.checkpoint`. What the rule says of the kept layers is kept as lists.
"""

from __future__ import annotations

import copy
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from ghosted_fast.models.built_whole import (
    list_properties,
    plain_values,
    set_values,
    text_config_of,
)
from ghosted_fast.models.families import Family
from ghosted_fast.models.quantized.names import Renumbering
from ghosted_fast.models.structure import counts_of

_SHARED = "num_kv_shared_layers"


def cut_config(
    config: Any, family: Family, kept: list[int], count: int, names: Renumbering | None = None
) -> dict[str, Any]:
    """Make a configuration describe the kept layers only, in place.

    Args:
        config: The configuration of a model, which no other model shares.
        family: The record of the model's family.
        kept: Indices of the kept layers, sorted.
        count: Number of layers before the cut.
        names: Those of the model's modules; without them, only names that are no expressions can be
            renumbered.

    Returns:
        The values that were changed in the text configuration, as they were before.
    """
    text = text_config_of(config)
    dense = copy.deepcopy(plain_values(text))
    if family.make_explicit is not None:
        family.make_explicit(text)
    new = {
        name: _cut_value(name, value, family, kept, count)
        for name, value in plain_values(text).items()
    }
    for name, value in counts_of(text).items():
        stored = text.attribute_map.get(name, name)
        if value == count and stored in new:  # others follow from what is stored
            new[stored] = len(kept)
    shared = new.get(_SHARED)
    if shared:  # the last so many layers use keys and values of earlier ones
        new[_SHARED] = sum(layer >= count - shared for layer in kept)
    set_values(text, {name: new[name] for name in new if new[name] != dense.get(name)})
    for described in {id(part): part for part in (config, text)}.values():
        _renumber_names(described, names or Renumbering(kept))
    return {name: dense[name] for name in dense if new[name] != dense[name]}


def read_again(config: Any) -> Any:
    """Return a configuration as it comes back from a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.json")
        config.to_json_file(path, use_diff=False)
        read = type(config).from_json_file(path)
    _attend_alike(read, config)
    return read


def _attend_alike(read: Any, config: Any) -> None:
    """Give a configuration and its parts the attention functions that another one has."""
    read._attn_implementation_internal = config._attn_implementation_internal
    for name in type(config).sub_configs:
        if getattr(config, name, None) is not None and getattr(read, name, None) is not None:
            _attend_alike(getattr(read, name), getattr(config, name))


def lists_changed(config: Any, again: Any) -> list[str]:
    """Return the lists of a text configuration that are others in it read or built again.

    Some classes mend a configuration that they read, such as the kind of the last layer.

    Args:
        config: The configuration.
        again: What it became.
    """
    before, after = plain_values(text_config_of(config)), plain_values(text_config_of(again))
    return [
        name
        for name, value in before.items()
        if isinstance(value, list) and value != after.get(name, value)
    ]


def computed_lists(text: Any, count: int) -> dict[str, list[Any]]:
    """Return what the properties of a text configuration say of each of its layers, by name."""
    found = {}
    config_class: Any = type(text)
    for name in list_properties(config_class):
        value = None
        with suppress(Exception):  # a property of what this configuration does not have
            value = getattr(text, name)
        if isinstance(value, list) and len(value) == count:
            found[name] = value
    return found


def _cut_value(name: str, value: Any, family: Family, kept: list[int], count: int) -> Any:
    """Return what an attribute is for the kept layers."""
    if name == "per_layer_config":
        return {
            str(kept.index(int(layer))): own for layer, own in value.items() if int(layer) in kept
        }
    if not isinstance(value, list | tuple) or _is_of_all(name):
        return value
    if name in family.layer_index_lists or _lists_indices(name, value, count):
        return [kept.index(layer) for layer in value if layer in kept]
    if len(value) == count:
        return [value[layer] for layer in kept]
    return value


def _is_of_all(name: str) -> bool:
    """Return whether a list belongs to the whole model, however long it is."""
    from transformers import PreTrainedConfig

    return name.endswith(("token_id", "token_ids")) or hasattr(PreTrainedConfig, name)


def _lists_indices(name: str, value: Any, count: int) -> bool:
    """Return whether a list names layers by their indices."""
    indices = all(type(entry) is int and 0 <= entry < count for entry in value)
    if not indices or not value or sorted(set(value)) != list(value):
        return False
    return "layer" in name and (len(value) != count or list(value) == list(range(count)))


def _renumber_names(config: Any, names: Renumbering) -> None:
    """Renumber the layers in the names of modules that the settings of a quantization hold."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return
    values = settings if isinstance(settings, dict) else vars(settings)
    for name, value in list(values.items()):
        values[name] = names.apply(value)
