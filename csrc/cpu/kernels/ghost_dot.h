// ghost_apply for a few rows: every row of the weight [out, in] is read once, as it lies in memory.
//
// A micro-kernel holds the dot products of a few weight rows with a few tokens, each spread over
// the lanes of one register or more; the lanes are added at the end. One row at a time is one
// stream from memory, which is what memory delivers fastest.
#pragma once

#include "convert.h"

namespace ghosted_fast {
namespace {

#if defined(__AVX512F__) || defined(GHOSTED_FAST_NEON)
constexpr int kAccumulators = 16;
#else
constexpr int kAccumulators = 8;
#endif
// Outputs per task: rows of weights.
constexpr int64_t kDotGroup = 32;
// Rows of x up to which streaming the weight beats packing it.
constexpr int64_t kDotTokens = 16;

// Where a step of weights comes from: kLanes numbers, or in the pair form twice as many bf16.
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
#elif defined(GHOSTED_FAST_NEON_BF16)
    if constexpr (kPairs && kType == Dtype::kBFloat16) {
      return (VecF)vld1q_u16(from);
    } else if constexpr (kPairs) {  // the upper halves: int8 is exact in bf16
      const int16x8_t wide = vmovl_s8(vld1_s8(from));
      const float32x4_t low = vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
      const float32x4_t high = vcvtq_f32_s32(vmovl_high_s16(wide));
      return (VecF)vuzp2q_u16((uint16x8_t)low, (uint16x8_t)high);
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
#elif defined(GHOSTED_FAST_NEON)
  for (int i = 0; i < kAccumulators; i += 4) {
    const float32x4_t upper = vpaddq_f32((float32x4_t)acc[i], (float32x4_t)acc[i + 1]);
    const float32x4_t lower = vpaddq_f32((float32x4_t)acc[i + 2], (float32x4_t)acc[i + 3]);
    store(sums + i, (VecF)vpaddq_f32(upper, lower));
  }
#else
  for (int i = 0; i < kAccumulators; ++i) sums[i] = sum_of_lanes(acc[i]);
#endif
}

// Elements of a row of x that a pass over a tile's weights covers: those of all tokens, 16 KiB,
// stay in the L1 cache beside the weights.
constexpr int64_t kPassDwords = 4096;
// How far ahead weights are prefetched from memory: what arrives in one latency, twice. AMD's cores
// (the path avx512bf16) fetch into L1. Intel's, which run the other two of AVX-512, fetch into L2:
// on the one where both were tried that was the faster way. There up to 4 tokens also meet several
// long rows of weights at once, and each is a stream of its own: on a Xeon with AMX (family
// 6, model 167) that took 0.67 to 0.76 of one stream's time where a row is 4 KiB or 8, as much
// where it is 2, and more where it is 1.
#if defined(__AVX512F__) && !defined(__AVX512BF16__)
constexpr int64_t kPrefetchBytes = 16384;
constexpr int kNearHint = 2;
constexpr int64_t kLongRowBytes = 2048;
constexpr int kStreams = 8;
#else
constexpr int64_t kPrefetchBytes = 8192;
constexpr int kNearHint = 0;
constexpr int64_t kLongRowBytes = INT64_MAX;
constexpr int kStreams = 1;
#endif

// lanes[row * lane_stride + token] (+)= the products of weight[row] and x[token] for k in
// [begin, end), not yet added up over the lanes. Each is summed in kChains registers, so that there
// are enough to hide the latency of an addition. The first kPrefetched rows at `ahead` are
// prefetched on the way: by kNearHint if kNear, else into L2.
// x: rows of floats; in the pair form these are dwords of two bf16. Only the last end of a row may
// be no whole step.
template <Dtype kType, bool kPairs, int kRows, int kTokens, int kChains, int kPrefetched,
          bool kNear>
inline void dot_lanes(const StorageOf<kType>* weight, int64_t size, int64_t begin, int64_t end,
                      const float* const* x, const StorageOf<kType>* ahead, VecF* lanes,
                      int64_t lane_stride) {
  typedef WeightSource<kType, kPairs> Source;
  VecF acc[kChains][kRows * kTokens] = {};
  auto step = [&](int64_t k, VecF* sums, auto load_weights) {
    VecF rows[kRows];
    GHOSTED_FAST_UNROLL
    for (int r = 0; r < kRows; ++r) {
      if (r < kPrefetched) __builtin_prefetch(ahead + r * size + k, 0, kNear ? kNearHint : 2);
      rows[r] = load_weights(weight + r * size + k);
    }
    GHOSTED_FAST_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      const VecF value = load(x[t] + (kPairs ? k / 2 : k));
      GHOSTED_FAST_UNROLL
      for (int r = 0; r < kRows; ++r) {
        VecF& sum = sums[r * kTokens + t];
        sum = multiply_add<kPairs>(sum, rows[r], value);
      }
    }
  };
  auto whole = [](const StorageOf<kType>* from) { return Source::load_step(from); };
  int64_t k = begin;
  for (; k + kChains * Source::kStep <= end; k += kChains * Source::kStep) {
    GHOSTED_FAST_UNROLL
    for (int chain = 0; chain < kChains; ++chain)
      step(k + chain * Source::kStep, acc[chain], whole);
  }
  for (; k + Source::kStep <= end; k += Source::kStep) step(k, acc[0], whole);
  if (k < end) {
    step(k, acc[0], [&](const StorageOf<kType>* from) { return Source::load_step(from, end - k); });
  }
  GHOSTED_FAST_UNROLL
  for (int r = 0; r < kRows; ++r) {
    GHOSTED_FAST_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      VecF sum = acc[0][r * kTokens + t];
      GHOSTED_FAST_UNROLL
      for (int chain = 1; chain < kChains; ++chain) sum += acc[chain][r * kTokens + t];
      VecF& lane = lanes[r * lane_stride + t];
      lane = begin == 0 ? sum : lane + sum;
    }
  }
}

// One tile of weights and all tokens, kTokens at a time.
//
// Up to kTokens tokens: one pass over the weights, bound by their reading, and the next rows are
// prefetched. More: each pass over a part of the tile finds it in the L2 cache, where the passes
// over the part before have prefetched it, each its share of the rows: memory never waits.
template <Dtype kType, bool kPairs, int kTokens, int kRows, int kChains>
inline void dot_tile(const StorageOf<kType>* weight, int64_t size, int64_t rows,
                     int64_t to_next_tile, const float* x, int64_t x_stride, int64_t num_tokens,
                     float* out) {
  constexpr int64_t kDwordElements = WeightSource<kType, kPairs>::kStep / kLanes;
  constexpr int64_t kBytes = sizeof(StorageOf<kType>);
  const int64_t groups = (num_tokens + kTokens - 1) / kTokens, all = groups * kTokens;
  const float* tokens[kDotTokens];
  for (int64_t t = 0; t < all; ++t) tokens[t] = x + min64(t, num_tokens - 1) * x_stride;
  alignas(64) VecF lanes[kDotGroup * kDotTokens];
  const int64_t block = kTokens == 1 ? size : kPassDwords / kTokens * kDwordElements;
  const int64_t part = min64(size, block);
  const int64_t near = round_up(max64(1, kPrefetchBytes / (part * kBytes)), kRows);
  const int64_t whole_rows = rows / kRows * kRows;
  for (int64_t k = 0; k < size; k += block) {
    const int64_t end = min64(size, k + block);
    // From a row of this part to the same row of the next part that this thread will read.
    const int64_t to_next_part = end < size ? block : to_next_tile - k;
    for (int64_t g = 0; g < groups; ++g) {
      VecF* to = lanes + g * kTokens;
      const float* const* x_rows = tokens + g * kTokens;
      for (int64_t row = 0; row < whole_rows; row += kRows) {
        const StorageOf<kType>* begin = weight + row * size;
        const StorageOf<kType>* ahead = begin + to_next_part;
        if (groups > 1 && g < kRows) {
          dot_lanes<kType, kPairs, kRows, kTokens, kChains, 1, false>(
              begin, size, k, end, x_rows, ahead + g * size, to + row * all, all);
        } else if (groups > 1) {
          dot_lanes<kType, kPairs, kRows, kTokens, kChains, 0, false>(begin, size, k, end, x_rows,
                                                                      ahead, to + row * all, all);
        } else {
          ahead = row + near < rows ? begin + near * size : ahead + (near - rows) * size;
          dot_lanes<kType, kPairs, kRows, kTokens, kChains, kRows, true>(
              begin, size, k, end, x_rows, ahead, to + row * all, all);
        }
      }
      for (int64_t row = whole_rows; row < rows; ++row) {
        dot_lanes<kType, kPairs, 1, kTokens, kChains, 0, true>(weight + row * size, size, k, end,
                                                               x_rows, weight, to + row * all, all);
      }
    }
  }
  const int64_t count = rows * all, padded = round_up(count, kAccumulators);
  for (int64_t i = count; i < padded; ++i) lanes[i] = VecF{};
  float sums[kDotGroup * kDotTokens];
  for (int64_t i = 0; i < padded; i += kAccumulators) sum_registers(lanes + i, sums + i);
  for (int64_t t = 0; t < num_tokens; ++t) {
    for (int64_t row = 0; row < rows; ++row) out[t * kDotGroup + row] = sums[row * all + t];
  }
}

// out[token * kDotGroup + row] for the weight rows [0, rows) and all tokens; rows <= kDotGroup,
// num_tokens <= kDotTokens. `to_next_tile` is the distance, in elements, to the rows that this
// thread will take next.
// x: rows of x_stride floats, zero-padded to a whole step.
template <Dtype kType, bool kPairs>
inline void dot_group(const void* weight_rows, int64_t size, int64_t rows, int64_t to_next_tile,
                      const float* x, int64_t x_stride, int64_t num_tokens, float* out) {
  const StorageOf<kType>* weight = static_cast<const StorageOf<kType>*>(weight_rows);
  constexpr int kChains = kAccumulators / 4, kFew = (kStreams + 1) / 2;
  const bool is_long = size * static_cast<int64_t>(sizeof(StorageOf<kType>)) >= kLongRowBytes;
  if (num_tokens == 1 && is_long) {
    dot_tile<kType, kPairs, 1, kStreams, (kAccumulators + kStreams - 1) / kStreams>(
        weight, size, rows, to_next_tile, x, x_stride, num_tokens, out);
  } else if (num_tokens == 1) {
    dot_tile<kType, kPairs, 1, 1, kChains>(weight, size, rows, to_next_tile, x, x_stride,
                                           num_tokens, out);
  } else if (num_tokens <= 4 && is_long) {
    dot_tile<kType, kPairs, 4, kFew, kChains / kFew>(weight, size, rows, to_next_tile, x, x_stride,
                                                     num_tokens, out);
  } else if (num_tokens <= 4) {
    dot_tile<kType, kPairs, 4, 1, kChains>(weight, size, rows, to_next_tile, x, x_stride,
                                           num_tokens, out);
  } else {
    dot_tile<kType, kPairs, kAccumulators / 2, 2, 1>(weight, size, rows, to_next_tile, x, x_stride,
                                                     num_tokens, out);
  }
}

}  // namespace
}  // namespace ghosted_fast
