"""The ghost in a running model: y = x + s * r * (x W^T) + b, fp32 inside, rounded once.

Shapes: x [T, d] bf16 or fp16; W [d, d] as [out, in], in x's dtype, int8 or fp8 (e4m3, read as raw
bytes); s [d] fp32, the rows' scales of an int8 or fp8 weight; r [T] = 1 / sqrt(mean(x^2) + eps) for
the normed form, from the same pass over x that multiplies; rows marked first get a given vector.

Decode (T <= 16, `config.splits` > 1): split-K partial sums in fp32, then one kernel that adds them
in a fixed order, finishes a row and takes the next layer's RMS norm of the *rounded* row for free.
Otherwise a blocked product with all of it in its epilogue, and the norm from a kernel of its own.

Bytes: d^2 weights + 4 T d activations + 8 splits T d partial sums, whose number is bounded so that
they stay below 2.5 % of the weights. Flops: 2 T d^2.
Accuracy: products of bf16 and fp16 are exact in fp32; int8 and e4m3 are exact in x's dtype. So the
error is that of one rounding and an fp32 sum. Results do not depend on the order of programs.

CUDA graphs: two or three launches on the current stream, scratch memory from torch's allocator, no
value is read back, the configuration depends on shapes alone: a capture replays correctly.

Source: Yun et al., arXiv 2605.15491 (the ghost); normed form, first state and kernels are ours.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ghosted_fast.kernels._ghost_rows import finish, rms_normed, weight_values
from ghosted_fast.kernels._tuning import ApplyConfig, apply_config, architecture

# FP contraction is off: the interpreter and the device then round at the same places.
FP_FUSION = False
_NORM_WARPS = 8


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
    IS_FP8: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
):
    """Program (o, s): partials[s, :, tile o] = x[:, part s] W[tile o, part s]^T."""
    split = tl.program_id(1)
    rows = tl.arange(0, BLOCK_TOKENS)
    columns = tl.program_id(0) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    row_exists = (rows < num_tokens)[:, None]
    column_exists = (columns < hidden_size)[:, None]
    start = split * inputs_per_split
    inputs = start + tl.arange(0, BLOCK_INPUTS)
    x_tile = x + (rows.to(tl.int64)[:, None] * hidden_size + inputs[None, :])
    weight_tile = weight + (columns.to(tl.int64)[:, None] * hidden_size + inputs[None, :])
    change = tl.zeros((BLOCK_TOKENS, BLOCK_OUTPUTS), tl.float32)
    row_squares = tl.zeros((BLOCK_TOKENS,), tl.float32)
    for _ in range(start, tl.minimum(start + inputs_per_split, hidden_size), BLOCK_INPUTS):
        values = tl.load(x_tile, mask=row_exists, other=0.0)
        raw = tl.load(weight_tile, mask=column_exists, other=0)
        matrix = weight_values(raw, values.dtype, IS_FP8)
        change = tl.dot(values, matrix.T, change)
        if NORMED:
            wide = values.to(tl.float32)
            row_squares += tl.sum(wide * wide, axis=1)
        x_tile += BLOCK_INPUTS
        weight_tile += BLOCK_INPUTS
    targets = (split.to(tl.int64) * num_tokens + rows[:, None]) * hidden_size + columns[None, :]
    tl.store(partials + targets, change, mask=row_exists & (columns < hidden_size)[None, :])
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
    norm_weight,
    y,
    normed,
    num_tokens,
    hidden_size,
    norm_eps,
    eps,
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
    if norm_weight is not None:
        following = rms_normed(result, norm_weight, columns, hidden_size, eps)
        tl.store(normed + offsets, following, mask=exists)


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
    IS_FP8: tl.constexpr,
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
    row_exists = (rows < num_tokens)[:, None]
    column_exists = (columns < hidden_size)[:, None]
    inputs = tl.arange(0, BLOCK_INPUTS)
    x_tile = x + (rows.to(tl.int64)[:, None] * hidden_size + inputs[None, :])
    weight_tile = weight + (columns.to(tl.int64)[:, None] * hidden_size + inputs[None, :])
    change = tl.zeros((BLOCK_TOKENS, BLOCK_OUTPUTS), tl.float32)
    row_squares = tl.zeros((BLOCK_TOKENS,), tl.float32)
    for _ in range(0, hidden_size, BLOCK_INPUTS):
        values = tl.load(x_tile, mask=row_exists, other=0.0)
        raw = tl.load(weight_tile, mask=column_exists, other=0)
        matrix = weight_values(raw, values.dtype, IS_FP8)
        change = tl.dot(values, matrix.T, change)
        if NORMED:
            wide = values.to(tl.float32)
            row_squares += tl.sum(wide * wide, axis=1)
        x_tile += BLOCK_INPUTS
        weight_tile += BLOCK_INPUTS
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
    tl.store(y + offsets, result, mask=row_exists & (columns < hidden_size)[None, :])


@triton.jit
def rms_norm_kernel(y, norm_weight, normed, hidden_size, eps, BLOCK_OUTPUTS: tl.constexpr):
    """Program t: the RMS norm of row t."""
    row = tl.program_id(0) + tl.arange(0, 1)
    columns = tl.arange(0, BLOCK_OUTPUTS)
    exists = (columns < hidden_size)[None, :]
    offsets = row.to(tl.int64)[:, None] * hidden_size + columns[None, :]
    values = tl.load(y + offsets, mask=exists, other=0.0)
    result = rms_normed(values, norm_weight, columns, hidden_size, eps)
    tl.store(normed + offsets, result, mask=exists)


def launch_ghost_apply(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    bias: Tensor | None,
    scale: Tensor | None,
    norm_eps: float | None,
    first_state: Tensor | None,
    is_first: Tensor | None,
    y: Tensor,
    normed: Tensor | None,
    config: ApplyConfig,
) -> None:
    """Launch the kernels on the current stream. x, y, normed: [T, d], contiguous, T > 0."""
    num_tokens, hidden_size = x.shape
    if hidden_size % config.block_inputs or (
        config.splits > 1 and num_tokens > config.block_tokens
    ):
        raise ValueError(f"expected a config that fits x of shape {list(x.shape)}, got {config}")
    is_fp8 = weight.dtype == torch.float8_e4m3fn
    if weight.element_size() == 1:
        weight = weight.view(torch.uint8) if is_fp8 else weight
    chosen = None if is_first is None else is_first.contiguous().view(torch.uint8)
    normed_form, epsilon = norm_eps is not None, norm_eps or 0.0
    whole_row = triton.next_power_of_2(hidden_size)
    tile = {
        "NORMED": normed_form,
        "IS_FP8": is_fp8,
        "BLOCK_TOKENS": config.block_tokens,
        "BLOCK_OUTPUTS": config.block_outputs,
        "BLOCK_INPUTS": config.block_inputs,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": FP_FUSION,
    }
    output_tiles = triton.cdiv(hidden_size, config.block_outputs)
    if config.splits == 1:
        tiles = triton.cdiv(num_tokens, config.block_tokens) * output_tiles
        ghost_gemm_kernel[(tiles,)](
            x,
            weight,
            scale,
            bias,
            first_state,
            chosen,
            y,
            num_tokens,
            hidden_size,
            epsilon,
            GROUP=config.group,
            **tile,
        )
        if norm_weight is not None:
            rms_norm_kernel[(num_tokens,)](
                y,
                norm_weight,
                normed,
                hidden_size,
                eps,
                BLOCK_OUTPUTS=whole_row,
                num_warps=_NORM_WARPS,
                enable_fp_fusion=FP_FUSION,
            )
        return
    blocks = hidden_size // config.block_inputs
    inputs_per_split = triton.cdiv(blocks, config.splits) * config.block_inputs
    splits = triton.cdiv(hidden_size, inputs_per_split)
    partials = x.new_empty((splits, num_tokens, hidden_size), dtype=torch.float32)
    squares = x.new_empty((splits, num_tokens), dtype=torch.float32) if normed_form else None
    ghost_partials_kernel[(output_tiles, splits)](
        x, weight, partials, squares, num_tokens, hidden_size, inputs_per_split, **tile
    )
    # A row's norm needs the row in one program; without it the columns are shared out.
    block = whole_row if norm_weight is not None else min(whole_row, 512)
    ghost_finish_kernel[(num_tokens, triton.cdiv(hidden_size, block))](
        x,
        partials,
        squares,
        scale,
        bias,
        first_state,
        chosen,
        norm_weight,
        y,
        normed,
        num_tokens,
        hidden_size,
        epsilon,
        eps,
        SPLITS=splits,
        NORMED=normed_form,
        BLOCK_OUTPUTS=block,
        num_warps=_NORM_WARPS if norm_weight is not None else 4,
        enable_fp_fusion=FP_FUSION,
    )


def _apply(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    bias: Tensor | None,
    scale: Tensor | None,
    norm_eps: float | None,
    first_state: Tensor | None,
    is_first: Tensor | None,
    config: ApplyConfig | None,
) -> tuple[Tensor, Tensor | None]:
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y = rows.new_empty(rows.shape)
    normed = None if norm_weight is None else rows.new_empty(rows.shape)
    if rows.numel():
        config = config or apply_config(
            architecture(x.device), *rows.shape, weight.element_size(), norm_eps is not None
        )
        launch_ghost_apply(
            rows,
            weight,
            norm_weight,
            eps,
            bias if bias is None else bias.contiguous(),
            scale if scale is None else scale.contiguous(),
            norm_eps,
            first_state if first_state is None else first_state.contiguous(),
            is_first,
            y,
            normed,
            config,
        )
    return y.view(x.shape), None if normed is None else normed.view(x.shape)


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
    """Return y. Arguments: see `ops.ghost.ghost_apply`; `config` overrides the tuning table."""
    return _apply(x, weight, None, 0.0, bias, scale, norm_eps, first_state, is_first, config)[0]


def ghost_apply_rms_norm(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    eps: float,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    norm_eps: float | None = None,
    first_state: Tensor | None = None,
    is_first: Tensor | None = None,
    *,
    config: ApplyConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (y, normed). Arguments: see `ops.ghost.ghost_apply_rms_norm`, and `config` above."""
    y, normed = _apply(
        x,
        weight,
        norm_weight.contiguous(),
        eps,
        bias,
        scale,
        norm_eps,
        first_state,
        is_first,
        config,
    )
    assert normed is not None
    return y, normed
