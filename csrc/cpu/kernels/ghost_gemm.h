// ghost_apply for many rows: a blocked product. Strips of the weight are packed into panels
// [16 outputs][k][16 dwords] as they are needed. x is read in rows, one dword broadcast at a time,
// or on Arm in groups of rows side by side (tile.h).
#pragma once

#include "ghost_dot.h"
#include "tile.h"

namespace ghosted_fast {
namespace {

#if defined(__AVX512F__) || defined(GHOSTED_FAST_NEON)
constexpr int kGemmRows = 8;
constexpr int kGemmPanels = 3;
#elif defined(__AVX2__)
constexpr int kGemmRows = 4;
constexpr int kGemmPanels = 1;
#else
constexpr int kGemmRows = 2;
constexpr int kGemmPanels = 1;
#endif
// Rows of the tiles that take what is left of the tokens.
constexpr int kFewRows = kHasNeon ? 4 : 1;
// Outputs per strip: a multiple of 48, its panels fit the L2 cache up to hidden size 4096.
constexpr int64_t kStripPanels = 6;
constexpr int64_t kStripOutputs = kStripPanels * kPanel;
// Dwords of k per pass: three panels of it (24 KiB) stay in the L1 cache.
constexpr int64_t kGemmDwords = 128;
// Tokens per pass over a strip: their fp32 sums stay in the L2 cache.
constexpr int64_t kGemmTokens = 256;

// to[column][row] = from[row][column], 16 x 16 dwords; the rows of `from` lie `stride` bytes apart.
#if defined(__AVX512F__)
inline void transpose_16(const void* from, int64_t stride, float* to) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(static_cast<const char*>(from) + i * stride);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {  // a[i + c]: column 4q + c of the rows i .. i + 3, in quarter q
    a[i] = _mm512_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm512_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
  for (int c = 0; c < 4; ++c) {
    const __m512 low = _mm512_shuffle_f32x4(a[c], a[4 + c], 0x88);   // quarters 0, 2
    const __m512 high = _mm512_shuffle_f32x4(a[c], a[4 + c], 0xdd);  // quarters 1, 3
    const __m512 low2 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0x88);
    const __m512 high2 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0xdd);
    _mm512_storeu_ps(to + 16 * c, _mm512_shuffle_f32x4(low, low2, 0x88));
    _mm512_storeu_ps(to + 16 * (4 + c), _mm512_shuffle_f32x4(high, high2, 0x88));
    _mm512_storeu_ps(to + 16 * (8 + c), _mm512_shuffle_f32x4(low, low2, 0xdd));
    _mm512_storeu_ps(to + 16 * (12 + c), _mm512_shuffle_f32x4(high, high2, 0xdd));
  }
}
#else
inline void transpose_16(const void* from, int64_t stride, float* to) {
  for (int row = 0; row < 16; ++row) {
    float dwords[16];
    std::memcpy(dwords, static_cast<const char*>(from) + row * stride, sizeof(dwords));
    for (int column = 0; column < 16; ++column) to[16 * column + row] = dwords[column];
  }
}
#endif
inline void transpose_16(const float* from, float* to) {
  transpose_16(from, 16 * sizeof(float), to);
}

// Packs `outputs` rows of the weight (at most a strip) into panels of `dwords` dwords per column.
template <Dtype kType, bool kPairs>
inline void pack_strip(const void* weight_rows, int64_t size, int64_t outputs, int64_t dwords,
                       float* panels) {
  typedef WeightSource<kType, kPairs> Source;
  const StorageOf<kType>* weight = static_cast<const StorageOf<kType>*>(weight_rows);
  for (int64_t panel = 0; panel * kPanel < outputs; ++panel) {
    float* to = panels + panel * dwords * kPanel;
    const auto load_step = [&](int64_t out, int64_t k) {
      const int64_t element = kPairs ? 2 * k : k;
      const int64_t count = min64(Source::kStep, size - element);
      if (panel * kPanel + out >= outputs) return VecF{};
      const auto* from = weight + (panel * kPanel + out) * size + element;
      return count == Source::kStep ? Source::load_step(from) : Source::load_step(from, count);
    };
#if defined(GHOSTED_FAST_NEON)
    put_side_by_side<kPairs, kPanel>(dwords, load_step, to);
#else
    for (int64_t k = 0; k < dwords; k += kLanes) {
      const int64_t lanes = min64(kLanes, dwords - k);
      float rows[kPanel][kLanes];
      for (int64_t out = 0; out < kPanel; ++out) store(rows[out], load_step(out, k));
#if defined(__AVX512F__)
      if (lanes == kLanes) {
        transpose_16(&rows[0][0], to + k * kPanel);
        continue;
      }
#endif
      for (int64_t lane = 0; lane < lanes; ++lane) {
        for (int64_t out = 0; out < kPanel; ++out) to[(k + lane) * kPanel + out] = rows[out][lane];
      }
    }
#endif
  }
}

// sums[row][column] (+)= sum_k x[row][k] * panel[k][column] for k in [0, dwords).
#if defined(GHOSTED_FAST_NEON)
template <bool kPairs, int kRows, int kPanels>
inline void gemm_tile(int64_t dwords, const float* x, int64_t, const float* panels,
                      int64_t panel_stride, bool first, float* sums) {
  constexpr int kVectors = kPanels * kPanelVectors, kTaken = kStripe<kVectors>;
  for (int stripe = 0; stripe < kVectors; stripe += kTaken) {
    VecF acc[kRows][kTaken] = {};
    add_tile<kPairs>(dwords, x, kGemmRows, panels, panel_stride, stripe, acc);
    untangle<kPairs>(acc);
    GHOSTED_FAST_UNROLL
    for (int r = 0; r < kRows; ++r) {
      GHOSTED_FAST_UNROLL
      for (int v = 0; v < kTaken; ++v) {
        float* to = sums + r * kStripOutputs + (stripe + v) * kLanes;
        store(to, first ? acc[r][v] : load(to) + acc[r][v]);
      }
    }
  }
}
#else
template <bool kPairs, int kRows, int kPanels>
inline void gemm_tile(int64_t dwords, const float* x, int64_t x_stride, const float* panels,
                      int64_t panel_stride, bool first, float* sums) {
  constexpr int kVectors = kPanels * kPanelVectors;
  VecF acc[kRows][kVectors];
  GHOSTED_FAST_UNROLL
  for (int r = 0; r < kRows; ++r) {
    GHOSTED_FAST_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      acc[r][v] = first ? VecF{} : load(sums + r * kStripOutputs + v * kLanes);
    }
  }
  for (int64_t k = 0; k < dwords; ++k) {
    VecF right[kVectors];
    GHOSTED_FAST_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      right[v] = load(panels + (v / kPanelVectors) * panel_stride + k * kPanel +
                      (v % kPanelVectors) * kLanes);
    }
    GHOSTED_FAST_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const VecF left = broadcast(x[r * x_stride + k]);
      GHOSTED_FAST_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        acc[r][v] = multiply_add<kPairs>(acc[r][v], left, right[v]);
      }
    }
  }
  GHOSTED_FAST_UNROLL
  for (int r = 0; r < kRows; ++r) {
    GHOSTED_FAST_UNROLL
    for (int v = 0; v < kVectors; ++v) store(sums + r * kStripOutputs + v * kLanes, acc[r][v]);
  }
}
#endif

template <bool kPairs, int kRows>
inline void gemm_tile_of(int64_t panels, int64_t dwords, const float* x, int64_t x_stride,
                         const float* strip, int64_t panel_stride, bool first, float* sums) {
  if constexpr (kGemmPanels == 3) {
    if (panels >= 3) {
      return gemm_tile<kPairs, kRows, 3>(dwords, x, x_stride, strip, panel_stride, first, sums);
    }
    if (panels == 2) {
      return gemm_tile<kPairs, kRows, 2>(dwords, x, x_stride, strip, panel_stride, first, sums);
    }
  }
  return gemm_tile<kPairs, kRows, 1>(dwords, x, x_stride, strip, panel_stride, first, sums);
}

// sums[token * kStripOutputs + output] for `tokens` rows of x and one packed strip. On Arm x is in
// groups of kGemmRows rows side by side, and sums of rows beyond `tokens`, up to a group, are
// written too.
template <bool kPairs>
inline void gemm_strip(const float* x, int64_t x_stride, int64_t tokens, const float* strip,
                       int64_t outputs, int64_t dwords, float* sums) {
  const int64_t panels = (outputs + kPanel - 1) / kPanel;
  const int64_t panel_stride = dwords * kPanel;
  for (int64_t k = 0; k < dwords; k += kGemmDwords) {
    const int64_t count = min64(kGemmDwords, dwords - k);
    for (int64_t panel = 0; panel < panels; panel += kGemmPanels) {
      const float* b = strip + panel * panel_stride + k * kPanel;
      const int64_t left = min64(kGemmPanels, panels - panel);
      const float* from = x + (kHasNeon ? kGemmRows : 1) * k;
      float* to = sums + panel * kPanel;
      int64_t token = 0;
      for (; token + (kHasNeon ? kFewRows : kGemmRows - 1) < tokens; token += kGemmRows) {
        gemm_tile_of<kPairs, kGemmRows>(left, count, from + token * x_stride, x_stride, b,
                                        panel_stride, k == 0, to + token * kStripOutputs);
      }
      for (; token < tokens; token += kFewRows) {
        gemm_tile_of<kPairs, kFewRows>(left, count, from + token * x_stride, x_stride, b,
                                       panel_stride, k == 0, to + token * kStripOutputs);
      }
    }
  }
}

}  // namespace
}  // namespace ghosted_fast
