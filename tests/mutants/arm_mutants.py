"""Faults in the paths of Arm."""

from __future__ import annotations

from mutants.mutant import Mutant

_FOLDER = "csrc/cpu/kernels"
_TESTS = ("tests/arm_emulation/test_emulated_arm.py", "-k", "exact_numbers or rounding")


def _fault(name: str, file: str, old: str, new: str) -> Mutant:
    return Mutant(name, f"{_FOLDER}/{file}", old, new, _TESTS)


MUTANTS = (
    # Order and places.
    _fault(
        "columns of a quad's blocks swapped",
        "tile.h",
        "acc[2 * p][v] = (VecF)vzip1q_f64(low, high);",
        "acc[2 * p][v] = (VecF)vzip1q_f64(high, low);",
    ),
    _fault(
        "blocks of quads taken for rows",
        "tile.h",
        "if constexpr (kPairs) untangle_quads(acc);",
        "",
    ),
    _fault(
        "sides of bfmmla swapped",
        "tile.h",
        "vbfmmlaq_f32((float32x4_t)sum, (bfloat16x8_t)a, (bfloat16x8_t)b)",
        "vbfmmlaq_f32((float32x4_t)sum, (bfloat16x8_t)b, (bfloat16x8_t)a)",
    ),
    _fault(
        "second columns of a vector read as the first",
        "tile.h",
        "high = load(right[v] + k * kPanel + kLanes)",
        "high = load(right[v] + k * kPanel)",
    ),
    _fault(
        "every stripe read from the first of its panel",
        "tile.h",
        "(at % kPanelVectors) * 2 * kLanes",
        "(v % kPanelVectors) * 2 * kLanes",
    ),
    _fault(
        "wrong stride between a group's rows",
        "ghost_gemm.h",
        "(kHasNeon ? kGemmRows : 1) * k",
        "k",
    ),
    _fault(
        "two columns of a transposition swapped",
        "tile.h",
        "columns[1] = (VecF)vzip1q_f64(ab_odd, cd_odd);",
        "columns[1] = (VecF)vzip1q_f64(cd_odd, ab_odd);",
    ),
    _fault(
        "tokens of a quad in the wrong order",
        "gram_pack.h",
        "(uint32x4_t)vzip1q_u16(tokens[2], tokens[3])",
        "(uint32x4_t)vzip1q_u16(tokens[3], tokens[2])",
    ),
    _fault(
        "one lane for all numbers",
        "lefts.h",
        "broadcast(left.vector[left.lane])",
        "broadcast(left.vector[0])",
    ),
    _fault(
        "one lane for two pairs",
        "lefts.h",
        "return (VecF)vbfdotq_laneq_f32(to, a, b, 2);",
        "return (VecF)vbfdotq_laneq_f32(to, a, b, 1);",
    ),
    _fault(
        "one lane for all numbers of a factor",
        "lefts.h",
        "broadcast_double(left.vector[left.lane])",
        "broadcast_double(left.vector[0])",
    ),
    _fault(
        "rows of a factor at the wrong distance",
        "lefts.h",
        "VecD{pair[0], pair[step]}",
        "VecD{pair[0], pair[1]}",
    ),
    _fault(
        "sums of two registers swapped",
        "ghost_dot.h",
        "vpaddq_f32((float32x4_t)acc[i], (float32x4_t)acc[i + 1])",
        "vpaddq_f32((float32x4_t)acc[i + 1], (float32x4_t)acc[i])",
    ),
    _fault(
        "upper half of a vector promoted as the lower",
        "gram_kernel.h",
        "vcvt_high_f64_f32((float32x4_t)sum)",
        "vcvt_f64_f32(vget_low_f32((float32x4_t)sum))",
    ),
    # Bytes.
    _fault(
        "second half of a step of int8 left out",
        "ghost_bytes.h",
        "      acc[o][c] = vmmlaq_s32(acc[o][c], second, right[1][c]);\n",
        "      (void)second;\n",
    ),
    _fault(
        "outputs of a pair of int8 swapped",
        "ghost_bytes.h",
        "vst1_s32(to, vget_low_s32(acc[o][c]));",
        "vst1_s32(to, vget_high_s32(acc[o][c]));",
    ),
    _fault(
        "digits of the first row for both of a group",
        "ghost_bytes.h",
        "+ (row - first) * kDigits;",
        ";",
    ),
    _fault(
        "rows beyond the int8 weight read",
        "ghost_bytes.h",
        "whole = outputs == kByteOutputs ? size / kByteInputs : 0;",
        "whole = size / kByteInputs;",
    ),
    # Ends.
    _fault(
        "tokens that are no whole quad left out",
        "gram_kernel.h",
        "round_up((tokens + 1) / 2, kPairDwords)",
        "(tokens + 1) / 2 / kPairDwords * kPairDwords",
    ),
    _fault(
        "columns beyond the row packed",
        "gram_pack.h",
        "scaled_bf16(from, count - c - half, source.scale[i + t])",
        "scaled_bf16(from, 8, source.scale[i + t])",
    ),
    _fault(
        "tokens beyond the slab packed",
        "gram_pack.h",
        "t < min64(kTaken, end - i)",
        "t < kTaken",
    ),
    _fault(
        "the last pair of a packed weight kept from the pair before",
        "tile.h",
        "k + 1 < dwords ? load(panel + (k + 1) * kPanel + v) : VecF{}",
        "load(panel + (k + 1) * kPanel + v)",
    ),
    _fault(
        "rows beyond the last read",
        "ghost_apply.h",
        "      if (row >= args.num_rows) return VecF{};\n",
        "",
    ),
    _fault(
        "inputs beyond a row's end read",
        "ghost_apply.h",
        "return count >= Source::kStep ? Source::load_step(from)",
        "return count >= 1 ? Source::load_step(from)",
    ),
    _fault(
        "rows that are left over left out",
        "ghost_gemm.h",
        "for (; token < tokens; token += kFewRows) {",
        "for (; token + kFewRows <= tokens; token += kFewRows) {",
    ),
    # Numbers.
    _fault(
        "lower halves of int8 taken for bf16",
        "ghost_dot.h",
        "return (VecF)vuzp2q_u16((uint16x8_t)low, (uint16x8_t)high);",
        "return (VecF)vuzp1q_u16((uint16x8_t)low, (uint16x8_t)high);",
    ),
    _fault(
        "bf16 cut off, not rounded",
        "convert.h",
        "const uint32x4_t up = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));",
        "const uint32x4_t up = bits;\n      (void)odd;",
    ),
    _fault(
        "parts of a sum as long as where sums round to nearest",
        "gram_kernel.h",
        "kPairPartTokens = kHasQuads ? 32 : 64",
        "kPairPartTokens = kHasQuads ? 256 : 64",
    ),
    _fault(
        "sums of the earlier parts dropped",
        "gram_kernel.h",
        "if (begin > 0) acc[r][v] = load(part) + acc[r][v];",
        "",
    ),
)
