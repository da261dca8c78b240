"""Block sizes by architecture and shape: frozen tables, nothing is timed at run time.

A table that is chosen by shape alone gives the same bits on every run, works under CUDA graphs and
needs no warm-up. The figures are derived, not measured: registers and shared memory come from the
compiled machine code (tests/ghosted_triton/test_compiled_kernels.py holds them to the limits of
each architecture), the number of programs from the number of multiprocessors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

# Above this many rows a decode step is a small product: 16 rows are one tensor-core tile.
DECODE_TOKENS = 16
# Partial sums are written and read once, in fp32: at most this part of the weights' bytes.
_PARTIALS_SHARE = 0.025


@dataclass(frozen=True)
class ApplyConfig:
    """How `ghost_apply` is cut up.

    Attributes:
        block_tokens: Rows of a tile, a power of two >= 16.
        block_outputs: Columns of a tile, a power of two.
        block_inputs: Step along the inputs; divides the hidden size.
        num_warps: Warps of a program.
        num_stages: Steps in flight.
        splits: Parts the inputs are cut into; 1 for one pass. Above 1 there is one row of tiles.
        group: Rows of tiles that are walked together.
    """

    block_tokens: int
    block_outputs: int
    block_inputs: int
    num_warps: int
    num_stages: int
    splits: int = 1
    group: int = 8


@dataclass(frozen=True)
class GramConfig:
    """How `gram_update` is cut up.

    Attributes:
        block_rows: Rows of a tile of the sums, a power of two >= 16.
        block_columns: Its columns, a power of two >= 16 that divides `block_rows`.
        block_tokens: Tokens of a step, a power of two >= 16 that divides `promote_tokens`.
        num_warps: Warps of a program.
        num_stages: Steps in flight.
        slices: Parts of a tile that are promoted one after the other, to save registers.
        promote_tokens: Tokens accumulated in fp32 before they are added to the fp64 sums.
        inspect_rows: Tokens of a program that looks for what is not finite, a power of two.
    """

    block_rows: int
    block_columns: int
    block_tokens: int
    num_warps: int
    num_stages: int
    slices: int = 1
    promote_tokens: int = 256
    inspect_rows: int = 4


@dataclass(frozen=True)
class Architecture:
    """The configurations of one family of GPUs.

    Attributes:
        multiprocessors: Of the common large model; decides the number of splits.
        flops_per_byte: Of its data sheet: 16-bit dense products over bandwidth. Work with more per
            byte is bound by the tensor cores.
        decode: Up to `DECODE_TOKENS` rows, 16-bit weights.
        decode_narrow: The same for 8-bit weights.
        small: Up to 64 rows.
        prefill: More rows.
        prefill_narrow: The same for 8-bit weights, which are widened in registers.
        gram: Sums of operands that are exact as they are.
        gram_parts: Sums with one operand cut into parts.
        gram_wide: Sums with both cut into parts (x in fp16 or fp32).
    """

    multiprocessors: int
    flops_per_byte: float
    decode: ApplyConfig
    decode_narrow: ApplyConfig
    small: ApplyConfig
    prefill: ApplyConfig
    prefill_narrow: ApplyConfig
    gram: GramConfig
    gram_parts: GramConfig
    gram_wide: GramConfig


_SM80 = Architecture(
    multiprocessors=108,
    flops_per_byte=312e12 / 2.04e12,
    decode=ApplyConfig(16, 64, 128, 4, 4),
    decode_narrow=ApplyConfig(16, 128, 128, 8, 4),
    small=ApplyConfig(64, 64, 64, 4, 4),
    prefill=ApplyConfig(128, 128, 64, 8, 3),
    prefill_narrow=ApplyConfig(128, 64, 128, 8, 3),
    gram=GramConfig(128, 128, 16, 8, 4, slices=8),
    gram_parts=GramConfig(64, 64, 16, 4, 3, slices=4),
    gram_wide=GramConfig(64, 64, 16, 4, 3, slices=4),
)
_SM90 = replace(
    _SM80,
    multiprocessors=132,
    flops_per_byte=989e12 / 3.35e12,
    decode=ApplyConfig(16, 64, 64, 4, 5),
    prefill=ApplyConfig(128, 128, 64, 8, 4),
    gram=GramConfig(128, 64, 64, 8, 3, slices=4),
    gram_parts=GramConfig(128, 64, 32, 8, 3, slices=4),
    gram_wide=GramConfig(64, 64, 32, 8, 3, slices=2),
)
_TABLES: dict[int, Architecture] = {
    80: _SM80,
    # 99 KB of shared memory in place of 163 or 227: fewer stages.
    89: replace(
        _SM80,
        multiprocessors=128,
        flops_per_byte=165e12 / 1.01e12,
        prefill=ApplyConfig(128, 128, 32, 8, 3),
    ),
    90: _SM90,
    100: replace(
        _SM90,
        multiprocessors=148,
        flops_per_byte=2250e12 / 8.0e12,
        gram_wide=GramConfig(128, 64, 32, 8, 3, slices=8),
    ),
}
# The oldest first: a GPU uses the newest table that is not newer than itself.
ARCHITECTURES = tuple(_TABLES)


@cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def architecture(device: torch.device) -> int:
    """Return the key of the table for a device: 80, 89 (also sm_86), 90 or 100."""
    if device.type != "cuda":
        return 90  # the interpreters; any table gives the same values
    index = device.index if device.index is not None else torch.cuda.current_device()
    return table_key(_capability(index))


def table_key(capability: int) -> int:
    """Return the key of the table for a compute capability such as 86, 90 or 120.

    Consumer parts (8.6, 8.9, 12.x) have 99 KB of shared memory and share a table.
    """
    if capability in (86, 87, 89) or capability >= 120:
        return 89
    return max((key for key in (80, 90, 100) if key <= capability), default=80)


def apply_config(
    table: int, num_tokens: int, hidden_size: int, weight_bytes: int, normed: bool
) -> ApplyConfig:
    """Choose the configuration of `ghost_apply`.

    Args:
        table: A key of `ARCHITECTURES`.
        num_tokens: Rows of x, > 0.
        hidden_size: A multiple of 64.
        weight_bytes: Bytes of one element of the weight.
        normed: Whether the rows' norms are taken in the same pass.
    """
    known = _TABLES[table]
    if num_tokens <= DECODE_TOKENS:
        config = known.decode_narrow if weight_bytes == 1 else known.decode
        if hidden_size % config.block_inputs:
            config = replace(config, block_inputs=64)
        tiles = -(-hidden_size // config.block_outputs)
        wanted = -(-2 * known.multiprocessors // tiles)
        affordable = int(_PARTIALS_SHARE * hidden_size * weight_bytes / (8 * num_tokens))
        splits = max(1, min(wanted, affordable, hidden_size // config.block_inputs))
        if splits == 1:  # no partial sums: narrower tiles are what is left to fill the GPU
            config = replace(config, block_outputs=32, num_warps=2)
        return replace(config, splits=splits)
    if num_tokens <= 64:
        return known.small
    return known.prefill_narrow if weight_bytes == 1 or normed else known.prefill


def is_bound_by_products(table: int, num_tokens: int, hidden_size: int) -> bool:
    """Return whether a 16-bit ghost is bound by its products and not by memory, on paper.

    Arguments as for `apply_config`.
    """
    flops = 2.0 * num_tokens * hidden_size**2
    moved = 2.0 * hidden_size**2 + 4.0 * num_tokens * hidden_size
    return flops > _TABLES[table].flops_per_byte * moved


def gram_config(table: int, exact: bool, x_parts: int) -> GramConfig:
    """Choose the configuration of `gram_update`.

    Args:
        table: A key of `ARCHITECTURES`.
        exact: Whether no operand is cut into parts.
        x_parts: Parts of x if one is: 1 for bf16, 2 for fp16, 3 for fp32.
    """
    known = _TABLES[table]
    if exact:
        return known.gram
    return known.gram_parts if x_parts == 1 else known.gram_wide
