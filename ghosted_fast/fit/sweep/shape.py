"""The sizes of a model that what a sweep takes follows from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ghosted_fast.models.built_whole import text_config_of
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.models.unloaded.files import StoredTensor
from ghosted_fast.models.unloaded.opening import Unloaded
from ghosted_fast.models.unloaded.source import layer_room


@dataclass(frozen=True)
class Shape:
    """What the sizes of a sweep follow from.

    Attributes:
        hidden_size: Width of the hidden state.
        num_layers: Layers of the model.
        vocabulary: Words.
        itemsize: Bytes of a number.
        layer_bytes: Bytes of the largest layer in memory, conversion included.
        layer_parameters: Its parameters.
        all_bytes: Bytes of all weights.
        beside: Bytes that are held at the bottom, and at the top.
        on_device: Bytes of a buffer for any layer on a device, and of what is made of the largest
            layer there, which is nothing where it is used as it is read.
    """

    hidden_size: int
    num_layers: int
    vocabulary: int
    itemsize: int
    layer_bytes: int
    layer_parameters: int
    all_bytes: int
    beside: tuple[int, int]
    on_device: tuple[int, int]

    @property
    def read_layer_bytes(self) -> int:
        """What is read of a layer: one that is merged or cast takes more in memory."""
        return min(self.layer_bytes, (self.all_bytes - max(self.beside)) // self.num_layers)

    @classmethod
    def of(cls, unloaded: Unloaded) -> Shape:
        """Return those of a model in files."""
        decoder, names = Decoder.of(unloaded.model), unloaded.names
        itemsize = decoder.dtype.itemsize

        def size(found: Sequence[str]) -> int:
            places = {unloaded.tensors[name] for name in found}  # names may share one
            return sum(_in_memory(place, itemsize) for place in places)

        def held(found: Sequence[str]) -> int:
            """Return what some tensors take while they are read one after the other."""
            return size(found) + max((unloaded.tensors[n].reading_bytes for n in found), default=0)

        layers = {k: found for k, found in unloaded.by_layer.items() if k is not None}
        largest = max(layers.values(), key=size)
        merged = len({names[name] for name in largest}) < len(largest)
        cast = any(unloaded.tensors[name].dtype != decoder.dtype for name in largest)
        outside = unloaded.by_layer.get(None, [])
        embedding, head = _weights_beside(unloaded)
        one, changed = size(largest), merged or cast
        return cls(
            hidden_size=decoder.hidden_size,
            num_layers=decoder.num_layers,
            vocabulary=int(text_config_of(unloaded.model.config).vocab_size),
            itemsize=itemsize,
            layer_bytes=max(one * (2 if changed else 1), held(largest)),
            layer_parameters=sum(math.prod(unloaded.tensors[n].shape) for n in largest),
            all_bytes=size(list(unloaded.tensors)),
            beside=(
                held([name for name in outside if name not in head or name in embedding]),
                held([name for name in outside if name not in embedding or name in head]),
            ),
            on_device=(layer_room(unloaded), 2 * one if changed else 0),
        )


def _in_memory(tensor: StoredTensor, itemsize: int) -> int:
    """Return the bytes of a tensor once it is loaded."""
    each = itemsize if tensor.dtype.is_floating_point else tensor.dtype.itemsize
    return math.prod(tensor.shape) * each


def _weights_beside(unloaded: Unloaded) -> tuple[set[str], set[str]]:
    """Return the names in the files of the weight of the embedding, and of that of the head."""
    model, names = unloaded.model, unloaded.names
    paths = {module: path for path, module in model.named_modules()}
    found = []
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        wanted = {f"{paths[module]}.weight"} if module is not None else set()
        for pair in unloaded.ties.items():
            wanted |= set(pair) if wanted & set(pair) else set()
        found.append({name for name, inside in names.items() if inside in wanted})
    return found[0], found[1]
