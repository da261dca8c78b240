"""Who is faster where: the measured crossings of the processor's kernels, in one table.

A ghost gives its weight to the compiled kernel packed, or as it lies, [out, in]. Of a plain ghost,
which is x and a weight that lies, torch has a product too, and where that is faster it is called.
Whatever else a ghost has, a norm, a bias, int8 or a first state, costs torch passes of its own.
"""

from __future__ import annotations

import functools
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ghosted_fast.ops.compiled import extension
from ghosted_fast.ops.packing import PACKED_DTYPES


class Choice(NamedTuple):
    """What is fastest for some numbers of rows and hidden sizes.

    Attributes:
        weight: How a ghost gives its weight, "packed" or "as it lies".
        lying: What multiplies with a weight that lies, "native" or "torch".
    """

    weight: str
    lying: str


PACKED = Choice("packed", "native")
LYING = Choice("as it lies", "native")
PACKED_OR_TORCH = Choice("packed", "torch")
TORCH = Choice("as it lies", "torch")


@dataclass(frozen=True)
class Crossings:
    """What is fastest, for any number of rows and any hidden size.

    Attributes:
        choices: A line for each range of hidden sizes, in it a choice for each range of rows.
        rows: The last number of each range of rows but the last, which has no end.
        sizes: The first of each range of hidden sizes but the first, which begins with 1.
    """

    choices: tuple[tuple[Choice, ...], ...]
    rows: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()

    def at(self, rows: int, size: int) -> Choice:
        """Return what is fastest for so many rows of a hidden size."""
        return self.choices[bisect_right(self.sizes, size)][bisect_left(self.rows, rows)]

    def cells(self) -> Iterator[tuple[str, str, Choice]]:
        """Yield the ranges of hidden sizes and of rows, and what is fastest there."""
        firsts = [1, *(last + 1 for last in self.rows)]
        for size, line in zip(_ranges([1, *self.sizes]), self.choices, strict=True):
            kept = [i for i, choice in enumerate(line) if i == 0 or choice != line[i - 1]]
            counts = _ranges([firsts[i] for i in kept])
            for count, i in zip(counts, kept, strict=True):
                yield size, count, line[i]


def _ranges(firsts: Sequence[int]) -> list[str]:
    """Return ranges of whole numbers as text, given the first of each; the last has no end."""
    if len(firsts) == 1:
        return ["any"]
    lasts = [first - 1 for first in firsts[1:]]
    named = [f"{a}-{b}" if a < b else f"{a}" for a, b in zip(firsts, lasts, strict=False)]
    return [*named, f"{firsts[-1]} or more"]


_BF16, _FP16, _FP32 = DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# By path of the processor and dtype. What is not named was not measured, or has no crossing.
#
# On two shared cores of a Xeon with AMX (family 6, model 167), torch 2.13: calls of each in turn,
# by the time of their thread. Sizes: 576, 1024, 2048. Weights came from memory up to 96 rows. The
# compiled kernel over the best torch expression, packed and as it lies, at d = 576 / 1024 / 2048 in
# fp32: 1 row 1.07, 1.06 / 0.93, 1.13 / 0.77, 1.06; 8 rows 1.60, 1.26 / - / 2.52, 2.67; 16 rows
# 1.61, 0.88 / 1.96, 1.36 / 1.80, 1.26; 128 rows 0.97, 0.89 / 1.02, 0.93 / -; 512 rows 0.89, 0.87 /
# 0.90, 0.90 / 0.80, 0.79. In fp16: 48 rows 1.13 / - / 0.98, 96 or 128 rows 1.07 / 1.02 / 0.95, 512
# rows 0.95 / 0.94 / 0.90. In bf16 neither form was slower than torch beyond the noise. That of bf16
# which is the faster one, up to d = 4096, and that of 1 row of d = 576 in fp32 on two threads, were
# measured on an Emerald Rapids.
CROSSINGS: Mapping[tuple[str, torch.dtype], Crossings] = {
    ("amx", _BF16): Crossings(
        rows=(48,),
        sizes=(2048,),
        choices=(
            (PACKED, PACKED),
            (LYING, PACKED),
        ),
    ),
    ("amx", _FP16): Crossings(
        rows=(48, 256),
        sizes=(512, 2048),
        choices=(
            (LYING, LYING, LYING),
            (LYING, LYING, TORCH),
            (LYING, TORCH, TORCH),
        ),
    ),
    ("amx", _FP32): Crossings(
        rows=(1, 8, 48, 128, 256),
        sizes=(512, 1024, 2048),
        choices=(
            (PACKED, PACKED, PACKED, PACKED, PACKED, PACKED),
            (LYING, PACKED, PACKED_OR_TORCH, PACKED_OR_TORCH, TORCH, TORCH),
            (LYING, PACKED, PACKED, PACKED_OR_TORCH, TORCH, TORCH),
            (LYING, LYING, PACKED, PACKED, PACKED_OR_TORCH, TORCH),
        ),
    ),
}
_COMPILED = {
    dtype: Crossings(((PACKED if dtype in PACKED_DTYPES else LYING,),)) for dtype in DTYPES
}


def crossings_of(path: str, dtype: torch.dtype) -> Crossings:
    """Return the crossings of a path of the processor and a dtype of hidden states."""
    return CROSSINGS.get((path, dtype), _COMPILED[dtype])


@functools.cache
def _crossings_here(dtype: torch.dtype) -> Crossings | None:
    """Return the crossings on this processor; None without the extension, or of other dtypes."""
    module = extension()
    if module is None or dtype not in DTYPES:
        return None
    return crossings_of(module.cpu_path(), dtype)


@functools.cache
def _is_handed_over(dtype: torch.dtype) -> bool:
    """Return whether torch is the faster one anywhere."""
    crossings = _crossings_here(dtype)
    lines = () if crossings is None else crossings.choices
    return any(choice.lying == "torch" for line in lines for choice in line)


def is_faster_packed(dtype: torch.dtype, size: int, rows: int, is_plain: bool = True) -> bool:
    """Return whether `ghost_apply` on this processor is fastest with a packed weight.

    Args:
        dtype: Of the weight, bf16 or fp32.
        size: The hidden size.
        rows: How many hidden states there are.
        is_plain: Whether the ghost is x and a weight; of others nothing is left to torch.
    """
    crossings = _crossings_here(dtype)
    if crossings is None:
        return False
    choice = crossings.at(rows, size)
    return choice.weight == "packed" or (choice == TORCH and not is_plain)


def is_left_to_torch(x: Tensor, weight: Tensor, others: Iterable[object]) -> bool:
    """Return whether torch is the faster one for operands of `ghost_apply` on the processor.

    Args:
        x: Hidden states.
        weight: The weight.
        others: What else there is; of a plain ghost all are None.
    """
    if not _is_handed_over(x.dtype) or weight.dim() != 2 or not x.dim():
        return False
    if any(other is not None for other in others) or weight.dtype != x.dtype:
        return False
    if not x.is_cpu or not x.numel():
        return False
    crossings, size = _crossings_here(x.dtype), x.shape[-1]
    if crossings is None or crossings.at(x.numel() // size, size).lying != "torch":
        return False
    return x.dtype != torch.float32 or _is_fp32_whole()


def _is_fp32_whole() -> bool:
    """Return whether torch multiplies fp32 as it is, and was told nothing of less precision."""
    backends: Any = torch.backends  # some of it is not known to type checkers
    mkldnn = backends.mkldnn
    told = {backends.fp32_precision, mkldnn.fp32_precision, mkldnn.matmul.fp32_precision}
    return told <= {"none", "ieee"}


class Cell(NamedTuple):
    """Numbers of rows and hidden sizes on this processor, and what is fastest there; as text."""

    dtype: str
    hidden_size: str
    rows: str
    weight: str
    lying: str


def cells_here() -> list[Cell]:
    """Return what is chosen on this processor; nothing where torch does all."""
    return [
        Cell(str(dtype).removeprefix("torch."), size, rows, *choice)
        for dtype in DTYPES
        if (crossings := _crossings_here(dtype)) is not None
        for size, rows, choice in crossings.cells()
    ]
