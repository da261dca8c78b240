"""Faults in the operands and token checks of the CUDA gram_update, its PTX and its binding."""

from __future__ import annotations

from mutants.mutant import Mutant

_TILES = "csrc/cuda/gram_tiles.cuh"
_TOKENS = "csrc/cuda/gram_tokens.cuh"
_PLAN = "csrc/cuda/gram_plan.cuh"
_LAUNCH = "csrc/cuda/gram_update.cu"
_PTX = "csrc/cuda/primitives.cuh"
_BINDING = "csrc/cuda/operators.cpp"
_EMULATED = "tests/cuda_emulation/test_emulated_gram_update.py"
_TOKEN_TESTS = "tests/cuda_emulation/test_emulated_tokens.py"
_BOUND = "tests/cuda_emulation/test_binding.py"
_CODE = "tests/cuda_machine_code/test_machine_code.py"

_VALUES = (f"{_EMULATED}::test_values", "-k", "bf16-fp32 and any")
_FLOATS = (f"{_EMULATED}::test_values", "-k", "fp32-fp16 and none")
_MASKED = (f"{_EMULATED}::test_rows_of_weight_zero_are_not_looked_at",)
_COUNTED = (f"{_TOKEN_TESTS}::test_every_token_that_counts_has_its_size",)
_MOMENTS = (f"{_TOKEN_TESTS}::test_moments_of_any_number_of_tokens",)
_FINDS = (f"{_EMULATED}::test_the_first_bad_token_is_found",)

MUTANTS = (
    # Parts and scales.
    Mutant(
        "smallest products of parts lost",
        _LAUNCH,
        "for (int order = kMaxParts - 1; order >= 0; --order) {",
        "for (int order = kMaxParts - 2; order >= 0; --order) {",
        _FLOATS,
    ),
    Mutant(
        "one part used for all",
        _TILES,
        "sum.right_offset[load_product],\n                        mask, sum.right);",
        "sum.right_offset[0],\n                        mask, sum.right);",
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
        "const int num_parts = cross_inexact || args.delta ? kMaxParts",
        "const int num_parts = args.delta ? kMaxParts",
        (f"{_EMULATED}::test_values", "-k", "bf16-bf16 and any"),
    ),
    Mutant(
        "differences taken as exact",
        _PLAN,
        "const int num_parts = cross_inexact || args.delta ? kMaxParts",
        "const int num_parts = cross_inexact ? kMaxParts",
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
    Mutant("tokens of a block counted as one", _TOKENS, "    ++count;", "    count = 1;", _COUNTED),
    Mutant(
        "equal sizes counted by each token of a block",
        _TOKENS,
        "    if (i < own) return;\n",
        "",
        _COUNTED,
    ),
    Mutant(
        "barrier before the findings of a block are read dropped",
        _TOKENS,
        "  if (lane == 0) found[warp] = own;\n  __syncthreads();\n",
        "  if (lane == 0) found[warp] = own;\n",
        _COUNTED,
    ),
    Mutant(
        "largest rows of the other warps lost",
        _TOKENS,
        "    find_larger(largest.x_exponent, found[i].x_exponent);\n",
        "",
        (f"{_TOKEN_TESTS}::test_the_largest_row_is_found_wherever_it_is",),
    ),
    Mutant(
        "largest weighted rows of the other warps lost in G",
        _TOKENS,
        "    find_larger(largest.gram_exponent, found[i].gram_exponent);\n",
        "",
        (f"{_TOKEN_TESTS}::test_the_largest_weighted_row_is_found_wherever_it_is",),
    ),
    Mutant(
        "largest weighted rows of the other warps lost in C",
        _TOKENS,
        "    find_larger(largest.cross_exponent, found[i].cross_exponent);\n",
        "",
        (f"{_TOKEN_TESTS}::test_the_largest_weighted_row_is_found_wherever_it_is",),
    ),
    Mutant(
        "inexact scales of the other warps lost",
        _TOKENS,
        "    find_larger(largest.gram_is_inexact, found[i].gram_is_inexact);\n",
        "",
        (f"{_TOKEN_TESTS}::test_one_scale_that_is_not_exact_is_found_wherever_it_is",),
    ),
    Mutant(
        "one token too many in the moments",
        _TOKENS,
        "if (token < num_tokens) {\n        weights[t]",
        "if (token <= num_tokens) {\n        weights[t]",
        _MOMENTS,
    ),
    Mutant(
        "a turn of the moments shorter than its step",
        _TOKENS,
        "first += kMomentTokens * kMomentLanes) {",
        "first += (kMomentTokens + 1) * kMomentLanes) {",
        _MOMENTS,
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
        "current device of torch's runtime taken for the extension's",
        _BINDING,
        "  check_cuda(gram_update_cuda_set_device(device.index()));\n",
        "",
        (_BOUND, "-k", "device_of_the_tensors"),
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
        "  if (!capturing) {",
        "  {",
        (_BOUND, "-k", "capture"),
    ),
    Mutant(
        "kernels first loaded under graph capture",
        _BINDING,
        "if (!capturing) check_cuda(gram_update_cuda_load());",
        "",
        (_BOUND, "-k", "capture"),
    ),
    Mutant(
        "compensated kernels not loaded beforehand",
        _LAUNCH,
        "  if (error == cudaSuccess) error = load_tile_kernels<true>();\n",
        "",
        (f"{_EMULATED}::test_under_capture_scales_are_taken_as_inexact_and_nan_goes_on",),
    ),
    Mutant(
        "scales snapped in G alone",
        _TOKENS,
        "    cross_scale *= moved / gram_scale;\n",
        "",
        (f"{_EMULATED}::test_weights_of_normed_rows_cost_one_product_in_g",),
        "1e-7 of a weight: less than what C is rounded by",
    ),
    Mutant(
        "weights that are near a power of two taken as one",
        _TOKENS,
        "constexpr double kRounding = 1.01 / (1 << 24);",
        "constexpr double kRounding = 1.01 / (1 << 20);",
        (f"{_EMULATED}::test_a_weight_is_moved_no_further_than_its_rounding",),
    ),
    # NaN under graph capture, where nobody is told of it.
    Mutant(
        "NaN of the hardware's arithmetic rounded to -0",
        _TOKENS,
        "return value == value ? (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16 : kNaN;",
        "(void)kNaN;\n  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;",
        (f"{_EMULATED}::test_no_nan_is_lost_under_capture",),
    ),
    Mutant(
        "scales of a bad weight left as they were",
        _TOKENS,
        "if (scales.gram != nullptr) scales.gram[token] = scales.cross[token] = NAN;",
        "",
        (f"{_EMULATED}::test_a_bad_weight_shows_in_the_sums_under_capture",),
    ),
)
