// ghost_apply for a few rows: every row of the weight [out, in] is read once, as it lies in memory.
//
// A micro-kernel holds the dot products of kAccumulators / kTokens weight rows with kTokens tokens,
// each spread over the lanes of one register, and adds the lanes at the end.
#pragma once

#include "convert.h"

namespace ghosted_fast {
namespace {

#if defined(__AVX512F__)
constexpr int kAccumulators = 16;
#else
constexpr int kAccumulators = 8;
#endif
// Outputs per task: 64 rows of weights.
constexpr int64_t kDotGroup = 64;

// Where a step of weights comes from. In the pair form a step is 32 bf16, otherwise kLanes numbers.
template <Dtype kType, bool kPairs>
struct WeightSource {
  typedef StorageOf<kType> Stored;
  static constexpr int kStep = kPairs ? 2 * kLanes : kLanes;

  static inline VecF load_step(const Stored* from) {
#if defined(__AVX512BF16__)
    if constexpr (kPairs && kType == Dtype::kBFloat16) {
      VecF v;
      std::memcpy(&v, from, sizeof(v));
      return v;
    } else if constexpr (kPairs) {  // int8 is exact in bf16
      const __m512 low = (__m512)load_as_float<kType>(from);
      const __m512 high = (__m512)load_as_float<kType>(from + kLanes);
      return (VecF)_mm512_cvtne2ps_pbh(high, low);
    }
#endif
    if constexpr (!kPairs) return load_as_float<kType>(from);
    __builtin_unreachable();
  }
  static inline VecF load_step(const Stored* from, int64_t count) {
    Stored part[kStep] = {};
    std::memcpy(part, from, static_cast<size_t>(count) * sizeof(Stored));
    return load_step(part);
  }
};

// The lanes of each of kAccumulators registers added up.
inline void sum_registers(const VecF* acc, float* sums) {
#if defined(__AVX512F__)
  // Four rounds of adding halves of neighbours: 16 registers become one.
  __m512 v[16];
  for (int i = 0; i < 16; ++i) v[i] = (__m512)acc[i];
  for (int i = 0; i < 8; ++i) {  // lanes 0-7 hold the register 2i, lanes 8-15 the register 2i + 1
    v[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0x44),
                         _mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0xee));
  }
  for (int i = 0; i < 4; ++i) {  // 128 bits per register: 4i, 4i + 1, 4i + 2, 4i + 3
    v[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0x88),
                         _mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0xdd));
  }
  // Within 128 bits: a 4 x 4 transposition with additions on the way.
  const __m512 low01 =
      _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
  const __m512 low23 =
      _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
  const __m512 total =
      _mm512_add_ps(_mm512_shuffle_ps(low01, low23, 0x44), _mm512_shuffle_ps(low01, low23, 0xee));
  // Lane 4q + r holds the register 4r + q.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm512_storeu_ps(sums, _mm512_permutexvar_ps(order, total));
#else
  for (int i = 0; i < kAccumulators; ++i) sums[i] = sum_of_lanes(acc[i]);
#endif
}

// Weight rows up to this long are prefetched a whole tile ahead: they are too short for the
// hardware to find the stream. Longer ones 1 KiB ahead.
constexpr int64_t kShortRowBytes = 4096;
constexpr int64_t kPrefetchBytes = 1024;

// sums[row * kTokens + token] = weight[row] . x[token], for kAccumulators / kTokens rows. With
// kPrefetch the weights `ahead` elements on are prefetched.
// x: rows of `x_stride` floats; in the pair form these are dwords of two bf16.
template <Dtype kType, bool kPairs, int kTokens, bool kPrefetch>
inline void dot_tile(const StorageOf<kType>* weight, int64_t size, const float* const* x,
                     int64_t ahead, float* sums) {
  typedef WeightSource<kType, kPairs> Source;
  constexpr int kRows = kAccumulators / kTokens;
  VecF acc[kAccumulators] = {};
  int64_t k = 0;
  for (; k + Source::kStep <= size; k += Source::kStep) {
    const int64_t lane = kPairs ? k / 2 : k;
    VecF values[kTokens];
    GHOSTED_FAST_UNROLL
    for (int t = 0; t < kTokens; ++t) values[t] = load(x[t] + lane);
    GHOSTED_FAST_UNROLL
    for (int r = 0; r < kRows; ++r) {
      if constexpr (kPrefetch) __builtin_prefetch(weight + r * size + k + ahead);
      const VecF row = Source::load_step(weight + r * size + k);
      GHOSTED_FAST_UNROLL
      for (int t = 0; t < kTokens; ++t) {
        VecF& sum = acc[r * kTokens + t];
        sum = multiply_add<kPairs>(sum, row, values[t]);
      }
    }
  }
  if (k < size) {
    const int64_t lane = kPairs ? k / 2 : k;
    for (int r = 0; r < kRows; ++r) {
      const VecF row = Source::load_step(weight + r * size + k, size - k);
      for (int t = 0; t < kTokens; ++t) {
        VecF& sum = acc[r * kTokens + t];
        sum = multiply_add<kPairs>(sum, row, load(x[t] + lane));
      }
    }
  }
  sum_registers(acc, sums);
}

// One tile of dot_group: weight rows from `row` and kTokens tokens from `token` on. Where fewer
// rows or tokens are left than the tile has, it takes earlier rows or the last token again.
template <Dtype kType, bool kPairs, int kTokens>
inline void dot_group_tile(const StorageOf<kType>* weight, int64_t size, int64_t row, int64_t rows,
                           const float* x, int64_t x_stride, int64_t token, int64_t num_tokens,
                           float* out) {
  constexpr int kRows = kAccumulators / kTokens;
  const int64_t from = min64(row, rows - kRows);
  const float* tokens[kTokens];
  for (int t = 0; t < kTokens; ++t) tokens[t] = x + min64(token + t, num_tokens - 1) * x_stride;
  float sums[kAccumulators];
  constexpr int64_t kBytes = sizeof(StorageOf<kType>);
  const int64_t ahead = size * kBytes <= kShortRowBytes ? kRows * size : kPrefetchBytes / kBytes;
  const StorageOf<kType>* rows_begin = weight + from * size;
  if (token == 0) {  // later tokens find the weights in the cache
    dot_tile<kType, kPairs, kTokens, true>(rows_begin, size, tokens, ahead, sums);
  } else {
    dot_tile<kType, kPairs, kTokens, false>(rows_begin, size, tokens, ahead, sums);
  }
  for (int64_t r = row - from; r < kRows; ++r) {
    for (int64_t t = 0; t < kTokens && token + t < num_tokens; ++t) {
      out[(token + t) * kDotGroup + from + r] = sums[r * kTokens + t];
    }
  }
}

// out[token * kDotGroup + row] for the weight rows [0, rows) and all tokens; rows <= kDotGroup, and
// at least kAccumulators rows of weights lie before the last one.
// x: rows of x_stride floats, zero-padded to a whole step.
template <Dtype kType, bool kPairs>
inline void dot_group(const void* weight_rows, int64_t size, int64_t rows, const float* x,
                      int64_t x_stride, int64_t num_tokens, float* out) {
  const StorageOf<kType>* weight = static_cast<const StorageOf<kType>*>(weight_rows);
  const int64_t rest = num_tokens % 4 == 3 ? 0 : num_tokens % 4;
  const int64_t in_fours = num_tokens - rest;
  for (int64_t row = 0; row < rows && in_fours > 0; row += kAccumulators / 4) {
    for (int64_t token = 0; token < in_fours; token += 4) {
      dot_group_tile<kType, kPairs, 4>(weight, size, row, rows, x, x_stride, token, num_tokens,
                                       out);
    }
  }
  for (int64_t row = 0; row < rows && rest == 2; row += kAccumulators / 2) {
    dot_group_tile<kType, kPairs, 2>(weight, size, row, rows, x, x_stride, in_fours, num_tokens,
                                     out);
  }
  for (int64_t row = 0; row < rows && rest == 1; row += kAccumulators) {
    dot_group_tile<kType, kPairs, 1>(weight, size, row, rows, x, x_stride, in_fours, num_tokens,
                                     out);
  }
}

}  // namespace
}  // namespace ghosted_fast
