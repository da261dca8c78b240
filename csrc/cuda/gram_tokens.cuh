// The parts of gram_update that touch every token once: check, scales, operands, moments.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstring>

#include "gram_update.h"
#include "primitives.cuh"

namespace ghosted_fast {

constexpr int kVector = 8;  // columns that a thread takes at a time
constexpr int kLanes = 32;
constexpr int kRowThreads = 256;
constexpr int kMaxParts = 3;

// What rows are multiplied with, per token; null for ones.
struct TokenScales {
  double* gram = nullptr;   // w, or w / rms^2
  double* cross = nullptr;  // w, or w / rms
};

// bf16 is the upper half of an fp32.
__device__ __forceinline__ float bf16_to_float(uint32_t bits) {
  const uint32_t wide = bits << 16;
  float value;
  memcpy(&value, &wide, sizeof value);
  return value;
}

// Rounds to the nearest bf16; NaN stays NaN, also 0x7fffffff, the one that the hardware's
// arithmetic gives, which the addition would carry over into -0.
__device__ __forceinline__ uint32_t float_to_bf16(float value) {
  constexpr uint32_t kNaN = 0x7fc0u;
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return value == value ? (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16 : kNaN;
}

__device__ __forceinline__ void load_columns(const Rows& rows, int64_t token, int64_t column,
                                             float (&values)[kVector]) {
  const int64_t element = token * rows.stride + column;
  if (rows.dtype == Dtype::kFloat32) {
    const float* from = static_cast<const float*>(rows.data) + element;
    const uint4 low = load_16_bytes(from), high = load_16_bytes(from + 4);
    const uint32_t bits[kVector] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    memcpy(values, bits, sizeof bits);
    return;
  }
  const uint4 pairs = load_16_bytes(static_cast<const uint16_t*>(rows.data) + element);
  const uint32_t bits[kVector / 2] = {pairs.x, pairs.y, pairs.z, pairs.w};
#pragma unroll
  for (int i = 0; i < kVector / 2; ++i) {
    const uint32_t low = bits[i] & 0xffffu, high = bits[i] >> 16;
    const bool is_half = rows.dtype == Dtype::kFloat16;
    values[2 * i] = is_half ? half_to_float(low) : bf16_to_float(low);
    values[2 * i + 1] = is_half ? half_to_float(high) : bf16_to_float(high);
  }
}

// The magnitude, with infinity for NaN, so that a maximum shows both.
__device__ __forceinline__ float checked_magnitude(float value) {
  const float magnitude = fabsf(value);
  return magnitude <= FLT_MAX ? magnitude : INFINITY;
}

__device__ __forceinline__ bool is_power_of_two(double value) {
  uint64_t bits;
  memcpy(&bits, &value, sizeof bits);
  return (bits & ((uint64_t{1} << 52) - 1)) == 0;
}

// The power of two that a number is meant to be whose weight was rounded to fp32; else the number.
__device__ __forceinline__ double snapped(double scale) {
  constexpr double kRounding = 1.01 / (1 << 24);
  const double power = ldexp(1.0, ilogb(1.5 * scale));
  return fabs(scale - power) <= kRounding * power ? power : scale;
}

__device__ __forceinline__ int biased_exponent(double magnitude) {
  return magnitude > 0.0 ? ilogb(magnitude) + 1 + kExponentBias : 0;
}

__device__ __forceinline__ int size_bucket(double product) {
  if (product == 0.0) return 0;
  const int bucket = (ilogb(product) + kSizeBuckets) / 2;
  return bucket < 0 ? 0 : bucket < kSizeBuckets ? bucket : kSizeBuckets - 1;
}

// One warp per token: finds NaN and infinity, the largest magnitudes, and the scales.
__global__ void __launch_bounds__(kRowThreads)
    check_tokens(const GramArgs args, const TokenScales scales, GramTokenStatus* status) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * (kRowThreads / kLanes) +
                        static_cast<int>(threadIdx.x) / kLanes;
  if (token >= args.num_tokens) return;
  const float weight = args.token_weight == nullptr ? 1.0f : args.token_weight[token];
  if (!(weight >= 0.0f && weight <= FLT_MAX)) {
    if (lane == 0) {
      atomicMin(&status->bad_weight, static_cast<unsigned long long>(token));
      // Under graph capture nobody is told, and the scales are read all the same.
      if (scales.gram != nullptr) scales.gram[token] = scales.cross[token] = NAN;
    }
    return;
  }
  if (weight == 0.0f) return;  // neither its row nor its scales are read
  float values[kVector];
  float x_largest = 0.0f, y_largest = 0.0f;
  double squares = 0.0;
  for (int64_t column = lane * kVector; column < args.hidden_size; column += kLanes * kVector) {
    load_columns(args.x, token, column, values);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      x_largest = fmaxf(x_largest, checked_magnitude(values[i]));
      if (args.normed) squares += static_cast<double>(values[i]) * values[i];
    }
  }
  if (args.y.data != nullptr) {
    for (int64_t column = lane * kVector; column < args.num_outputs; column += kLanes * kVector) {
      load_columns(args.y, token, column, values);
#pragma unroll
      for (int i = 0; i < kVector; ++i) y_largest = fmaxf(y_largest, checked_magnitude(values[i]));
    }
  }
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    x_largest = fmaxf(x_largest, __shfl_xor_sync(0xffffffffu, x_largest, distance));
    y_largest = fmaxf(y_largest, __shfl_xor_sync(0xffffffffu, y_largest, distance));
    squares += __shfl_xor_sync(0xffffffffu, squares, distance);
  }
  if (lane != 0) return;
  double inverse_rms = 1.0;
  if (args.normed) {
    inverse_rms = 1.0 / sqrt(squares / static_cast<double>(args.hidden_size) + args.norm_eps);
  }
  double cross_scale = weight * inverse_rms, gram_scale = cross_scale * inverse_rms;
  if (args.normed) {
    // The usual weights of normed rows are powers of two times their mean squares. They are taken
    // as such in G and in C alike: moved no further than their rounding to fp32 has moved them.
    const double moved = snapped(gram_scale);
    cross_scale *= moved / gram_scale;
    gram_scale = moved;
  }
  if (scales.gram != nullptr) {
    scales.gram[token] = gram_scale;
    scales.cross[token] = cross_scale;
    if (!is_power_of_two(gram_scale)) atomicMax(&status->gram_is_inexact, 1);
    if (!is_power_of_two(cross_scale)) atomicMax(&status->cross_is_inexact, 1);
  }
  if (x_largest > FLT_MAX) atomicMin(&status->bad_x, static_cast<unsigned long long>(token));
  if (y_largest > FLT_MAX) atomicMin(&status->bad_y, static_cast<unsigned long long>(token));
  if (x_largest > FLT_MAX || y_largest > FLT_MAX) return;
  const double target = static_cast<double>(y_largest) + (args.delta ? x_largest : 0.0f);
  atomicMax(&status->x_exponent, biased_exponent(x_largest));
  atomicMax(&status->gram_exponent, biased_exponent(gram_scale * x_largest));
  atomicMax(&status->cross_exponent, biased_exponent(cross_scale * target));
  atomicAdd(&status->gram_sizes[size_bucket(gram_scale * x_largest * x_largest)], 1);
  atomicAdd(&status->cross_sizes[size_bucket(cross_scale * x_largest * target)], 1);
}

// Rows, less other rows if there are any, times scales: cut into bf16 parts whose sum they are.
struct OperandSource {
  Rows rows;
  Rows minus;  // data is null for none
  const double* scale = nullptr;
  double factor = 1.0;  // a power of two
  const float* token_weight = nullptr;
  int64_t columns = 0;
  int num_parts = 0;
};

// Writes [num_parts][num_tokens][columns] bf16 for the tokens from `first` on, one thread per eight
// columns. Rows of weight 0 become 0 and are not read.
__global__ void __launch_bounds__(kRowThreads)
    split_operand(const OperandSource source, int64_t first, int64_t num_tokens, uint16_t* parts) {
  const int64_t vectors = source.columns / kVector;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  if (index >= num_tokens * vectors) return;
  const int64_t row = index / vectors, column = index % vectors * kVector, token = first + row;
  float values[kVector] = {};
  if (source.token_weight == nullptr || source.token_weight[token] != 0.0f) {
    load_columns(source.rows, token, column, values);
    if (source.minus.data != nullptr) {
      float minus[kVector];
      load_columns(source.minus, token, column, minus);
#pragma unroll
      for (int i = 0; i < kVector; ++i) values[i] -= minus[i];
    }
    double scale = source.factor;
    if (source.scale != nullptr) scale *= source.scale[token];
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[i] = round_to_float(values[i] * scale);
  }
  uint16_t* to = parts + row * source.columns + column;
  for (int part = 0; part < source.num_parts; ++part) {
    uint32_t pairs[kVector / 2];
#pragma unroll
    for (int i = 0; i < kVector / 2; ++i) {
      const uint32_t low = float_to_bf16(values[2 * i]), high = float_to_bf16(values[2 * i + 1]);
      values[2 * i] -= bf16_to_float(low);
      values[2 * i + 1] -= bf16_to_float(high);
      pairs[i] = low | high << 16;
    }
    store_16_bytes(to, make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
    to += num_tokens * source.columns;
  }
}

constexpr int kMomentVectors = 8;  // vectors of columns per block: 128 bytes of 16-bit rows
constexpr int kMomentColumns = kMomentVectors * kVector;
constexpr int kMomentLanes = kRowThreads / kMomentVectors;
constexpr int kMoments = 3;
constexpr int kMomentSharedBytes = kMomentLanes * kMomentColumns * static_cast<int>(sizeof(double));

// moments += sums over all tokens, in fp64: every thread takes one token in kMomentLanes, then the
// lanes are added in order.
__global__ void __launch_bounds__(kRowThreads)
    add_moments(const GramArgs args, const TokenScales scales) {
  GHOSTED_FAST_DYNAMIC_SHARED(double, lane_sums);  // [kMomentLanes][kMomentColumns]
  const int vector = static_cast<int>(threadIdx.x) % kMomentVectors;
  const int lane = static_cast<int>(threadIdx.x) / kMomentVectors;
  const int64_t first_column = static_cast<int64_t>(blockIdx.x) * kMomentColumns;
  const int64_t column = first_column + vector * kVector;
  double sums[kMoments][kVector] = {};
  for (int64_t token = lane; column < args.hidden_size && token < args.num_tokens;
       token += kMomentLanes) {
    const double weight = args.token_weight == nullptr ? 1.0 : args.token_weight[token];
    if (weight == 0.0) continue;
    const double feature_weight = scales.cross == nullptr ? 1.0 : scales.cross[token];
    float x[kVector], y[kVector];
    load_columns(args.x, token, column, x);
#pragma unroll
    for (int i = 0; i < kVector; ++i) sums[0][i] += feature_weight * x[i];
    if (args.y.data == nullptr) continue;
    load_columns(args.y, token, column, y);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const double change = static_cast<double>(y[i]) - x[i];
      sums[1][i] += weight * change;
      sums[2][i] += weight * change * change;
    }
  }
  const int moments = args.y.data == nullptr ? 1 : kMoments;
#pragma unroll
  for (int moment = 0; moment < kMoments; ++moment) {
    if (moment >= moments) break;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      lane_sums[lane * kMomentColumns + vector * kVector + i] = sums[moment][i];
    __syncthreads();
    const int64_t own = first_column + threadIdx.x;
    if (threadIdx.x < kMomentColumns && own < args.hidden_size) {
      double total = 0.0;
      for (int i = 0; i < kMomentLanes; ++i) total += lane_sums[i * kMomentColumns + threadIdx.x];
      args.moments[moment * args.hidden_size + own] += total;
    }
  }
}

}  // namespace ghosted_fast
