"""Faults planted in the Triton kernels."""

from __future__ import annotations

from mutants.mutant import Mutant

_KERNELS = "kernels/ghosted_triton/"
_TILE, _ROWS = _KERNELS + "_gram_tile.py", _KERNELS + "_gram_rows.py"
_GRAM, _GHOST = _KERNELS + "gram_update.py", _KERNELS + "ghost_apply.py"
_FINISH = _KERNELS + "_ghost_rows.py"


def _values(name: str, chosen: str) -> tuple[str, ...]:
    """Checks of values, in the interpreter."""
    checks = f"tests/ghosted_triton/checks_{name}.py"
    return ("-p", "ghosted_triton.interpreter", "-x", checks, "-k", chosen)


def _bounds(name: str) -> tuple[str, ...]:
    """Checks of bounds and races."""
    return ("tests/ghosted_triton/test_semantics.py", "-k", f"race and {name}")


MUTANTS: list[Mutant] = [
    Mutant(
        "residual missing",
        _FINISH,
        "tl.load(x + offsets, mask=exists, other=0.0).to(tl.float32) + change",
        "change",
        _values("ghost_apply", "test_one_rounding"),
    ),
    Mutant(
        "int8 weights not scaled",
        _FINISH,
        "change *= tl.load(scale + columns, mask=column_exists, other=0.0)[None, :]",
        "change *= 1.0",
        _values("ghost_apply", "test_values and int8"),
    ),
    Mutant(
        "first state in the row after its own",
        _FINISH,
        "tl.load(is_first + rows, mask=row_exists, other=0)",
        "tl.load(is_first + tl.maximum(rows - 1, 0), mask=row_exists, other=0)",
        _values("ghost_apply", "test_first_state"),
    ),
    Mutant(
        "sum of squares in place of their mean",
        _FINISH,
        "tl.rsqrt(squares / hidden_size + norm_eps)",
        "tl.rsqrt(squares + norm_eps)",
        _values("ghost_apply", "test_values"),
    ),
    Mutant(
        "row bound one too far",
        _FINISH,
        "row_exists = rows < num_tokens",
        "row_exists = rows <= num_tokens",
        _bounds("ghost_apply"),
    ),
    Mutant(
        "last split not added",
        _GHOST,
        "tl.static_range(SPLITS)",
        "tl.static_range(SPLITS - 1)",
        _values("ghost_apply", "test_values"),
    ),
    Mutant(
        "splits run past the inputs",
        _GHOST,
        "tl.minimum(start + inputs_per_split, hidden_size)",
        "start + inputs_per_split",
        _values("ghost_apply", "test_values and 320"),
    ),
    Mutant(
        "all splits store their squares in one place",
        _GHOST,
        "squares + split * num_tokens + rows, row_squares",
        "squares + rows, row_squares",
        _bounds("ghost_apply"),
    ),
    Mutant(
        "columns not masked in the product's store",
        _GHOST,
        "tl.store(y + offsets, result, mask=row_exists & (columns < hidden_size)[None, :])",
        "tl.store(y + offsets, result, mask=row_exists & (columns >= 0)[None, :])",
        _bounds("ghost_apply"),
    ),
    Mutant(
        "never promoted",
        _GRAM,
        "PROMOTE_TOKENS=config.promote_tokens,",
        "PROMOTE_TOKENS=1 << 20,",
        _values("gram_update", "test_promotes"),
    ),
    Mutant(
        "rows of an odd triangle shifted",
        _GRAM,
        "tl.where(in_long, height - 1 - line, line - odd)",
        "tl.where(in_long, height - 1 - line, line)",
        _values("gram_update", "test_shapes"),
    ),
    Mutant(
        "diagonal left out",
        _TILE,
        "columns[None, :] <= rows[:, None]",
        "columns[None, :] < rows[:, None]",
        _values("gram_update", "test_values_of_few"),
    ),
    Mutant(
        "weights not applied to parts",
        _TILE,
        "change *= factors[:, None]",
        "change *= 1.0",
        _values("gram_update", "test_values_of_few and padding"),
    ),
    Mutant(
        "weight 0 looked at",
        _TILE,
        "kept = factors > 0.0",
        "kept = factors >= 0.0",
        _values("gram_update", "test_rows_of_weight_zero"),
    ),
    Mutant(
        "third parts left out",
        _TILE,
        "if i + j <= 2 and",
        "if i + j <= 1 and",
        _values("gram_update", "test_values_of_few"),
    ),
    Mutant(
        "norm folded into G once in place of twice",
        _ROWS,
        "(weight * inverse * inverse).to(tl.float32)",
        "(weight * inverse).to(tl.float32)",
        _values("gram_update", "test_values_of_few"),
    ),
    Mutant(
        "every weight taken for a power of two",
        _ROWS,
        "tl.where(fraction != 0, rows, nothing)",
        "tl.where(fraction < 0, rows, nothing)",
        _values("gram_update", "test_values_of_few and padding"),
    ),
    Mutant(
        "bad tokens added where nobody reads back",
        _ROWS,
        "tl.where(problem < num_tokens, 0, num_tokens)",
        "tl.where(problem < num_tokens, num_tokens, num_tokens)",
        _values("gram_update", "test_nothing_is_added"),
    ),
    Mutant(
        "energy of the change without its weight",
        _ROWS,
        "tl.sum(weighted * change, axis=0)",
        "tl.sum(change * change, axis=0)",
        _values("gram_update", "test_values_of_few and padding"),
    ),
    Mutant(
        "a tile that spills",
        _KERNELS + "_tuning.py",
        "prefill=ApplyConfig(128, 128, 64, 8, 3),",
        "prefill=ApplyConfig(128, 256, 64, 4, 2),",
        (
            "tests/ghosted_triton/test_compiled_kernels.py",
            "-x",
            "-k",
            "test_ghost_apply and 80-512",
        ),
    ),
]
