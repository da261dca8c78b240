"""What every function of the library takes as `batches`, brought into one form."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ghosted_fast.errors import ArgumentError

# Inputs of models that read more than text, by how their names begin.
_OTHER_INPUTS = ("pixel_", "image_", "input_features", "audio_", "video_", "input_audio")


@dataclass(frozen=True)
class Batch:
    """Token sequences of one length.

    Attributes:
        input_ids: [batch, length] int64.
        attention_mask: [batch, length] int64, 1 where a token is attended, 0 for padding.
    """

    input_ids: Tensor
    attention_mask: Tensor

    @property
    def num_tokens(self) -> int:
        """Attended tokens."""
        return int(self.attention_mask.sum())

    @property
    def is_first(self) -> Tensor:
        """[batch, length] bool: the first attended token of each row."""
        attended = self.attention_mask.bool()
        return attended & (attended.cumsum(-1) == 1)

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on a device."""
        return Batch(self.input_ids.to(device), self.attention_mask.to(device))

    def rows(self, selected: Tensor) -> Batch:
        """Return the batch of some of the rows, given by their indices."""
        return Batch(self.input_ids[selected], self.attention_mask[selected])


def iterate_batches(
    batches: Iterable[Any], device: torch.device | str | None = None
) -> Iterator[Batch]:
    """Yield each batch with its attention mask, on a device.

    Args:
        batches: Dicts (or transformers' BatchEncoding) with `input_ids` and optionally
            `attention_mask`, or token tensors [batch, length] or [length].
        device: Where the tensors go. Default: where they are.

    Raises:
        ArgumentError: An element is none of these, or its shapes do not fit.
    """
    if isinstance(batches, Tensor | Mapping):
        raise ArgumentError(
            f"expected an iterable of batches, got one {type(batches).__name__}: put it into a list"
        )
    mask: Tensor | None
    for index, item in enumerate(batches):
        if isinstance(item, Batch):
            ids, mask = item.input_ids, item.attention_mask
        elif isinstance(item, Mapping):
            if "input_ids" not in item:
                raise ArgumentError(
                    f"expected batch {index} to have input_ids, got the keys {sorted(item)}"
                )
            others = sorted(key for key in item if key.startswith(_OTHER_INPUTS))
            if others:
                raise ArgumentError(
                    f"expected batch {index} to hold text alone, got {others}: models that read "
                    "pictures or sound too are calibrated and measured on text"
                )
            ids, mask = item["input_ids"], item.get("attention_mask")
        else:
            ids, mask = item, None
        if not isinstance(ids, Tensor) or ids.dim() not in (1, 2) or ids.is_floating_point():
            got = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids)
            raise ArgumentError(
                f"expected batch {index} to hold token ids [batch, length], got {got}"
            )
        ids = torch.atleast_2d(ids).to(device=device, dtype=torch.int64)
        if mask is None:
            mask = torch.ones_like(ids)
        mask = torch.atleast_2d(mask).to(device=device, dtype=torch.int64)
        if mask.shape != ids.shape:
            raise ArgumentError(
                f"expected the attention_mask of batch {index} to have the shape of input_ids "
                f"{list(ids.shape)}, got {list(mask.shape)}"
            )
        yield Batch(ids, mask)
