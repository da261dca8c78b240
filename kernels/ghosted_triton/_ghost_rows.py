"""What both forms of `ghost_apply` do with a tile: read weights, finish rows, take their norm."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def weight_values(raw, dtype: tl.constexpr, IS_FP8: tl.constexpr):
    """Return a tile of stored weights in x's dtype, exactly.

    e4m3 has an exponent of 4 bits and 3 of mantissa: moved to fp32's place it is off by the
    difference of the biases, 127 - 7, subnormal numbers included. No instruction of one
    architecture is needed.
    """
    if IS_FP8:
        bits = raw.to(tl.int32)
        moved = ((bits & 0x7F) << 20) | ((bits & 0x80) << 24)
        value = moved.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
        return tl.where((bits & 0x7F) == 0x7F, float("nan"), value).to(dtype)
    return raw.to(dtype)


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


@triton.jit
def rms_normed(y, norm_weight, columns, hidden_size, eps):
    """Return the RMS norm of rounded rows y [1, C] that hold the whole hidden size."""
    value = y.to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value, axis=1) / hidden_size + eps)[:, None]
    weight = tl.load(norm_weight + columns, mask=columns < hidden_size, other=0.0)
    return (weight.to(tl.float32)[None, :] * value.to(y.dtype).to(tl.float32)).to(y.dtype)
