"""One tile of `gram_update`: products of bf16 parts, summed in fp32, promoted to fp64."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _part(value, PART: tl.constexpr):
    """Return part number PART of fp32 values: what bf16 holds of the rest after PART parts."""
    for _ in tl.static_range(PART):
        value -= value.to(tl.bfloat16).to(tl.float32)
    return value.to(tl.bfloat16)


@triton.jit
def _product(left, right, LEFT_PARTS: tl.constexpr, RIGHT_PARTS: tl.constexpr):
    """Return left right in bf16 parts: left [., tokens] any float, right [tokens, .] fp32.

    Parts i and j meet at 2^(-8 (i + j)) of the product: beyond i + j = 2 nothing reaches fp32. The
    small products have a sum of their own, so that the adders cut them where they are small.
    """
    small = tl.zeros((left.shape[0], right.shape[1]), tl.float32)
    for j in tl.static_range(RIGHT_PARTS - 1, -1, -1):
        for i in tl.static_range(LEFT_PARTS - 1, -1, -1):
            if i + j <= 2 and i + j > 0:
                small = tl.dot(_left_part(left, i, LEFT_PARTS), _part(right, j), small)
    return small + _separate_dot(_left_part(left, 0, LEFT_PARTS), _part(right, 0))


@triton.jit
def _left_part(left, PART: tl.constexpr, PARTS: tl.constexpr):
    """Return a part of x, which is whole where there is one."""
    if PARTS == 1:
        return left
    return _part(left.to(tl.float32), PART)


@triton.jit
def _separate_dot(left, right):
    """Return left right as a sum of its own.

    The bound keeps the compiler from folding a later addition into the product: the adders of
    tensor cores truncate, so a long chain of sums in them drifts.
    """
    return tl.dot(left, right, max_num_imprecise_acc=left.shape[1])


@triton.jit
def _promote(
    total,
    sums,
    first_row,
    first_column,
    height,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LOWER: tl.constexpr,
    SLICES: tl.constexpr,
):
    """Add a tile in fp32 to the fp64 sums, one slice of its columns after the other.

    Values above the diagonal are written back as they were: a mask there would split the 128-bit
    accesses, and no other program has a part in the tile.
    """
    if SLICES > 1:
        half: tl.constexpr = COLUMNS // 2
        left, right = total.reshape((ROWS, 2, half)).permute((0, 2, 1)).split()
        _promote(left, sums, first_row, first_column, height, width, ROWS, half, LOWER, SLICES // 2)
        _promote(
            right,
            sums,
            first_row,
            first_column + half,
            height,
            width,
            ROWS,
            half,
            LOWER,
            SLICES // 2,
        )
    else:
        rows = first_row + tl.arange(0, ROWS)
        columns = first_column + tl.arange(0, COLUMNS)
        exists = (rows < height)[:, None] & (columns < width)[None, :]
        targets = sums + (rows.to(tl.int64)[:, None] * width + columns[None, :])
        before = tl.load(targets, mask=exists, other=0.0)
        after = before + total.to(tl.float64)
        if LOWER:
            after = tl.where(columns[None, :] <= rows[:, None], after, before)
        tl.store(targets, after, mask=exists)


@triton.jit
def accumulate(
    x,
    other,
    subtracted,
    factor,
    sums,
    row_tile,
    column_tile,
    num_tokens,
    hidden_size,
    width,
    x_stride,
    other_stride,
    LOWER: tl.constexpr,
    EXACT: tl.constexpr,
    X_PARTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    PROMOTE_TOKENS: tl.constexpr,
    SLICES: tl.constexpr,
):
    """Add sum factor x other^T, or x (other - subtracted)^T, of one tile to the fp64 sums."""
    rows = row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = column_tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    row_exists, column_exists = (rows < hidden_size)[:, None], (columns < width)[None, :]
    for chunk in range(0, num_tokens, PROMOTE_TOKENS):
        total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        for start in range(chunk, tl.minimum(chunk + PROMOTE_TOKENS, num_tokens), BLOCK_TOKENS):
            tokens = start + tl.arange(0, BLOCK_TOKENS)
            kept = tokens < num_tokens
            if factor is not None:
                factors = tl.load(factor + tokens, mask=kept, other=0.0)
                kept = factors > 0.0
            places = tokens.to(tl.int64)
            left = tl.load(
                x + (places[None, :] * x_stride + rows[:, None]),
                mask=kept[None, :] & row_exists,
                other=0.0,
            )
            wanted = kept[:, None] & column_exists
            right = tl.load(
                other + (places[:, None] * other_stride + columns[None, :]), mask=wanted, other=0.0
            )
            if EXACT:
                if factor is not None:
                    right = (right.to(tl.float32) * factors[:, None]).to(right.dtype)
                total += _separate_dot(left, right)
            else:
                change = right.to(tl.float32)
                if subtracted is not None:
                    change -= tl.load(
                        subtracted + (places[:, None] * x_stride + columns[None, :]),
                        mask=wanted,
                        other=0.0,
                    ).to(tl.float32)
                if factor is not None:
                    change *= factors[:, None]
                total += _product(left, change, X_PARTS, 3)
        _promote(
            total,
            sums,
            row_tile * BLOCK_ROWS,
            column_tile * BLOCK_COLUMNS,
            hidden_size,
            width,
            BLOCK_ROWS,
            BLOCK_COLUMNS,
            LOWER,
            SLICES,
        )
