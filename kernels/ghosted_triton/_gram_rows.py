"""What `gram_update` does token by token: find what is not finite, the norms, and the moments.

`problems` [4] int32 holds, for x, y and the weights, the smallest token that is not finite (or a
weight below 0), and the smallest whose weight is no power of two; the number of tokens where there
is none. Smallest: an atomic minimum does not depend on the order of programs.

Moments [3, d] fp64 += sum w f, sum w (y - x), sum w (y - x)^2, summed in fp64, a program per strip
of columns, in the order of the tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _row_problems(rows_pointer, stride, width, rows, kept, BLOCK: tl.constexpr):
    """Return, for kept rows, whether a value is not finite, and the sum of squares in fp64."""
    bad = tl.zeros(rows.shape, tl.int32)
    squares = tl.zeros(rows.shape, tl.float64)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        exists = kept[:, None] & (columns < width)[None, :]
        offsets = rows.to(tl.int64)[:, None] * stride + columns[None, :]
        values = tl.load(rows_pointer + offsets, mask=exists, other=0.0).to(tl.float32)
        finite = tl.abs(values) < float("inf")
        bad = tl.maximum(bad, tl.max(tl.where(finite, 0, 1), axis=1))
        wide = values.to(tl.float64)
        squares += tl.sum(wide * wide, axis=1)
    return bad != 0, squares


@triton.jit
def gram_inspect_kernel(
    x,
    y,
    token_weight,
    gram_factor,
    cross_factor,
    problems,
    num_tokens,
    hidden_size,
    outputs,
    x_stride,
    y_stride,
    norm_eps,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Program t: the factors of some rows, and the first row with each problem."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    exists = rows < num_tokens
    nothing = tl.zeros(rows.shape, tl.int32) + num_tokens
    if token_weight is not None:
        weight = tl.load(token_weight + rows, mask=exists, other=0.0)
        usable = (weight >= 0.0) & (weight < float("inf"))
        first = tl.min(tl.where(usable, nothing, rows), axis=0)
        tl.atomic_min(problems + 2, first, sem="relaxed")
        # A power of two has no fraction; below 2^-126 its leading bit is in the fraction.
        fraction = weight.to(tl.int32, bitcast=True) & 0x7FFFFF
        inexact = tl.min(tl.where(fraction != 0, rows, nothing), axis=0)
        tl.atomic_min(problems + 3, inexact, sem="relaxed")
        weight = tl.where(usable, weight, 0.0)
    else:
        weight = tl.where(exists, 1.0, 0.0)
    kept = weight > 0.0
    bad, squares = _row_problems(x, x_stride, hidden_size, rows, kept, BLOCK_COLUMNS)
    tl.atomic_min(problems, tl.min(tl.where(bad, rows, nothing), axis=0), sem="relaxed")
    if y is not None:
        bad, _ = _row_problems(y, y_stride, outputs, rows, kept, BLOCK_COLUMNS)
        tl.atomic_min(problems + 1, tl.min(tl.where(bad, rows, nothing), axis=0), sem="relaxed")
    if gram_factor is not None:
        inverse = 1.0 / tl.sqrt(squares / hidden_size + norm_eps)
        tl.store(gram_factor + rows, (weight * inverse * inverse).to(tl.float32), mask=exists)
        tl.store(cross_factor + rows, (weight * inverse).to(tl.float32), mask=exists)


@triton.jit
def tokens_to_add(problems, num_tokens):
    """Return the number of tokens, or 0 if one of them must not be added."""
    problem = tl.minimum(tl.load(problems), tl.load(problems + 1))
    problem = tl.minimum(problem, tl.load(problems + 2))
    return tl.where(problem < num_tokens, 0, num_tokens)


@triton.jit
def gram_moments_kernel(
    x,
    y,
    token_weight,
    feature_factor,
    problems,
    moments,
    num_tokens,
    hidden_size,
    x_stride,
    y_stride,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Program c: the moments of a strip of columns."""
    columns = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    column_exists = columns < hidden_size
    features = tl.zeros((BLOCK_COLUMNS,), tl.float64)
    changes = tl.zeros((BLOCK_COLUMNS,), tl.float64)
    energies = tl.zeros((BLOCK_COLUMNS,), tl.float64)
    for start in range(0, tokens_to_add(problems, num_tokens), BLOCK_TOKENS):
        tokens = start + tl.arange(0, BLOCK_TOKENS)
        kept = tokens < num_tokens
        if token_weight is not None:
            weight = tl.load(token_weight + tokens, mask=kept, other=0.0).to(tl.float64)[:, None]
            kept = tl.load(token_weight + tokens, mask=kept, other=0.0) > 0.0
        exists = kept[:, None] & column_exists[None, :]
        places = tokens.to(tl.int64)[:, None]
        inputs = tl.load(x + (places * x_stride + columns[None, :]), mask=exists, other=0.0)
        wide = inputs.to(tl.float64)
        feature = wide
        if feature_factor is not None:
            factor = tl.load(feature_factor + tokens, mask=kept, other=0.0).to(tl.float64)
            feature = wide * factor[:, None]
        features += tl.sum(feature, axis=0)
        if y is not None:
            outputs = tl.load(y + (places * y_stride + columns[None, :]), mask=exists, other=0.0)
            change = outputs.to(tl.float64) - wide
            weighted = change
            if token_weight is not None:
                weighted = change * weight
            changes += tl.sum(weighted, axis=0)
            energies += tl.sum(weighted * change, axis=0)
    targets = moments + columns
    tl.store(targets, tl.load(targets, mask=column_exists) + features, mask=column_exists)
    if y is not None:
        targets += hidden_size
        tl.store(targets, tl.load(targets, mask=column_exists) + changes, mask=column_exists)
        targets += hidden_size
        tl.store(targets, tl.load(targets, mask=column_exists) + energies, mask=column_exists)
