"""Faults in the CUDA gram_update: here those of its tiles, and all of them as `MUTANTS`."""

from __future__ import annotations

from mutants import cuda_operand_mutants
from mutants.mutant import Mutant

_TILES = "csrc/cuda/gram_tiles.cuh"
_TOKENS = "csrc/cuda/gram_tokens.cuh"
_PLAN = "csrc/cuda/gram_plan.cuh"
_LAUNCH = "csrc/cuda/gram_update.cu"
_EMULATED = "tests/cuda_emulation/test_emulated_gram_update.py"
_SHAPES = (f"{_EMULATED}::test_shapes", "-k", "bfloat16 and (31 or 136 or 257)")
_LONG = (f"{_EMULATED}::test_shapes", "-k", "bfloat16 and (1025 or 2100)")
_FLOATS = (f"{_EMULATED}::test_values", "-k", "fp32-fp16 and none")
_MASKED = (f"{_EMULATED}::test_rows_of_weight_zero_are_not_looked_at",)
_ADDS = (f"{_EMULATED}::test_adds_to_what_is_there_and_leaves_the_upper_triangle",)
_OWNED = (f"{_EMULATED}::test_one_token_that_owns_the_sums", "-k", "bfloat16")
_TILE_MUTANTS = (
    # The pipeline.
    Mutant(
        "barrier before a stage is read dropped",
        _TILES,
        "      __syncthreads();  // the stage is whole",
        "      // the stage is whole",
        _SHAPES,
    ),
    Mutant(
        "wait leaves the stage that is read under way",
        _TILES,
        "copy_async_wait<kStages - 2>();",
        "copy_async_wait<kStages - 1>();",
        _SHAPES,
    ),
    Mutant(
        "wait dropped",
        _TILES,
        "      copy_async_wait<kStages - 2>();\n",
        "",
        _SHAPES,
    ),
    Mutant("commit dropped", _TILES, "    copy_async_commit();\n  };", "  };", _SHAPES),
    Mutant(
        "only one stage loaded ahead",
        _TILES,
        "stage < kStages - 1; ++stage) load_next();",
        "stage < kStages - 2; ++stage) load_next();",
        _SHAPES,
    ),
    Mutant(
        "wrong stage loaded",
        _TILES,
        "load_stage = load_stage + 1 == kStages ? 0 : load_stage + 1;",
        "load_stage = load_stage + 2 == kStages ? 0 : load_stage + 1;",
        _SHAPES,
    ),
    Mutant(
        "wrong stage read",
        _TILES,
        "      stage = stage + 1 == kStages ? 0 : stage + 1;",
        "      stage = stage + 2 == kStages ? 0 : stage + 1;",
        _SHAPES,
    ),
    Mutant(
        "right side does not advance",
        _TILES,
        "        right_loader.advance();\n",
        "",
        _SHAPES,
    ),
    # Bounds.
    Mutant(
        "one token too many",
        _TILES,
        "if (token < args.num_tokens) {",
        "if (token <= args.num_tokens) {",
        _SHAPES,
    ),
    Mutant(
        "no bound on the columns that are loaded",
        _TILES,
        "in_columns_ = first_column + column < num_columns;",
        "in_columns_ = true;",
        _SHAPES,
    ),
    Mutant(
        "no bound on the columns that are written",
        _TILES,
        "if (row >= sum.rows || column >= sum.columns) continue;",
        "if (row >= sum.rows) continue;",
        _SHAPES,
    ),
    Mutant(
        "no bound on the rows that are written",
        _TILES,
        "if (row >= sum.rows || column >= sum.columns) continue;",
        "if (column >= sum.columns) continue;",
        _SHAPES,
    ),
    Mutant(
        "rows of weight 0 loaded",
        _TILES,
        "args.token_weight == nullptr ? 1.0f : args.token_weight[token];",
        "1.0f;",
        _MASKED,
    ),
    Mutant(
        "weights not looked at for later tiles",
        _TILES,
        "        mask.look_ahead(args, load_token);\n",
        "",
        _MASKED,
    ),
    Mutant(
        "weights of the first chunk used for all",
        _LAUNCH,
        "args->token_weight == nullptr ? nullptr : args->token_weight + first",
        "args->token_weight",
        (f"{_EMULATED}::test_several_chunks_of_operands",),
    ),
    Mutant(
        "operands of the first chunk used for all",
        _TOKENS,
        "column = index % vectors * kVector, token = first + row;",
        "column = index % vectors * kVector, token = row + 0 * first;",
        (f"{_EMULATED}::test_several_chunks_of_operands",),
    ),
    # Fragments.
    Mutant(
        "left matrices in the wrong order",
        _TILES,
        "const int column = warp_row + 16 * i + matrix % 2 * 8;",
        "const int column = warp_row + 16 * i + matrix / 2 * 8;",
        _SHAPES,
    ),
    Mutant(
        "right matrices in the wrong order",
        _TILES,
        "const int row = token + matrix % 2 * 8 + matrix_row;",
        "const int row = token + matrix / 2 * 8 + matrix_row;",
        _SHAPES,
    ),
    Mutant(
        "right fragment used twice",
        _TILES,
        "right_fragments[j / 2][j % 2 * 2 + 1]);",
        "right_fragments[j / 2][j % 2 * 2]);",
        _SHAPES,
    ),
    Mutant(
        "padding that makes banks conflict",
        _TILES,
        "kTileStride = kTile + 8;",
        "kTileStride = kTile + 16;",
        (f"{_EMULATED}::test_ldmatrix_has_no_bank_conflicts",),
    ),
    # Sums.
    Mutant(
        "sums of the tensor cores not cleared",
        _TILES,
        "kCompensated ? step_sums[i][j][e] - added : 0.0f;",
        "kCompensated ? step_sums[i][j][e] - added : step_sums[i][j][e];",
        _LONG,
    ),
    Mutant(
        "promoted only when the sums go to memory",
        _TILES,
        "if (product == num_products - 1) promote<kCompensated>(step_sums, sums);",
        "if (step > 0 && (tiles_in_sums + 1 == kFlushTiles || token + kTileTokens >= "
        "args.num_tokens) && product == num_products - 1) promote<kCompensated>(step_sums, sums);",
        (f"{_EMULATED}::test_sums_of_one_sign",),
    ),
    Mutant(
        "sums stay in fp32 to the end",
        _TILES,
        "++tiles_in_sums == kFlushTiles || token",
        "token",
        (f"{_EMULATED}::test_sums_of_one_sign",),
    ),
    Mutant(
        "sums not cleared after they went to memory",
        _TILES,
        "      clear(sums);\n      if (kCompensated)",
        "      if (kCompensated)",
        _LONG,
    ),
    Mutant(
        "every product of parts promoted",
        _TILES,
        "if (product == num_products - 1) promote<kCompensated>(step_sums, sums);",
        "promote<kCompensated>(step_sums, sums);",
        _FLOATS,
        "the sum is the same but for one more rounding to nearest per small product",
    ),
    Mutant(
        "what compensation holds back lost",
        _TILES,
        "kCompensated ? step_sums[i][j][e] - added : 0.0f;",
        "0.0f;\n        (void)added;",
        _OWNED,
    ),
    Mutant(
        "compensation with the wrong sign",
        _TILES,
        "kCompensated ? step_sums[i][j][e] - added : 0.0f;",
        "kCompensated ? added - step_sums[i][j][e] : 0.0f;",
        _OWNED,
    ),
    Mutant("never compensated", _PLAN, "return tokens < kOwners;", "return tokens < 0;", _OWNED),
    Mutant(
        "owners sought in G alone",
        _PLAN,
        "(plan.want_cross && is_owned_by_few(status->cross_sizes));",
        "false;",
        _OWNED,
    ),
    Mutant(
        "upper triangle written beside the diagonal",
        _TILES,
        "if (!is_lower || column < row) {",
        "if (!is_lower || column <= row) {",
        _ADDS,
    ),
    Mutant(
        "half of the diagonal dropped",
        _TILES,
        "} else if (column == row) {",
        "} else if (column < row) {",
        _SHAPES,
    ),
    Mutant("diagonal counted twice", _TILES, "*to += first;", "*to += 2.0 * first;", _SHAPES),
    Mutant(
        "sums overwritten",
        _TILES,
        "value.y += second;",
        "value.y = second;",
        _ADDS,
    ),
    Mutant(
        "wrong tile of the lower triangle",
        _TILES,
        "return {row, number - row * (row + 1) / 2};",
        "return {row, number - row * (row - 1) / 2};",
        _SHAPES,
    ),
    Mutant(
        "all tiles of the square computed",
        _LAUNCH,
        "plan.want_gram ? rows * (rows + 1) / 2 : 0;",
        "plan.want_gram ? rows * rows : 0;",
        (f"{_EMULATED}::test_bytes_are_the_least_that_tiles_of_128_can_do_with",),
    ),
)

MUTANTS = (*_TILE_MUTANTS, *cuda_operand_mutants.MUTANTS)
