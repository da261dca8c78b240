"""What both forms of `ghost_apply` do with a tile: multiply, and finish rows."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def multiply(
    x,
    weight,
    rows,
    columns,
    start,
    end,
    num_tokens,
    hidden_size,
    NORMED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
):
    """Return x W^T of a tile over the inputs [start, end), and the rows' sums of squares; fp32."""
    row_exists = (rows < num_tokens)[:, None]
    column_exists = (columns < hidden_size)[:, None]
    inputs = start + tl.arange(0, BLOCK_INPUTS)
    x_tile = x + (rows.to(tl.int64)[:, None] * hidden_size + inputs[None, :])
    weight_tile = weight + (columns.to(tl.int64)[:, None] * hidden_size + inputs[None, :])
    change = tl.zeros((BLOCK_TOKENS, BLOCK_OUTPUTS), tl.float32)
    squares = tl.zeros((BLOCK_TOKENS,), tl.float32)
    for _ in range(start, end, BLOCK_INPUTS):
        values = tl.load(x_tile, mask=row_exists, other=0.0)
        matrix = tl.load(weight_tile, mask=column_exists, other=0).to(values.dtype)
        change = tl.dot(values, matrix.T, change)
        if NORMED:
            wide = values.to(tl.float32)
            squares += tl.sum(wide * wide, axis=1)
        x_tile += BLOCK_INPUTS
        weight_tile += BLOCK_INPUTS
    return change, squares


@triton.jit
def finish(
    change,
    squares,
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
    NORMED: tl.constexpr,
):
    """Return y [R, C] in x's dtype from x W^T [R, C] fp32 and the rows' sums of squares [R]."""
    row_exists = rows < num_tokens
    column_exists = columns < hidden_size
    offsets = rows.to(tl.int64)[:, None] * hidden_size + columns[None, :]
    if scale is not None:
        change *= tl.load(scale + columns, mask=column_exists, other=0.0)[None, :]
    if NORMED:
        change *= tl.rsqrt(squares / hidden_size + norm_eps)[:, None]
    exists = row_exists[:, None] & column_exists[None, :]
    value = tl.load(x + offsets, mask=exists, other=0.0).to(tl.float32) + change
    if bias is not None:
        value += tl.load(bias + columns, mask=column_exists, other=0.0).to(tl.float32)[None, :]
    y = value.to(x.dtype.element_ty)
    if first_state is not None:
        state = tl.load(first_state + columns, mask=column_exists, other=0.0).to(tl.float32)
        chosen = tl.load(is_first + rows, mask=row_exists, other=0) != 0
        y = tl.where(chosen[:, None], state.to(y.dtype)[None, :], y)
    return y
