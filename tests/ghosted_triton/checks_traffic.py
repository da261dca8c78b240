"""Bytes and multiply-adds, counted in the interpreter from what the launches really do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from ghosted_triton.interpreter import recording

from ghosted_fast.kernels._tuning import apply_config, gram_config
from ghosted_fast.kernels.ghost_apply import ghost_apply
from ghosted_fast.kernels.gram_update import gram_update

BF16, INT8 = torch.bfloat16, torch.int8
SIZE = 4096


@pytest.mark.parametrize(("dtype", "table"), [(BF16, 80), (INT8, 90)], ids=str)
def test_one_token_moves_hardly_more_than_the_weights(dtype: torch.dtype, table: int) -> None:
    """Every byte of every access, caches or not, at most 1.05 times the minimum."""
    x, weight = torch.ones(1, SIZE, dtype=BF16), torch.zeros(SIZE, SIZE, dtype=dtype)
    scale = None if dtype == BF16 else torch.ones(SIZE)
    config = apply_config(table, 1, SIZE, weight.element_size(), True)
    assert config.splits > 1
    with recording() as traffic:
        ghost_apply(x, weight, None, scale, 1e-5, config=config)
    least = weight.nbytes + 2 * x.nbytes + (0 if scale is None else scale.nbytes)
    moved = sum(traffic.issued.values())
    assert moved <= 1.05 * least, f"{moved / least:.3f} of the least bytes"
    assert moved >= least


@pytest.mark.parametrize(
    ("dtype", "num_tokens", "size"), [(BF16, 2, 1024), (INT8, 16, 1024)], ids=str
)
def test_more_tokens_move_hardly_more_from_memory(
    dtype: torch.dtype, num_tokens: int, size: int
) -> None:
    """Each launch reads x once from memory; the programs after the first get it from the cache."""
    x, weight = torch.ones(num_tokens, size, dtype=BF16), torch.zeros(size, size, dtype=dtype)
    scale = None if dtype == BF16 else torch.ones(size)
    config = apply_config(90, num_tokens, size, weight.element_size(), False)
    assert (config.splits > 1) == (dtype == BF16)
    with recording(addresses=True) as traffic:
        ghost_apply(x, weight, None, scale, config=config)
    least = weight.nbytes + 2 * x.nbytes + (0 if scale is None else scale.nbytes)
    moved = traffic.distinct_bytes()
    assert least <= moved <= 1.05 * least, f"{moved / least:.3f} of the least bytes"


def test_triangle() -> None:
    """At hidden size 4096 G costs 0.53 of a whole product.

    All lengths are an eighth of that: the same tiles, in the same places, with fewer elements. The
    grids of all tables, and of G and C together, are held to theirs in test_compiled_kernels.
    """
    config = gram_config(80, True, 1)
    block = config.block_rows // 8
    config = replace(config, block_rows=block, block_columns=block, slices=1)
    size, tokens = SIZE // 8, config.block_tokens
    x, whole = torch.ones(tokens, size, dtype=BF16), tokens * size * size
    gram = torch.zeros(size, size, dtype=torch.float64)
    with recording() as traffic:
        gram_update(x, None, None, None, False, gram, None, None, config=config)
    assert 0.5 * whole < traffic.multiply_adds <= 0.53 * whole
