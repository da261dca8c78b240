"""Tensors in GGUF files: each is dequantized when it is read, and forgotten with its layer.

What the tensors are called in a model, and how llama.cpp's order of rows is undone, transformers
knows; it does so tensor by tensor. What it makes of several tensors, or several of one (experts),
is not left in the file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ghosted_fast.errors import CheckpointError, UnsupportedModelError
from ghosted_fast.models.checked.gguf_header import read_gguf_header
from ghosted_fast.models.unloaded.files import StoredTensor

# Copies of a tensor in fp32 while it is read: rows, all of it, and all in another order.
_COPIES = 3


@dataclass(frozen=True)
class GgufTensor(StoredTensor):
    """A tensor in a GGUF file, which is read in the model's dtype and order.

    Attributes:
        name: What the file calls it.
        kind: The file's number for its blocks.
        stored: Its shape in the file, slowest first, the last one in bytes.
        processor: Transformers' undoing of what llama.cpp changed.
    """

    name: str = ""
    kind: int = 0
    stored: tuple[int, ...] = ()
    processor: Any = field(default=None, compare=False, repr=False)

    @property
    def is_plain(self) -> bool:
        """Whether its numbers lie in the file as they are read."""
        return False

    @property
    def reading_bytes(self) -> int:
        """What reading it takes beside itself, in bytes."""
        return _COPIES * 4 * math.prod(self.shape)

    def read(self) -> Tensor:
        """Return the tensor, in memory of its own.

        Raises:
            CheckpointError: The file ends before it, or it has another shape than the model's.
        """
        import numpy as np
        from gguf import GGMLQuantizationType, dequantize

        raw = StoredTensor(self.path, self.offset, self.stored, torch.uint8).read().numpy()
        found = dequantize(raw, GGMLQuantizationType(self.kind))
        found = self.processor.process(
            weights=found, name=self.name, tensor_key_mapping={}, parsed_parameters={"tensors": {}}
        ).weights
        if found.shape != self.shape:
            raise CheckpointError(
                f"expected {self.name} of {str(self.path)!r} in the shape {list(self.shape)}, got "
                f"{list(found.shape)}: load the model (load_model)"
            )
        return torch.from_numpy(np.ascontiguousarray(found)).to(self.dtype)


def gguf_config(path: Path) -> Any:
    """Return the configuration that transformers makes of a GGUF file.

    Raises:
        CheckpointError: The file is damaged or incomplete.
        MissingExtraError: What GGUF files are read with is absent.
    """
    from transformers import AutoConfig

    read_gguf_header(path)
    return AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)


def gguf_tensors_in(path: Path, model: Any, dtype: torch.dtype) -> dict[str, StoredTensor]:
    """Return the tensors of a GGUF file by their names in a model, in the order in which they lie.

    Args:
        path: The file.
        model: The model, on meta.
        dtype: What they are read as.

    Raises:
        UnsupportedModelError: Transformers makes one weight of several tensors, or several of one.
    """
    from gguf import GGUFReader
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
        load_gguf_checkpoint,
    )

    architecture = str(read_gguf_header(path).settings.get("general.architecture"))
    config = load_gguf_checkpoint(str(path))["config"]
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config)
    names = get_gguf_hf_weights_map(model, processor)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found: dict[str, StoredTensor] = {}
    for item in GGUFReader(str(path)).tensors:
        name = names.get(item.name)
        if name not in shapes:
            continue  # such as tables of frequencies, which transformers computes
        if name in found or math.prod(shapes[name]) != item.n_elements:
            raise UnsupportedModelError(
                f"expected a GGUF file with a tensor for each weight, got {str(path)!r}, of which "
                f"transformers puts {item.name} together with others: load it, save it once with "
                "save_model, and name that folder"
            )
        rows = math.prod(item.data.shape[:-1])
        found[name] = GgufTensor(
            path,
            int(item.data_offset),
            shapes[name],
            dtype,
            name=item.name,
            kind=int(item.tensor_type),
            stored=(*map(int, item.data.shape[:-1]), item.data.nbytes // rows),
            processor=processor,
        )
    return dict(sorted(found.items(), key=lambda pair: pair[1].offset))
