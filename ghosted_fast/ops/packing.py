"""The weight of a ghost in the order in which the processor's kernels read it.

A packed weight is [panels of 16 outputs][inputs / n][16][n], where n numbers make four bytes: two
bf16 or one fp32. A kernel then reads one stream, whatever the number of rows that it serves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ghosted_fast.errors import ArgumentError
from ghosted_fast.ops.compiled import extension

PANEL = 16
PACKED_DTYPES = (torch.bfloat16, torch.float32)
_DWORD_BYTES = 4
_HUGE_PAGE = 2 << 20
# From so many bytes on a weight gets huge pages: what is smaller stays in a cache, and would take
# many times its own memory.
_LEAST_ON_HUGE_PAGES = _HUGE_PAGE // 8


def packed_shape(size: int, dtype: torch.dtype) -> list[int]:
    """Return the shape of a packed weight [size, size]."""
    numbers = _DWORD_BYTES // dtype.itemsize
    return [-(-size // PANEL), -(-size // numbers), PANEL, numbers]


def pack_weight(weight: Tensor) -> Tensor:
    """Return a copy of a ghost's weight that `ghost_apply` reads faster on the processor.

    For a weight of 256 KiB or more, memory made of huge pages is asked for, which a stream of
    weights crosses at a fifth more speed.

    Args:
        weight: [hidden_size, hidden_size] as [out, in], bf16 or fp32, on the processor.

    Returns:
        [ceil(hidden_size / 16), ceil(hidden_size / n), 16, n] in the dtype of the weight, n = 2 for
        bf16 and 1 for fp32; zeros beyond the weight. `ghost_apply` takes it in place of the weight.

    Raises:
        ArgumentError: The weight is not square, of another dtype, or on another device.

    Source: ours.
    """
    if weight.dim() != 2 or weight.shape[0] != weight.shape[1]:
        raise ArgumentError(f"pack_weight: expected a square weight, got {list(weight.shape)}")
    if weight.dtype not in PACKED_DTYPES or weight.device.type != "cpu":
        raise ArgumentError(
            "pack_weight: expected a bfloat16 or float32 weight on cpu, got "
            f"{weight.dtype} on {weight.device}; pass that weight to ghost_apply as it is"
        )
    size = len(weight)
    panels, dwords, _, numbers = shape = packed_shape(size, weight.dtype)
    padded = weight.detach()
    if panels * PANEL != size or dwords * numbers != size:
        padded = weight.new_zeros(panels * PANEL, dwords * numbers)
        padded[:size, :size] = weight.detach()
    packed = _empty(shape, weight.dtype)
    return packed.copy_(padded.view(panels, PANEL, dwords, numbers).transpose(1, 2))


def unpack_weight(packed: Tensor, size: int) -> Tensor:
    """Return the weight [size, size] that was packed."""
    panels, dwords, _, numbers = packed.shape
    padded = packed.transpose(1, 2).reshape(panels * PANEL, dwords * numbers)
    return padded[:size, :size]


def _empty(shape: list[int], dtype: torch.dtype) -> Tensor:
    """Return an uninitialised tensor; a large one starts on a huge page and may consist of them."""
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    if num_bytes < _LEAST_ON_HUGE_PAGES:
        return torch.empty(shape, dtype=dtype)
    whole = -(-num_bytes // _HUGE_PAGE) * _HUGE_PAGE
    memory = torch.empty(whole + _HUGE_PAGE, dtype=torch.uint8)
    start = -memory.data_ptr() % _HUGE_PAGE
    module = extension()
    if module is not None:
        module.advise_huge_pages(memory.data_ptr() + start, whole)
    return memory[start : start + num_bytes].view(dtype).view(shape)
