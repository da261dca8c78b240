// A tile of products in registers: kRows of one side with kVectors vectors of the other.
//
// Both sides are packed. A dword is one fp32 or a pair of bf16 of neighbouring k. The left side is
// [k][rows], the right one panels [k][16]. Where the processor multiplies quads (bfmmla), the two
// dwords of a quad lie side by side: [k / 2][rows][2] and [k / 2][16][2].
#pragma once

#include "lefts.h"

namespace ghosted_fast {
namespace {

// Vectors of a tile's row that are summed at the same time, of kVectors. On Arm 8 rows of two are
// 16 of the 32 registers; with three of them GCC keeps some sums in memory.
template <int kVectors>
constexpr int kStripe = kHasNeon ? 2 : kVectors;

#if defined(GHOSTED_FAST_NEON_BF16)
inline VecF multiply_add_quads(VecF sum, VecF a, VecF b) {
  return (VecF)vbfmmlaq_f32((float32x4_t)sum, (bfloat16x8_t)a, (bfloat16x8_t)b);
}

// acc[2p][v] and acc[2p + 1][v] += the rows 2p and 2p + 1 times the columns 4v, 4v + 1 and 4v + 2,
// 4v + 3: blocks of 2 x 2. 8 rows of two vectors take 16 bfmmla and 8 loads for four k.
template <int kRows, int kVectors>
inline void add_quads(int64_t dwords, const float* a, int64_t a_step, const float* panels,
                      int64_t panel_stride, int stripe, VecF (&acc)[kRows][kVectors]) {
  const float* right[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    const int at = stripe + v;
    right[v] = panels + (at / kPanelVectors) * panel_stride + (at % kPanelVectors) * 2 * kLanes;
  }
  for (int64_t k = 0; k < dwords; k += 2) {
    VecF left[kRows / 2];
    GHOSTED_FAST_UNROLL
    for (int p = 0; p < kRows / 2; ++p) left[p] = load(a + k * a_step + p * kLanes);
    GHOSTED_FAST_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const VecF low = load(right[v] + k * kPanel), high = load(right[v] + k * kPanel + kLanes);
      GHOSTED_FAST_UNROLL
      for (int p = 0; p < kRows / 2; ++p) {
        acc[2 * p][v] = multiply_add_quads(acc[2 * p][v], left[p], low);
        acc[2 * p + 1][v] = multiply_add_quads(acc[2 * p + 1][v], left[p], high);
      }
    }
  }
}

// Blocks of 2 x 2 as rows.
template <int kRows, int kVectors>
inline void untangle_quads(VecF (&acc)[kRows][kVectors]) {
  GHOSTED_FAST_UNROLL
  for (int p = 0; p < kRows / 2; ++p) {
    GHOSTED_FAST_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const float64x2_t low = (float64x2_t)acc[2 * p][v], high = (float64x2_t)acc[2 * p + 1][v];
      acc[2 * p][v] = (VecF)vzip1q_f64(low, high);
      acc[2 * p + 1][v] = (VecF)vzip2q_f64(low, high);
    }
  }
}
#endif

// acc += sum_k a[k][row] * panels[k][v] for k in [0, dwords), the vectors from `stripe` on. Quads
// give blocks, which `untangle` makes rows of.
template <bool kPairs, int kRows, int kVectors>
inline void add_tile(int64_t dwords, const float* a, int64_t a_step, const float* panels,
                     int64_t panel_stride, int stripe, VecF (&acc)[kRows][kVectors]) {
#if defined(GHOSTED_FAST_NEON_BF16)
  if constexpr (kPairs) {
    return add_quads(dwords, a, a_step, panels, panel_stride, stripe, acc);
  }
#endif
  const float* from[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    const int at = stripe + v;
    from[v] = panels + (at / kPanelVectors) * panel_stride + (at % kPanelVectors) * kLanes;
  }
  for (int64_t k = 0; k < dwords; ++k) {
    VecF right[kVectors];
    GHOSTED_FAST_UNROLL
    for (int v = 0; v < kVectors; ++v) right[v] = load(from[v] + k * kPanel);
    const Lefts<kRows> left(a + k * a_step);
    GHOSTED_FAST_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const auto value = left.at(r);
      GHOSTED_FAST_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        acc[r][v] = multiply_add<kPairs>(acc[r][v], value, right[v]);
      }
    }
  }
}

template <bool kPairs, int kRows, int kVectors>
inline void untangle([[maybe_unused]] VecF (&acc)[kRows][kVectors]) {
#if defined(GHOSTED_FAST_NEON_BF16)
  if constexpr (kPairs) untangle_quads(acc);
#endif
}

#if defined(GHOSTED_FAST_NEON)
inline void transpose_4(const VecF* rows, VecF* columns) {
  const float32x4_t a = (float32x4_t)rows[0], b = (float32x4_t)rows[1];
  const float32x4_t c = (float32x4_t)rows[2], d = (float32x4_t)rows[3];
  const float64x2_t ab = (float64x2_t)vtrn1q_f32(a, b), cd = (float64x2_t)vtrn1q_f32(c, d);
  const float64x2_t ab_odd = (float64x2_t)vtrn2q_f32(a, b), cd_odd = (float64x2_t)vtrn2q_f32(c, d);
  columns[0] = (VecF)vzip1q_f64(ab, cd);
  columns[1] = (VecF)vzip1q_f64(ab_odd, cd_odd);
  columns[2] = (VecF)vzip2q_f64(ab, cd);
  columns[3] = (VecF)vzip2q_f64(ab_odd, cd_odd);
}

// Writes kCount rows side by side, as a tile reads either side: to[k][row], or quads.
// load_step(row, k) gives the dwords k .. k + 3 of a row; `dwords` is a multiple of kPairDwords in
// the pair form.
template <bool kPairs, int kCount, class LoadStep>
inline void put_side_by_side(int64_t dwords, LoadStep load_step, float* to) {
  constexpr int kTaken = kPairs ? 2 : 4;
  for (int64_t k = 0; k < dwords; k += kLanes, to += kLanes * kCount) {
    const int64_t left = min64(kLanes, dwords - k);
    for (int64_t row = 0; row < kCount; row += kTaken) {
      VecF rows[kTaken], columns[4];
      for (int64_t r = 0; r < kTaken; ++r) rows[r] = load_step(row + r, k);
      if constexpr (kPairs) {
        const float64x2_t upper = (float64x2_t)rows[0], lower = (float64x2_t)rows[1];
        store(to + 2 * row, (VecF)vzip1q_f64(upper, lower));
        if (left > 2) store(to + 2 * kCount + 2 * row, (VecF)vzip2q_f64(upper, lower));
      } else {
        transpose_4(rows, columns);
        for (int64_t i = 0; i < left; ++i) store(to + i * kCount + row, columns[i]);
      }
    }
  }
}

// Panels of pairs [k][16], `dwords` of k, as quads [k / 2][16][2], `padded` of k.
inline void put_in_quads(const float* panel, int64_t dwords, int64_t padded, float* to) {
  for (int64_t k = 0; k < padded; k += 2) {
    for (int64_t v = 0; v < kPanel; v += kLanes) {
      const VecF odd = k + 1 < dwords ? load(panel + (k + 1) * kPanel + v) : VecF{};
      const float32x4_t even = (float32x4_t)load(panel + k * kPanel + v);
      store(to + k * kPanel + 2 * v, (VecF)vzip1q_f32(even, (float32x4_t)odd));
      store(to + k * kPanel + 2 * v + kLanes, (VecF)vzip2q_f32(even, (float32x4_t)odd));
    }
  }
}
#endif

}  // namespace
}  // namespace ghosted_fast
