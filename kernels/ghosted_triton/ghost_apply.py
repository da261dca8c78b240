"""The ghost in a running model: y = x + s * r * (x W^T) + b, fp32 inside, rounded once.

Shapes: x [T, d] bf16 or fp16; W [d, d] as [out, in], in x's dtype or int8; s [d] fp32, the rows'
scales of an int8 weight; r [T] = 1 / sqrt(mean(x^2) + eps) for the normed form, from the same pass
over x that multiplies; rows marked first get a given vector.

Decode (T <= 16, `config.splits` > 1): split-K partial sums in fp32, then one kernel that adds them
in a fixed order and finishes a row. Otherwise a blocked product with all of it in its epilogue.

Bytes: d^2 weights + 4 T d activations + 8 splits T d partial sums, whose number is bounded so that
they stay below 2.5 % of the weights. Flops: 2 T d^2.
Accuracy: products of bf16 and fp16 are exact in fp32; int8 is exact in x's dtype. So the error is
that of one rounding and an fp32 sum. Results do not depend on the order of programs.

CUDA graphs: one or two launches on the current stream, scratch memory from torch's allocator, no
value is read back, the configuration depends on shapes alone: a capture replays correctly.

Source: Yun et al., arXiv 2605.15491 (the ghost); normed form, first state and kernels are ours.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ghosted_fast.kernels._ghost_rows import finish, multiply
from ghosted_fast.kernels._tuning import (
    ApplyConfig,
    apply_config,
    architecture,
    is_bound_by_products,
)

# FP contraction is off: the interpreter and the device then round at the same places.
FP_FUSION = False


@triton.jit
def ghost_partials_kernel(
    x,
    weight,
    partials,
    squares,
    num_tokens,
    hidden_size,
    inputs_per_split,
    NORMED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
):
    """Program (o, s): partials[s, :, tile o] = x[:, part s] W[tile o, part s]^T."""
    split = tl.program_id(1)
    rows = tl.arange(0, BLOCK_TOKENS)
    columns = tl.program_id(0) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    start = split * inputs_per_split
    change, row_squares = multiply(
        x,
        weight,
        rows,
        columns,
        start,
        tl.minimum(start + inputs_per_split, hidden_size),
        num_tokens,
        hidden_size,
        NORMED,
        BLOCK_TOKENS,
        BLOCK_OUTPUTS,
        BLOCK_INPUTS,
    )
    targets = (split.to(tl.int64) * num_tokens + rows[:, None]) * hidden_size + columns[None, :]
    exists = (rows < num_tokens)[:, None] & (columns < hidden_size)[None, :]
    tl.store(partials + targets, change, mask=exists)
    if NORMED:
        if tl.program_id(0) == 0:
            tl.store(squares + split * num_tokens + rows, row_squares, mask=rows < num_tokens)


@triton.jit
def ghost_finish_kernel(
    x,
    partials,
    squares,
    scale,
    bias,
    first_state,
    is_first,
    y,
    num_tokens,
    hidden_size,
    norm_eps,
    SPLITS: tl.constexpr,
    NORMED: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
):
    """Program (t, o): add the partial sums of row t in order and finish it."""
    row = tl.program_id(0) + tl.arange(0, 1)
    columns = tl.program_id(1) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    exists = (columns < hidden_size)[None, :]
    offsets = row.to(tl.int64)[:, None] * hidden_size + columns[None, :]
    size = tl.cast(num_tokens, tl.int64) * hidden_size
    change = tl.zeros((1, BLOCK_OUTPUTS), tl.float32)
    row_squares = tl.zeros((1,), tl.float32)
    for split in tl.static_range(SPLITS):
        change += tl.load(partials + split * size + offsets, mask=exists, other=0.0)
        if NORMED:
            row_squares += tl.load(squares + split * num_tokens + row)
    result = finish(
        change,
        row_squares,
        x,
        scale,
        bias,
        first_state,
        is_first,
        row,
        columns,
        num_tokens,
        hidden_size,
        norm_eps,
        NORMED,
    )
    tl.store(y + offsets, result, mask=exists)


@triton.jit
def ghost_gemm_kernel(
    x,
    weight,
    scale,
    bias,
    first_state,
    is_first,
    y,
    num_tokens,
    hidden_size,
    norm_eps,
    NORMED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One program per tile of y; GROUP rows of tiles are walked together, for the L2 cache."""
    token_tiles = tl.cdiv(num_tokens, BLOCK_TOKENS)
    output_tiles = tl.cdiv(hidden_size, BLOCK_OUTPUTS)
    group, place = tl.program_id(0) // (GROUP * output_tiles), tl.program_id(0)
    place -= group * GROUP * output_tiles
    height = tl.minimum(token_tiles - group * GROUP, GROUP)
    rows = (group * GROUP + place % height) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    columns = (place // height) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    change, row_squares = multiply(
        x,
        weight,
        rows,
        columns,
        0,
        hidden_size,
        num_tokens,
        hidden_size,
        NORMED,
        BLOCK_TOKENS,
        BLOCK_OUTPUTS,
        BLOCK_INPUTS,
    )
    result = finish(
        change,
        row_squares,
        x,
        scale,
        bias,
        first_state,
        is_first,
        rows,
        columns,
        num_tokens,
        hidden_size,
        norm_eps,
        NORMED,
    )
    offsets = rows.to(tl.int64)[:, None] * hidden_size + columns[None, :]
    row_exists = (rows < num_tokens)[:, None]
    tl.store(y + offsets, result, mask=row_exists & (columns < hidden_size)[None, :])


def _launch_splits(
    x: Tensor,
    weight: Tensor,
    finishing: tuple[Tensor | None, ...],
    y: Tensor,
    norm_eps: float | None,
    config: ApplyConfig,
    tile: dict[str, Any],
) -> None:
    num_tokens, hidden_size = x.shape
    blocks = hidden_size // config.block_inputs
    inputs_per_split = triton.cdiv(blocks, config.splits) * config.block_inputs
    splits = triton.cdiv(hidden_size, inputs_per_split)
    normed = norm_eps is not None
    partials = x.new_empty((splits, num_tokens, hidden_size), dtype=torch.float32)
    squares = x.new_empty((splits, num_tokens), dtype=torch.float32) if normed else None
    ghost_partials_kernel[(triton.cdiv(hidden_size, config.block_outputs), splits)](
        x, weight, partials, squares, num_tokens, hidden_size, inputs_per_split, **tile
    )
    block = min(triton.next_power_of_2(hidden_size), 512)
    ghost_finish_kernel[(num_tokens, triton.cdiv(hidden_size, block))](
        x,
        partials,
        squares,
        *finishing,
        y,
        num_tokens,
        hidden_size,
        norm_eps or 0.0,
        SPLITS=splits,
        NORMED=normed,
        BLOCK_OUTPUTS=block,
        num_warps=2,  # 64 threads of 8 outputs each: accesses of 128 bits
        enable_fp_fusion=FP_FUSION,
    )


def launch_ghost_apply(
    x: Tensor,
    weight: Tensor,
    finishing: tuple[Tensor | None, ...],
    y: Tensor,
    norm_eps: float | None,
    config: ApplyConfig,
) -> None:
    """Launch the kernels on the current stream.

    Args:
        x: [T, d], contiguous, T > 0.
        weight: [d, d], contiguous.
        finishing: scale, bias, first_state and is_first (as uint8), each contiguous or None.
        y: Like x; written.
        norm_eps: Of the normed form.
        config: How the product is cut up.
    """
    num_tokens, hidden_size = x.shape
    too_many = config.splits > 1 and num_tokens > config.block_tokens
    if hidden_size % config.block_inputs or too_many:
        raise ValueError(f"expected a config that fits x of shape {list(x.shape)}, got {config}")
    tile = {
        "NORMED": norm_eps is not None,
        "BLOCK_TOKENS": config.block_tokens,
        "BLOCK_OUTPUTS": config.block_outputs,
        "BLOCK_INPUTS": config.block_inputs,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": FP_FUSION,
    }
    if config.splits > 1:
        _launch_splits(x, weight, finishing, y, norm_eps, config, tile)
        return
    tiles = triton.cdiv(num_tokens, config.block_tokens)
    tiles *= triton.cdiv(hidden_size, config.block_outputs)
    ghost_gemm_kernel[(tiles,)](
        x,
        weight,
        *finishing,
        y,
        num_tokens,
        hidden_size,
        norm_eps or 0.0,
        GROUP=config.group,
        **tile,
    )


def refusal(x: Tensor, weight: Tensor) -> str:
    """Return why these kernels do not serve the tensors; empty if they do."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"expected x in bfloat16 or float16, got {x.dtype}"
    if x.shape[-1] % 64:
        return f"expected a hidden_size that is a multiple of 64, got {x.shape[-1]}"
    if not weight.is_contiguous():
        return f"expected a contiguous weight, got strides {list(weight.stride())}"
    if (x.is_contiguous() and x.data_ptr() % 16) or weight.data_ptr() % 16:
        return "expected x and weight at addresses that are multiples of 16"
    return ""


def is_slower_than_torch(x: Tensor, weight: Tensor) -> bool:
    """Return whether cuBLAS is expected to have a plain ghost of these tensors faster.

    Where memory is the bound both are at it. Where the products are, a kernel without TMA or
    warp specialisation falls short of cuBLAS. Neither has been measured.
    """
    if weight.dtype != x.dtype:
        return False
    rows = x.numel() // x.shape[-1]
    return is_bound_by_products(architecture(x.device), rows, x.shape[-1])


def ghost_apply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    norm_eps: float | None = None,
    first_state: Tensor | None = None,
    is_first: Tensor | None = None,
    *,
    config: ApplyConfig | None = None,
) -> Tensor:
    """Return y. Arguments: see `ops.ghost_apply`; `config` overrides the tuning table."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y = rows.new_empty(rows.shape)
    if rows.numel():
        chosen = None if is_first is None else is_first.contiguous().view(torch.uint8)
        vectors = [v if v is None else v.contiguous() for v in (scale, bias, first_state)]
        config = config or apply_config(
            architecture(x.device), *rows.shape, weight.element_size(), norm_eps is not None
        )
        launch_ghost_apply(rows, weight, (*vectors, chosen), y, norm_eps, config)
    return y.view(x.shape)
