"""The weight of a ghost in the order in which the processor's kernels read it.

A packed weight is [panels of 16 outputs][inputs / n][16][n], where n numbers make four bytes: two
bf16 or one fp32. A kernel then reads one stream, whatever the number of rows that it serves.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ghosted_fast.errors import ArgumentError
from ghosted_fast.ops.compiled import extension

PANEL = 16
PACKED_DTYPES = (torch.bfloat16, torch.float32)
_DWORD_BYTES = 4
_HUGE_PAGE = 2 << 20


# Where the processor is given a weight as it lies, by path and dtype: from which hidden size on,
# and for how many rows at most. Everywhere else it is given the packed one. For 16 rows the tables
# of `bench-ops` say which is faster. For more, paired calls beside other work on an Emerald Rapids,
# at widths 2048 and 4096: 24 to 48 rows took 0.73 to 0.98 of the packed weight's time on one thread
# and 0.82 to 1.01 on two; 64 rows 1.00 to 1.06, and 96 rows 1.16 to 1.28.
AS_IT_LIES: dict[tuple[str, torch.dtype], tuple[int, int]] = {("amx", torch.bfloat16): (2048, 48)}


@functools.cache
def as_it_lies(dtype: torch.dtype) -> tuple[int, float]:
    """Return from which hidden size on, and for how many rows at most, packing does not pay here.

    Args:
        dtype: Of the weight, bf16 or fp32.
    """
    module = extension()
    return (0, math.inf) if module is None else AS_IT_LIES.get((module.cpu_path(), dtype), (0, 0))


def is_faster_packed(dtype: torch.dtype, size: int, rows: int) -> bool:
    """Return whether `ghost_apply` on this processor is faster with a packed weight.

    Args:
        dtype: Of the weight, bf16 or fp32.
        size: The hidden size.
        rows: How many hidden states there are.
    """
    least, most = as_it_lies(dtype)
    return rows > most or size < least


def how_weights_are_read() -> str:
    """Return for people how ghosts read their weights on this processor."""
    if extension() is None:
        return "as they lie, by torch"
    said = ["packed"]
    for dtype in PACKED_DTYPES:
        size, rows = as_it_lies(dtype)
        if rows:
            name = str(dtype).removeprefix("torch.")
            said.append(f"in {name} from {size} wide on as they lie, for up to {rows} rows")
    return "; ".join(said)


def packed_shape(size: int, dtype: torch.dtype) -> list[int]:
    """Return the shape of a packed weight [size, size]."""
    numbers = _DWORD_BYTES // dtype.itemsize
    return [-(-size // PANEL), -(-size // numbers), PANEL, numbers]


def pack_weight(weight: Tensor) -> Tensor:
    """Return a copy of a ghost's weight that `ghost_apply` reads faster on the processor.

    Memory made of huge pages is asked for, which a stream of weights crosses at a fifth more speed.

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
    packed = _empty_on_huge_pages(shape, weight.dtype)
    return packed.copy_(padded.view(panels, PANEL, dwords, numbers).transpose(1, 2))


def unpack_weight(packed: Tensor, size: int) -> Tensor:
    """Return the weight [size, size] that was packed."""
    panels, dwords, _, numbers = packed.shape
    padded = packed.transpose(1, 2).reshape(panels * PANEL, dwords * numbers)
    return padded[:size, :size]


def _empty_on_huge_pages(shape: list[int], dtype: torch.dtype) -> Tensor:
    """Return an uninitialised tensor whose memory starts on a huge page and may consist of them."""
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    whole = -(-num_bytes // _HUGE_PAGE) * _HUGE_PAGE
    memory = torch.empty(whole + _HUGE_PAGE, dtype=torch.uint8)
    start = -memory.data_ptr() % _HUGE_PAGE
    module = extension()
    if module is not None:
        module.advise_huge_pages(memory.data_ptr() + start, whole)
    return memory[start : start + num_bytes].view(dtype).view(shape)
