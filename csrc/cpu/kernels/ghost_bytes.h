// ghost_apply on the path "neonbf16" for up to 16 rows of bf16 with an int8 weight, as it lies.
//
// smmla multiplies 2 outputs by 8 inputs of the weight with two columns of 8 inputs: x as three
// digits of 8 bits (digits.h). A row is two columns and half of a third one, which two rows share.
// Converted to bf16, the weight would take 7 instructions for 8 numbers, and more time than its
// reading.
#pragma once

#include "digits.h"
#include "ghost_apply.h"

namespace ghosted_fast {
namespace {

// Outputs that are summed at the same time, and inputs that a step takes of each.
constexpr int64_t kByteOutputs = 8;
constexpr int64_t kByteInputs = 16;
// Rows of x whose digits are multiplied at the same time.
constexpr int64_t kByteRows = 2;

// The rows of x as digits.
struct DigitRows {
  int64_t rows, groups, columns, steps;  // rows of each group, columns of each, steps of 16 inputs
  int8_t* digits = nullptr;              // [group][step][2][columns][8]
  float* unit = nullptr;                 // [row], what a last digit of 1 stands for

  DigitRows(int64_t num_rows, int64_t size)
      : rows(min64(kByteRows, num_rows)),
        groups((num_rows + rows - 1) / rows),
        columns(round_up(rows * kDigits, 2)),
        steps((size + kByteInputs - 1) / kByteInputs) {}
  int64_t group_bytes() const { return steps * kByteInputs * columns; }
  int64_t bytes() const { return groups * group_bytes(); }

  void fill(const ApplyArgs& args) {
    std::memset(digits, 0, static_cast<size_t>(bytes()));
    for (int64_t row = 0; row < args.num_rows; ++row) {
      int8_t* to = digits + row / rows * group_bytes() + row % rows * kDigits * 8;
      unit[row] = for_digits(args, row, [&](int64_t k, int64_t digit, VecB bytes) {
        std::memcpy(to + (k / 8 * columns + digit) * 8 + k % 8, &bytes, sizeof(bytes));
      });
    }
  }
};

// sums[output][column] of 8 rows of the weight, `stride` apart, and the digits of a group: one
// step.
template <int kColumnPairs>
inline void add_byte_step(const int8_t* weight, int64_t stride, const int8_t* digits,
                          int32x4_t (&acc)[kByteOutputs / 2][kColumnPairs]) {
  int8x16_t right[2][kColumnPairs];
  for (int half = 0; half < 2; ++half) {
    for (int c = 0; c < kColumnPairs; ++c) {
      right[half][c] = vld1q_s8(digits + (half * kColumnPairs + c) * 16);
    }
  }
  GHOSTED_FAST_UNROLL
  for (int o = 0; o < kByteOutputs / 2; ++o) {
    const int64x2_t upper = (int64x2_t)vld1q_s8(weight + 2 * o * stride);
    const int64x2_t lower = (int64x2_t)vld1q_s8(weight + (2 * o + 1) * stride);
    const int8x16_t first = (int8x16_t)vzip1q_s64(upper, lower);
    const int8x16_t second = (int8x16_t)vzip2q_s64(upper, lower);
    GHOSTED_FAST_UNROLL
    for (int c = 0; c < kColumnPairs; ++c) {
      acc[o][c] = vmmlaq_s32(acc[o][c], first, right[0][c]);
      acc[o][c] = vmmlaq_s32(acc[o][c], second, right[1][c]);
    }
  }
}

// sums[output][column] of up to 8 rows of the weight with the digits of one group, exact.
template <int kColumnPairs>
inline void multiply_bytes(const int8_t* weight, int64_t size, int64_t outputs,
                           const int8_t* digits, int32_t* sums) {
  constexpr int64_t kDigitStep = 2 * kColumnPairs * 16;
  int32x4_t acc[kByteOutputs / 2][kColumnPairs] = {};
  const int64_t whole = outputs == kByteOutputs ? size / kByteInputs : 0;
  // The next rows' bytes, in the order in which they lie.
  const int8_t* ahead = weight + kByteOutputs * size;
  for (int64_t step = 0; step < whole; ++step, ahead += kByteOutputs * kByteInputs) {
    __builtin_prefetch(ahead, 0, 2);
    __builtin_prefetch(ahead + 64, 0, 2);
    add_byte_step<kColumnPairs>(weight + step * kByteInputs, size, digits + step * kDigitStep, acc);
  }
  for (int64_t k = whole * kByteInputs; k < size; k += kByteInputs) {
    int8_t copy[kByteOutputs * kByteInputs] = {};
    for (int64_t o = 0; o < outputs; ++o) {
      std::memcpy(copy + o * kByteInputs, weight + o * size + k,
                  static_cast<size_t>(min64(kByteInputs, size - k)));
    }
    add_byte_step<kColumnPairs>(copy, kByteInputs, digits + k / kByteInputs * kDigitStep, acc);
  }
  for (int64_t o = 0; o < kByteOutputs / 2; ++o) {
    for (int64_t c = 0; c < kColumnPairs; ++c) {
      int32_t* to = sums + 2 * o * 2 * kColumnPairs + 2 * c;
      vst1_s32(to, vget_low_s32(acc[o][c]));
      vst1_s32(to + 2 * kColumnPairs, vget_high_s32(acc[o][c]));
    }
  }
}

template <int kColumnPairs>
inline void apply_byte_block(const Epilogue& epilogue, const DigitRows& x, int64_t out) {
  const ApplyArgs& args = epilogue.args;
  const int64_t size = args.hidden_size, count = min64(kByteOutputs, size - out);
  const int8_t* weight = static_cast<const int8_t*>(args.weight) + out * size;
  for (int64_t group = 0; group < x.groups; ++group) {
    int32_t exact[kByteOutputs * 2 * kColumnPairs];
    multiply_bytes<kColumnPairs>(weight, size, count, x.digits + group * x.group_bytes(), exact);
    const int64_t first = group * x.rows;
    for (int64_t row = first; row < min64(args.num_rows, first + x.rows); ++row) {
      float sums[kByteOutputs];
      for (int64_t o = 0; o < kByteOutputs; ++o) {
        const int32_t* digits = exact + o * 2 * kColumnPairs + (row - first) * kDigits;
        float sum = 0.0f;
        for (int64_t digit = 0; digit < kDigits; ++digit) {
          sum = sum * 256.0f + static_cast<float>(digits[digit]);
        }
        sums[o] = sum * x.unit[row];
      }
      finish<Dtype::kBFloat16>(epilogue, row, out, count, sums);
    }
  }
}

inline void apply_bytes(const Epilogue& epilogue, int64_t threads) {
  const ApplyArgs& args = epilogue.args;
  const int64_t size = args.hidden_size, blocks = (size + kByteOutputs - 1) / kByteOutputs;
  DigitRows x(args.num_rows, size);
  Scratch scratch(Scratch::bytes_for<int8_t>(x.bytes()) + Scratch::bytes_for<float>(args.num_rows));
  x.digits = scratch.take<int8_t>(x.bytes());
  x.unit = scratch.take<float>(args.num_rows);
  x.fill(args);
  const auto apply = x.rows == 1 ? &apply_byte_block<2> : &apply_byte_block<3>;
  for_each_run(blocks, size * size, threads, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) apply(epilogue, x, b * kByteOutputs);
  });
}

inline void neonbf16_ghost_apply(const ApplyArgs& args) {
  const bool in_bytes = args.dtype == Dtype::kBFloat16 && args.weight_dtype == Dtype::kInt8 &&
                        args.num_rows <= kDotTokens && args.hidden_size <= kMaxByteInputs;
  if (!in_bytes || args.hidden_size == 0 || args.num_rows == 0) return ghost_apply(args);
  const int64_t threads = max64(1, num_threads()), padded = round_up(args.hidden_size, kLanes);
  Scratch scratch(epilogue_bytes(args, padded));
  apply_bytes(make_epilogue(args, padded, threads, scratch), threads);
}

}  // namespace
}  // namespace ghosted_fast
