// What is asked of a whole row of activations: its largest magnitude and its sum of squares.
#pragma once

#include <cmath>

#include "convert.h"

namespace ghosted_fast {
namespace {

template <Dtype kType>
inline float typed_largest_magnitude(const void* row, int64_t count) {
  const StorageOf<kType>* values = static_cast<const StorageOf<kType>*>(row);
  if constexpr (kType == Dtype::kFloat32) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t magnitude = float_to_bits(values[i]) & 0x7fffffffu;
      largest = magnitude > largest ? magnitude : largest;
    }
    return bits_to_float(largest);
  } else {
    uint16_t largest = 0;
    for (int64_t i = 0; i < count; ++i) {
      const uint16_t magnitude = static_cast<uint16_t>(values[i] & 0x7fff);
      largest = magnitude > largest ? magnitude : largest;
    }
    return kType == Dtype::kBFloat16 ? bits_to_float(static_cast<uint32_t>(largest) << 16)
                                     : half_to_float(largest);
  }
}

// The largest |value| of a row; infinity or NaN if it holds either (their bits are the largest).
inline float largest_magnitude(const void* row, Dtype dtype, int64_t count) {
  return with_dtype(
      dtype, [&](auto tag) { return typed_largest_magnitude<decltype(tag)::kDtype>(row, count); });
}

template <Dtype kType>
inline double typed_sum_of_squares(const void* row, int64_t count) {
  const StorageOf<kType>* values = static_cast<const StorageOf<kType>*>(row);
  double lanes[kLanes] = {};
  int64_t i = 0;
  // Eight squares per lane in fp32, then fp64.
  for (; i + 8 * kLanes <= count; i += 8 * kLanes) {
    VecF sum = {};
    GHOSTED_FAST_UNROLL
    for (int u = 0; u < 8; ++u) {
      const VecF v = load_as_float<kType>(values + i + u * kLanes);
      sum = v * v + sum;
    }
    float part[kLanes];
    store(part, sum);
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += part[lane];
  }
  for (; i < count; i += kLanes) {
    const VecF v = load_as_float<kType>(values + i, count - i);
    float part[kLanes];
    store(part, v * v);
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += part[lane];
  }
  double sum = 0.0;
  for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return sum;
}

// In fp64 throughout: exact but for its last bits, whatever the range of the row.
template <Dtype kType>
inline double typed_exact_squares(const void* row, int64_t count) {
  typedef float HalfF __attribute__((vector_size(kDoubleLanes * 4)));
  const StorageOf<kType>* values = static_cast<const StorageOf<kType>*>(row);
  VecD sums[2] = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    const VecF v = load_as_float<kType>(values + i, count - i);
    HalfF halves[2];
    std::memcpy(halves, &v, sizeof(halves));
    for (int half = 0; half < 2; ++half) {
      const VecD wide = __builtin_convertvector(halves[half], VecD);
      sums[half] += wide * wide;
    }
  }
  double sum = 0.0;
  for (int lane = 0; lane < kDoubleLanes; ++lane) sum += sums[0][lane] + sums[1][lane];
  return sum;
}

inline double exact_sum_of_squares(const void* row, Dtype dtype, int64_t count) {
  return with_dtype(
      dtype, [&](auto tag) { return typed_exact_squares<decltype(tag)::kDtype>(row, count); });
}

inline double sum_of_squares(const void* row, Dtype dtype, int64_t count) {
  const double sum = with_dtype(
      dtype, [&](auto tag) { return typed_sum_of_squares<decltype(tag)::kDtype>(row, count); });
  // Squares that may have left the range of fp32 on the way: once more.
  const bool is_safe = dtype == Dtype::kFloat16 || (sum > 1e-25 && sum < 1e35);
  return is_safe ? sum : exact_sum_of_squares(row, dtype, count);
}

}  // namespace
}  // namespace ghosted_fast
