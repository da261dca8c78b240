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

// Eight columns of a row as they lie in memory; `high` is used by fp32 alone.
struct RawColumns {
  uint4 low, high;
};

__device__ __forceinline__ RawColumns fetch_columns(const Rows& rows, int64_t token,
                                                    int64_t column) {
  const int64_t element = token * rows.stride + column;
  const bool is_wide = rows.dtype == Dtype::kFloat32;
  const char* from = static_cast<const char*>(rows.data) + element * (is_wide ? 4 : 2);
  RawColumns raw = {};
  raw.low = load_16_bytes(from);
  if (is_wide) raw.high = load_16_bytes(from + 16);
  return raw;
}

__device__ __forceinline__ void widen_columns(const RawColumns& raw, Dtype dtype,
                                              float (&values)[kVector]) {
  if (dtype == Dtype::kFloat32) {
    const uint32_t bits[kVector] = {raw.low.x,  raw.low.y,  raw.low.z,  raw.low.w,
                                    raw.high.x, raw.high.y, raw.high.z, raw.high.w};
    memcpy(values, bits, sizeof bits);
    return;
  }
  const uint32_t bits[kVector / 2] = {raw.low.x, raw.low.y, raw.low.z, raw.low.w};
#pragma unroll
  for (int i = 0; i < kVector / 2; ++i) {
    const uint32_t low = bits[i] & 0xffffu, high = bits[i] >> 16;
    const bool is_half = dtype == Dtype::kFloat16;
    values[2 * i] = is_half ? half_to_float(low) : bf16_to_float(low);
    values[2 * i + 1] = is_half ? half_to_float(high) : bf16_to_float(high);
  }
}

__device__ __forceinline__ void load_columns(const Rows& rows, int64_t token, int64_t column,
                                             float (&values)[kVector]) {
  widen_columns(fetch_columns(rows, token, column), rows.dtype, values);
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

constexpr int kRowTokens = kRowThreads / kLanes;  // of a block of check_tokens

// What is found of a token; exponents and buckets as in GramTokenStatus.
struct TokenFindings {
  int32_t x_exponent = 0, gram_exponent = 0, cross_exponent = 0;
  int32_t gram_is_inexact = 0, cross_is_inexact = 0;
  int32_t gram_bucket = -1, cross_bucket = -1;  // below 0 for a token that does not count
};
constexpr int kFindingsSharedBytes = kRowTokens * static_cast<int>(sizeof(TokenFindings));

__device__ __forceinline__ void find_larger(int32_t& largest, int32_t value) {
  if (value > largest) largest = value;
}

// Looks at a token with one warp, and writes its scales. What is returned counts in lane 0.
__device__ __forceinline__ TokenFindings check_token(const GramArgs& args,
                                                     const TokenScales& scales, int64_t token,
                                                     int lane, GramTokenStatus* status) {
  TokenFindings found;
  const float weight = args.token_weight == nullptr ? 1.0f : args.token_weight[token];
  if (!(weight >= 0.0f && weight <= FLT_MAX)) {
    if (lane == 0) {
      atomicMin(&status->bad_weight, static_cast<unsigned long long>(token));
      // Under graph capture nobody is told, and the scales are read all the same.
      if (scales.gram != nullptr) scales.gram[token] = scales.cross[token] = NAN;
    }
    return found;
  }
  if (weight == 0.0f) return found;  // neither its row nor its scales are read
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
  if (lane != 0) return found;
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
    found.gram_is_inexact = !is_power_of_two(gram_scale);
    found.cross_is_inexact = !is_power_of_two(cross_scale);
  }
  if (x_largest > FLT_MAX) atomicMin(&status->bad_x, static_cast<unsigned long long>(token));
  if (y_largest > FLT_MAX) atomicMin(&status->bad_y, static_cast<unsigned long long>(token));
  if (x_largest > FLT_MAX || y_largest > FLT_MAX) return found;
  const double target = static_cast<double>(y_largest) + (args.delta ? x_largest : 0.0f);
  found.x_exponent = biased_exponent(x_largest);
  found.gram_exponent = biased_exponent(gram_scale * x_largest);
  found.cross_exponent = biased_exponent(cross_scale * target);
  found.gram_bucket = size_bucket(gram_scale * x_largest * x_largest);
  found.cross_bucket = size_bucket(cross_scale * x_largest * target);
  return found;
}

// Adds a token to its bucket, and all of its block that belong there too: the first of them does.
template <int32_t TokenFindings::* kBucket>
__device__ __forceinline__ void count_sizes(const TokenFindings* found, int own, int32_t* sizes) {
  const int32_t size = found[own].*kBucket;
  if (size < 0) return;
  int count = 0;
  for (int i = 0; i < kRowTokens; ++i) {
    if (found[i].*kBucket != size) continue;
    if (i < own) return;
    ++count;
  }
  atomicAdd(&sizes[size], count);
}

// One warp per token: finds NaN and infinity, the largest magnitudes, and the scales. The tokens of
// a block are added up before they meet the others' in memory.
__global__ void __launch_bounds__(kRowThreads)
    check_tokens(const GramArgs args, const TokenScales scales, GramTokenStatus* status) {
  GHOSTED_FAST_DYNAMIC_SHARED(TokenFindings, found);  // [kRowTokens]
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int warp = static_cast<int>(threadIdx.x) / kLanes;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kRowTokens + warp;
  TokenFindings own;
  if (token < args.num_tokens) own = check_token(args, scales, token, lane, status);
  if (lane == 0) found[warp] = own;
  __syncthreads();
  if (threadIdx.x >= kRowTokens) return;
  const int thread = static_cast<int>(threadIdx.x);
  count_sizes<&TokenFindings::gram_bucket>(found, thread, status->gram_sizes);
  count_sizes<&TokenFindings::cross_bucket>(found, thread, status->cross_sizes);
  if (threadIdx.x != 0) return;
  TokenFindings largest = found[0];
  for (int i = 1; i < kRowTokens; ++i) {
    find_larger(largest.x_exponent, found[i].x_exponent);
    find_larger(largest.gram_exponent, found[i].gram_exponent);
    find_larger(largest.cross_exponent, found[i].cross_exponent);
    find_larger(largest.gram_is_inexact, found[i].gram_is_inexact);
    find_larger(largest.cross_is_inexact, found[i].cross_is_inexact);
  }
  atomicMax(&status->x_exponent, largest.x_exponent);
  atomicMax(&status->gram_exponent, largest.gram_exponent);
  atomicMax(&status->cross_exponent, largest.cross_exponent);
  if (largest.gram_is_inexact != 0) atomicMax(&status->gram_is_inexact, 1);
  if (largest.cross_is_inexact != 0) atomicMax(&status->cross_is_inexact, 1);
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

constexpr int kMomentVectors = 4;  // vectors of columns per block: 64 bytes of 16-bit rows
constexpr int kMomentTokens = 4;   // tokens that a thread asks for before it adds the first
constexpr int kMomentColumns = kMomentVectors * kVector;
constexpr int kMomentLanes = kRowThreads / kMomentVectors;
constexpr int kMoments = 3;
constexpr int kMomentSharedBytes = kMomentLanes * kMomentColumns * static_cast<int>(sizeof(double));

// moments += sums over all tokens, in fp64: every thread takes one token in kMomentLanes, several
// at a time, so that no addition waits for memory alone; then the lanes are added in order.
__global__ void __launch_bounds__(kRowThreads)
    add_moments(const GramArgs args, const TokenScales scales) {
  GHOSTED_FAST_DYNAMIC_SHARED(double, lane_sums);  // [kMomentLanes][kMomentColumns]
  const int vector = static_cast<int>(threadIdx.x) % kMomentVectors;
  const int lane = static_cast<int>(threadIdx.x) / kMomentVectors;
  const int64_t first_column = static_cast<int64_t>(blockIdx.x) * kMomentColumns;
  const int64_t column = first_column + vector * kVector;
  double sums[kMoments][kVector] = {};
  const bool has_y = args.y.data != nullptr;
  const int64_t num_tokens = column < args.hidden_size ? args.num_tokens : 0;
  for (int64_t first = lane; first < num_tokens; first += kMomentTokens * kMomentLanes) {
    RawColumns raw_x[kMomentTokens] = {}, raw_y[kMomentTokens] = {};
    float weights[kMomentTokens];
#pragma unroll
    for (int t = 0; t < kMomentTokens; ++t) {
      const int64_t token = first + t * kMomentLanes;
      weights[t] = 0.0f;
      if (token < num_tokens) {
        weights[t] = args.token_weight == nullptr ? 1.0f : args.token_weight[token];
      }
    }
#pragma unroll
    for (int t = 0; t < kMomentTokens; ++t) {
      if (weights[t] == 0.0f) continue;
      raw_x[t] = fetch_columns(args.x, first + t * kMomentLanes, column);
      if (has_y) raw_y[t] = fetch_columns(args.y, first + t * kMomentLanes, column);
    }
#pragma unroll
    for (int t = 0; t < kMomentTokens; ++t) {
      if (weights[t] == 0.0f) continue;
      const int64_t token = first + t * kMomentLanes;
      const double weight = weights[t];
      const double feature_weight = scales.cross == nullptr ? 1.0 : scales.cross[token];
      float x[kVector], y[kVector];
      widen_columns(raw_x[t], args.x.dtype, x);
#pragma unroll
      for (int i = 0; i < kVector; ++i) sums[0][i] += feature_weight * x[i];
      if (!has_y) continue;
      widen_columns(raw_y[t], args.y.dtype, y);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const double change = static_cast<double>(y[i]) - x[i];
        sums[1][i] += weight * change;
        sums[2][i] += weight * change * change;
      }
    }
  }
  const int moments = has_y ? kMoments : 1;
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
