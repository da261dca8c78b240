"""Faults in the CUDA kernels of gram_update, their machine instructions and their binding."""

from __future__ import annotations

from mutant import Mutant

_TILES = "csrc/cuda/gram_tiles.cuh"
_TOKENS = "csrc/cuda/gram_tokens.cuh"
_PLAN = "csrc/cuda/gram_update.cu"
_PTX = "csrc/cuda/primitives.cuh"
_BINDING = "csrc/cuda/operators.cpp"
_EMULATED = "tests/cuda_emulation/test_emulated_gram_update.py"
_BOUND = "tests/cuda_emulation/test_binding.py"
_CODE = "tests/cuda_machine_code/test_machine_code.py"

_SHAPES = (f"{_EMULATED}::test_shapes", "-k", "bfloat16 and (31 or 136 or 257)")
_LONG = (f"{_EMULATED}::test_shapes", "-k", "bfloat16 and (1025 or 2100)")
_VALUES = (f"{_EMULATED}::test_values", "-k", "bf16-fp32 and any")
_FLOATS = (f"{_EMULATED}::test_values", "-k", "fp32-fp16 and none")
_MASKED = (f"{_EMULATED}::test_rows_of_weight_zero_are_not_looked_at",)
_ADDS = (f"{_EMULATED}::test_adds_to_what_is_there_and_leaves_the_upper_triangle",)
_OWNED = (f"{_EMULATED}::test_one_token_that_owns_the_sums", "-k", "bfloat16")
_FINDS = (f"{_EMULATED}::test_the_first_bad_token_is_found",)

MUTANTS = (
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
        "token < args.num_tokens &&",
        "token <= args.num_tokens &&",
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
        "(args.token_weight == nullptr || args.token_weight[token] != 0.0f)",
        "true",
        _MASKED,
    ),
    Mutant(
        "weights of the first chunk used for all",
        _PLAN,
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
        (f"{_EMULATED}::test_error_does_not_grow_with_the_tokens", "-k", "none"),
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
        _PLAN,
        "plan.want_gram ? rows * (rows + 1) / 2 : 0;",
        "plan.want_gram ? rows * rows : 0;",
        (f"{_EMULATED}::test_bytes_are_the_least_that_tiles_of_128_can_do_with",),
    ),
    # Parts and scales.
    Mutant(
        "smallest products of parts lost",
        _PLAN,
        "for (int order = kMaxParts - 1; order >= 0; --order) {",
        "for (int order = kMaxParts - 2; order >= 0; --order) {",
        _FLOATS,
    ),
    Mutant(
        "one part used for all",
        _TILES,
        "sum.right_offset[load_product], args, sum.right);",
        "sum.right_offset[0], args, sum.right);",
        _FLOATS,
    ),
    Mutant(
        "low part lost",
        _TOKENS,
        "      values[2 * i] -= bf16_to_float(low);\n",
        "      values[2 * i] = 0.0f;\n",
        _FLOATS,
    ),
    Mutant(
        "weighted targets taken as exact",
        _PLAN,
        "const int num_parts = inexact || args.delta ? kMaxParts",
        "const int num_parts = args.delta ? kMaxParts",
        (f"{_EMULATED}::test_values", "-k", "bf16-bf16 and any"),
    ),
    Mutant(
        "differences taken as exact",
        _PLAN,
        "const int num_parts = inexact || args.delta ? kMaxParts",
        "const int num_parts = inexact ? kMaxParts",
        (f"{_EMULATED}::test_differences_keep_all_their_bits",),
    ),
    Mutant(
        "token weight missing",
        _TOKENS,
        "if (source.scale != nullptr) scale *= source.scale[token];",
        "",
        _VALUES,
    ),
    Mutant(
        "Gram scaled by 1 / rms once",
        _TOKENS,
        "gram_scale = cross_scale * inverse_rms;",
        "gram_scale = cross_scale;",
        _VALUES,
    ),
    Mutant(
        "x not taken off",
        _TOKENS,
        "for (int i = 0; i < kVector; ++i) values[i] -= minus[i];",
        "",
        _VALUES,
    ),
    Mutant(
        "shift not undone",
        _PLAN,
        "plan.gram_factor = std::ldexp(1.0, -2 * x_shift);",
        "plan.gram_factor = std::ldexp(1.0, -x_shift);",
        (f"{_EMULATED}::test_range_of_fp32_is_no_limit", "-k", "none"),
    ),
    Mutant(
        "no shift for huge rows",
        _PLAN,
        "return exponent > kSafeExponent || exponent < -kSafeExponent ? -exponent : 0;",
        "return exponent < -kSafeExponent ? -exponent : 0;",
        (f"{_EMULATED}::test_range_of_fp32_is_no_limit", "-k", "none"),
    ),
    Mutant(
        "rows of weight 0 read into the operands",
        _TOKENS,
        "if (source.token_weight == nullptr || source.token_weight[token] != 0.0f) {",
        "{",
        _MASKED,
        "the tiles leave out the same rows; looking here spares the reading",
    ),
    # The checks of the tokens, and the moments.
    Mutant(
        "NaN overlooked",
        _TOKENS,
        "return magnitude <= FLT_MAX ? magnitude : INFINITY;",
        "return magnitude;",
        _FINDS,
    ),
    Mutant(
        "lanes left out of the largest magnitude",
        _TOKENS,
        "for (int distance = kLanes / 2; distance > 0; distance /= 2) {",
        "for (int distance = kLanes / 4; distance > 0; distance /= 2) {",
        _FINDS,
    ),
    Mutant(
        "last bad token named",
        _TOKENS,
        "if (x_largest > FLT_MAX) atomicMin(",
        "if (x_largest > FLT_MAX) status->bad_x = 0, atomicMax(",
        _FINDS,
    ),
    Mutant(
        "negative weights accepted",
        _TOKENS,
        "if (!(weight >= 0.0f && weight <= FLT_MAX)) {",
        "if (!(weight <= FLT_MAX)) {",
        _FINDS,
    ),
    Mutant(
        "barrier before the moments are added up dropped",
        _TOKENS,
        "    __syncthreads();\n    const int64_t own",
        "    const int64_t own",
        (f"{_EMULATED}::test_moments_without_y_are_the_feature_sums",),
    ),
    Mutant(
        "moments without the norm",
        _TOKENS,
        "sums[0][i] += feature_weight * x[i];",
        "sums[0][i] += weight * x[i];",
        _VALUES,
    ),
    # The instructions, which the emulation does not see.
    Mutant(
        "matrices not transposed",
        _PTX,
        "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16",
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16",
        (_CODE, "-k", "matrix_loads and sm_80"),
    ),
    Mutant(
        "bf16 multiplied as fp16",
        _PTX,
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 ",
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 ",
        (_CODE, "-k", "matrix_loads and sm_80"),
    ),
    Mutant(
        "instruction waits for one group too few",
        _PTX,
        '"cp.async.wait_group %0;" ::"n"(kPending)',
        '"cp.async.wait_group %0;" ::"n"(kPending + 1)',
        (_CODE, "-k", "asynchronous and sm_80"),
    ),
    Mutant(
        "rows that are not wanted copied all the same",
        _PTX,
        "const int bytes = wanted ? 16 : 0;",
        "const int bytes = 16;\n  (void)wanted;",
        (_CODE, "-k", "asynchronous and sm_80"),
    ),
    # The binding.
    Mutant(
        "findings not looked at",
        _BINDING,
        "    check_status(args, found, stream);\n",
        "",
        (_BOUND, "-k", "names_the_token"),
    ),
    Mutant(
        "served whatever the arguments",
        _BINDING,
        "if (!gram_update_cuda_serves(&args)) {",
        "if (false) {",
        (_BOUND, "-k", "goes_on or go_on"),
    ),
    Mutant(
        "read back under graph capture",
        _BINDING,
        "if (!gram_update_cuda_is_capturing(stream)) {",
        "{",
        (_BOUND, "-k", "capture"),
    ),
)
