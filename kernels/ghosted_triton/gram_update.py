"""Sums of products: G += sum w f f^T (lower triangle), C += sum w f t^T, and moments, in place.

f = x, or x r with r = 1 / sqrt(mean(x^2) + eps); t = y, or y - x (taken in fp32).
Shapes: x [T, d], y [T, m]; G [d, d], C [d, m], moments [3, d] in fp64; w [T] fp32.

Three kernels. The first (`_gram_rows.py`) reads x and y once: it finds what is not finite, and
folds weight and norm into one factor per token and sum (w r^2 for G, w r for C). The second has one
program per tile: the tiles on and below G's diagonal and all tiles of C, in one launch. Each
accumulates at most 256 tokens in fp32, then adds to its tile of the fp64 sums, which nobody else
touches: the same bits on every run. The third sums the moments of each column, in fp64.

The factor multiplies the second operand alone. A factor that is a power of two, as the default
weights are, leaves bf16 exact. Any other operand (normed features, other weights, y - x, fp32) is
cut into bf16 parts that together hold its 24 bits: x in one (bf16), two (fp16) or three (fp32), the
other in three; the products of parts that reach fp32 are summed. Scaling both operands by sqrt(w)
would be exact for powers of four only, and need six products in place of three elsewhere.

Bytes: 2 (T d + T m) inputs, from the L2 cache once per row and column of tiles, and 16 bytes per
sum and 256 tokens. Flops: T d^2 for G, 2 T d m for C, times the part products (1, 3, 5 or 6).
Accuracy: relative Frobenius error to fp64 <= 1e-6, scaled rms <= 1e-7, for any number of tokens.

Errors and CUDA graphs: the first kernel leaves the smallest bad token in device memory; the others
read it there and add nothing. Outside of a graph capture the host then reads it and raises, which
waits for that small kernel. Under capture the host reads nothing: bad tokens still add nothing, and
the error is lost. A call before the capture compiles all that the capture needs. Scratch memory
comes from torch's allocator.

Source: ours; the formula is the normal equations of Yun et al., arXiv 2605.15491.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ghosted_fast.kernels._gram_rows import gram_inspect_kernel, gram_moments_kernel, tokens_to_add
from ghosted_fast.kernels._gram_tile import accumulate
from ghosted_fast.kernels._tuning import GramConfig, architecture, gram_config

# Sums and products are rounded one by one: a part minus its rounding must be exact.
FP_FUSION = False
# Calls for which a capture finds its kernels compiled and loaded; see `_prepare_capture`.
_prepared: set[tuple[object, ...]] = set()
_X_PARTS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}


@triton.jit
def gram_tiles_kernel(
    x,
    y,
    gram_factor,
    cross_factor,
    problems,
    gram,
    cross,
    num_tokens,
    hidden_size,
    outputs,
    x_stride,
    y_stride,
    gram_tiles,
    DELTA: tl.constexpr,
    GRAM_EXACT: tl.constexpr,
    CROSS_EXACT: tl.constexpr,
    X_PARTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    PROMOTE_TOKENS: tl.constexpr,
    SLICES: tl.constexpr,
):
    """One program per tile: first those of G's lower triangle, then those of C."""
    num_tokens = tokens_to_add(problems, num_tokens)
    tile = tl.program_id(0)
    if gram is not None:
        if tile < gram_tiles:
            # Squares of the triangle, each cut into tiles side by side. Row n - 1 - line of the
            # squares and row line - odd fill one line together.
            per_square: tl.constexpr = BLOCK_ROWS // BLOCK_COLUMNS
            square = tile // per_square
            height = tl.cdiv(hidden_size, BLOCK_ROWS)
            odd = height % 2
            length = height + 1 - odd
            line, place = square // length, square % length
            in_long = place < height - line
            row_tile = tl.where(in_long, height - 1 - line, line - odd)
            column = tl.where(in_long, place, place - (height - line))
            column_tile = column * per_square + tile % per_square
            accumulate(
                x,
                x,
                None,
                gram_factor,
                gram,
                row_tile,
                column_tile,
                num_tokens,
                hidden_size,
                hidden_size,
                x_stride,
                x_stride,
                True,
                GRAM_EXACT,
                X_PARTS,
                BLOCK_ROWS,
                BLOCK_COLUMNS,
                BLOCK_TOKENS,
                PROMOTE_TOKENS,
                SLICES,
            )
    if cross is not None:
        if tile >= gram_tiles:
            width = tl.cdiv(outputs, BLOCK_COLUMNS)
            place = tile - gram_tiles
            accumulate(
                x,
                y,
                x if DELTA else None,
                cross_factor,
                cross,
                place // width,
                place % width,
                num_tokens,
                hidden_size,
                outputs,
                x_stride,
                y_stride,
                False,
                CROSS_EXACT,
                X_PARTS,
                BLOCK_ROWS,
                BLOCK_COLUMNS,
                BLOCK_TOKENS,
                PROMOTE_TOKENS,
                SLICES,
            )


def launch_gram_update(
    x: Tensor,
    y: Tensor | None,
    gram_factor: Tensor | None,
    cross_factor: Tensor | None,
    problems: Tensor,
    delta: bool,
    gram: Tensor | None,
    cross: Tensor | None,
    gram_exact: bool,
    cross_exact: bool,
    config: GramConfig,
) -> None:
    """Launch the tiles on the current stream. x [T, d] and y [T, m] with neighbouring elements."""
    num_tokens, hidden_size = x.shape
    height = triton.cdiv(hidden_size, config.block_rows)
    per_square = config.block_rows // config.block_columns
    gram_tiles = 0 if gram is None else height * (height + 1) // 2 * per_square
    outputs = 0 if cross is None else cross.shape[1]
    cross_tiles = height * triton.cdiv(outputs, config.block_columns)
    gram_tiles_kernel[(gram_tiles + cross_tiles,)](
        x,
        y,
        gram_factor,
        cross_factor,
        problems,
        gram,
        cross,
        num_tokens,
        hidden_size,
        outputs,
        _row_stride(x),
        0 if y is None else _row_stride(y),
        gram_tiles,
        DELTA=delta,
        GRAM_EXACT=gram_exact,
        CROSS_EXACT=cross_exact,
        X_PARTS=_X_PARTS[x.dtype],
        BLOCK_ROWS=config.block_rows,
        BLOCK_COLUMNS=config.block_columns,
        BLOCK_TOKENS=config.block_tokens,
        PROMOTE_TOKENS=config.promote_tokens,
        SLICES=config.slices,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=FP_FUSION,
    )


def _row_stride(rows: Tensor) -> int:
    return rows.stride(0) if len(rows) > 1 else rows.shape[1]


def _reads_back(x: Tensor) -> bool:
    """Return whether the host may wait for the device: not while a graph is captured."""
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _can_be_captured(x: Tensor) -> bool:
    return x.is_cuda


def _prepare_capture(
    x: Tensor,
    y: Tensor | None,
    gram_factor: Tensor | None,
    cross_factor: Tensor | None,
    delta: bool,
    gram: Tensor | None,
    cross: Tensor | None,
    config: GramConfig,
) -> None:
    """Launch, once for calls of a kind, the tiles that a capture would, with no token to add.

    Under capture the host cannot see that all weights are powers of two. Other tiles run then than
    in the call before it; to compile or load them there would break the capture off.
    """
    operands = tuple(None if rows is None else rows.dtype for rows in (x, y, gram, cross))
    tokens, widths = len(x), (x.shape[1], 0 if cross is None else cross.shape[1])
    # What Triton compiles a kernel of its own for.
    places = (gram_factor, cross_factor, gram, cross)
    aligned = tuple(place is None or place.data_ptr() % 16 == 0 for place in places)
    key = (x.device, operands, widths, tokens == 1, tokens % 16 == 0, aligned, delta, config)
    if key in _prepared:
        return
    _prepared.add(key)
    bad_from_the_start = torch.zeros(4, dtype=torch.int32, device=x.device)
    sums = (gram, cross, False, False)
    launch_gram_update(x, y, gram_factor, cross_factor, bad_from_the_start, delta, *sums, config)


def _raise_problem(found: list[int], num_tokens: int, token_weight: Tensor | None) -> None:
    """Raise for the problems that `gram_inspect_kernel` reports, in the reference's order."""
    bad_x, bad_y, bad_weight = found[:3]
    if token_weight is not None and bad_weight < num_tokens:
        raise RuntimeError(
            "gram_update: expected finite token weights >= 0, got "
            f"{float(token_weight[bad_weight])} at token {bad_weight}"
        )
    for name, token in (("x", bad_x), ("y", bad_y)):
        if token < num_tokens:
            raise RuntimeError(
                f"gram_update: expected finite activations, got NaN or infinity in {name} at "
                f"token {token}; nothing was added"
            )


def refusal(x: Tensor, y: Tensor | None) -> str:
    """Return why these kernels do not serve the tensors; empty if they do."""
    for name, rows in (("x", x), ("y", y)):
        if rows is None:
            continue
        if rows.shape[1] % 16 or (len(rows) > 1 and rows.stride(0) % 16):
            return f"expected {name} with rows of, and apart by, a multiple of 16 elements"
        if rows.data_ptr() % 16:
            return f"expected {name} at an address that is a multiple of 16"
    return ""


def _launch_inspect(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    norm_eps: float | None,
    block_rows: int,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Return the factors of the tokens in G and in C, and the problems; see `_gram_rows.py`."""
    num_tokens, hidden_size = x.shape
    normed = norm_eps is not None
    gram_factor = cross_factor = None
    if normed:
        gram_factor, cross_factor = x.new_empty((2, num_tokens), dtype=torch.float32)
    problems = torch.full((4,), num_tokens, dtype=torch.int32, device=x.device)
    gram_inspect_kernel[(triton.cdiv(num_tokens, block_rows),)](
        x,
        y,
        weight,
        gram_factor,
        cross_factor,
        problems,
        num_tokens,
        hidden_size,
        0 if y is None else y.shape[1],
        _row_stride(x),
        0 if y is None else _row_stride(y),
        norm_eps or 0.0,
        BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=512,
        num_warps=4,
        enable_fp_fusion=FP_FUSION,
    )
    if normed:
        return gram_factor, cross_factor, problems
    return weight, weight, problems


def gram_update(
    x: Tensor,
    y: Tensor | None,
    token_weight: Tensor | None,
    norm_eps: float | None,
    delta: bool,
    gram: Tensor | None,
    cross: Tensor | None,
    moments: Tensor | None,
    *,
    config: GramConfig | None = None,
) -> None:
    """Add the tokens to the sums. Arguments: see `ops.gram_update`.

    `config` overrides the tuning table.

    Raises:
        RuntimeError: A token that counts holds NaN or infinity, or a weight is no weight (not
            under graph capture). The sums are as they were.
    """
    num_tokens, hidden_size = x.shape
    if not x.numel():
        return
    weight = None if token_weight is None else token_weight.contiguous()
    table, x_parts = architecture(x.device), _X_PARTS[x.dtype]
    block_rows = (config or gram_config(table, False, x_parts)).inspect_rows
    gram_factor, cross_factor, problems = _launch_inspect(x, y, weight, norm_eps, block_rows)
    powers_of_two = weight is None
    if _reads_back(x):
        found = problems.tolist()
        _raise_problem(found, num_tokens, token_weight)
        powers_of_two = found[3] >= num_tokens
    exact_x = x.dtype != torch.float32 and (weight is None or x.dtype == torch.bfloat16)
    gram_exact = exact_x and powers_of_two and norm_eps is None
    cross_exact = gram_exact and not delta and y is not None and y.dtype == x.dtype
    if gram is not None or cross is not None:
        exact = (gram is None or gram_exact) and (cross is None or cross_exact)
        chosen = config or gram_config(table, exact, x_parts)
        sums = (gram, cross, gram_exact, cross_exact)
        launch_gram_update(x, y, gram_factor, cross_factor, problems, delta, *sums, chosen)
        if weight is not None and gram_exact and _can_be_captured(x) and _reads_back(x):
            wide = config or gram_config(table, False, x_parts)
            _prepare_capture(x, y, gram_factor, cross_factor, delta, gram, cross, wide)
    if moments is not None:
        gram_moments_kernel[(triton.cdiv(hidden_size, 64),)](
            x,
            y,
            weight,
            cross_factor,
            problems,
            moments,
            num_tokens,
            hidden_size,
            _row_stride(x),
            0 if y is None else _row_stride(y),
            BLOCK_TOKENS=32,
            BLOCK_COLUMNS=64,
            num_warps=4,
            enable_fp_fusion=FP_FUSION,
        )
