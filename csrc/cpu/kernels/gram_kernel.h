// gram_update: sums of products of token rows.
//
//   G += sum_t w_t f_t f_t^T (lower triangle)     C += sum_t w_t f_t t_t^T     t = y or y - x
//
// Rows scaled by sqrt(w) (and 1/rms) are packed once into panels [slab][16 columns][k][16 dwords],
// a dword being one fp32 or the bf16 of two neighbouring tokens (tile.h); the same panels serve
// both sides and both products. A micro-kernel multiplies 8 columns of one side with 48 of the
// other over one slab in registers; slabs are added in fp64 per block of 192 x 192, and blocks to
// the sums. 2 T d^2 flops per product (half of that for G); accuracy: see GramAccuracy in the
// tests' table.
#pragma once

#include <cmath>

#include "tile.h"

namespace ghosted_fast {
namespace {

// Dwords per column that are summed in fp32 before they are promoted: 256 tokens of bf16, 128 of
// fp32.
constexpr int64_t kSlabDwords = 128;
// Tokens that one register sums up; the sums of a slab's parts are then added. Without parts the
// error of a sum that few tokens own would be twice as large. bfmmla rounds to odd, with errors of
// up to a whole last bit, not half of one: its parts are shorter.
constexpr int64_t kPartTokens = 64;
constexpr int64_t kPairPartTokens = kHasQuads ? 32 : 64;
// One line of padding per panel, or panels of neighbouring columns fall into the same cache sets.
constexpr int64_t kPanelStride = kSlabDwords * kPanel + kPanel;
// Panels per side of a block: its fp64 sums (288 KiB) stay in the L2 cache.
constexpr int64_t kBlockPanels = 12;
// Tokens packed at a time, and the bytes of panels above which it is fewer.
constexpr int64_t kChunkTokens = 2048;
constexpr int64_t kChunkBytes = int64_t{96} << 20;

#if defined(__AVX512F__) || defined(GHOSTED_FAST_NEON)
constexpr int kTileRows = 8;
constexpr int kTilePanels = 3;
#elif defined(__AVX2__)
constexpr int kTileRows = 4;
constexpr int kTilePanels = 1;
#else
constexpr int kTileRows = 2;
constexpr int kTilePanels = 1;
#endif
constexpr int kTileColumns = kTilePanels * kPanel;
constexpr int64_t kTileSize = kTileRows * kTileColumns;

// to[0, kLanes) = or += sum, in fp64.
inline void promote(VecF sum, bool first, double* to) {
#if defined(__AVX512F__) || defined(GHOSTED_FAST_NEON)
#if defined(__AVX512F__)
  VecD low = (VecD)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)sum));
  VecD high = (VecD)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)sum, 1));
#else
  VecD low = (VecD)vcvt_f64_f32(vget_low_f32((float32x4_t)sum));
  VecD high = (VecD)vcvt_high_f64_f32((float32x4_t)sum);
#endif
  store(to, first ? low : load(to) + low);
  store(to + kDoubleLanes, first ? high : load(to + kDoubleLanes) + high);
#else
  for (int lane = 0; lane < kLanes; ++lane) to[lane] = (first ? 0.0 : to[lane]) + sum[lane];
#endif
}

// sums[row][column] (+)= sum_k a[k][row] * b[k][column] over one slab, added up in fp32 registers.
template <bool kPairs, int kPanels>
inline void gram_tile(int64_t dwords, const float* a, const float* b, bool first, float* parts,
                      double* sums) {
  constexpr int kVectors = kPanels * kPanelVectors, kTaken = kStripe<kVectors>;
  constexpr int64_t kPart = kPairs ? kPairPartTokens / 2 : kPartTokens;
  for (int stripe = 0; stripe < kVectors; stripe += kTaken) {
    for (int64_t begin = 0; begin < dwords; begin += kPart) {
      const int64_t end = min64(dwords, begin + kPart);
      VecF acc[kTileRows][kTaken] = {};
      add_tile<kPairs>(end - begin, a + begin * kPanel, kPanel, b + begin * kPanel, kPanelStride,
                       stripe, acc);
      // The earlier parts' sums, the slab's sums, and the tile's: fp32, fp32, fp64.
      GHOSTED_FAST_UNROLL
      for (int r = 0; r < kTileRows; ++r) {
        GHOSTED_FAST_UNROLL
        for (int v = 0; v < kTaken; ++v) {
          float* part = parts + (r * kTaken + v) * kLanes;
          if (begin > 0) acc[r][v] = load(part) + acc[r][v];
          if (end < dwords) store(part, acc[r][v]);
        }
      }
      if (end < dwords) continue;
      untangle<kPairs>(acc);
      GHOSTED_FAST_UNROLL
      for (int r = 0; r < kTileRows; ++r) {
        GHOSTED_FAST_UNROLL
        for (int v = 0; v < kTaken; ++v) {
          promote(acc[r][v], first, sums + (r * kVectors + stripe + v) * kLanes);
        }
      }
    }
  }
}

template <bool kPairs>
inline void gram_tile_of(int64_t panels, int64_t dwords, const float* a, const float* b, bool first,
                         float* parts, double* sums) {
  if constexpr (kTilePanels == 3) {
    if (panels >= 3) return gram_tile<kPairs, 3>(dwords, a, b, first, parts, sums);
    if (panels == 2) return gram_tile<kPairs, 2>(dwords, a, b, first, parts, sums);
  }
  return gram_tile<kPairs, 1>(dwords, a, b, first, parts, sums);
}

// Panels of one chunk: slab s begins at data + s * panels * kPanelStride.
struct Panels {
  float* data = nullptr;
  int64_t count = 0;  // panels per slab
  bool pairs = false;
  int64_t tokens_per_slab() const { return pairs ? 2 * kSlabDwords : kSlabDwords; }
};

struct Block {
  bool is_gram = false;
  int64_t row_panel = 0, column_panel = 0;  // of its corner
};

// G or C.
struct Sums {
  double* data = nullptr;
  int64_t rows = 0, columns = 0;
  double factor = 1.0;  // of what is added
};

// The sums that a tile is added to lie in memory: they travel while its last slab is multiplied.
inline void prefetch_tile(const double* out, int64_t rows, int64_t stride, int64_t panels) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < panels * kPanel; c += 8) __builtin_prefetch(out + r * stride + c, 1, 2);
  }
}

// One block of G (lower triangle) or C over all slabs of a chunk.
inline void gram_block(const Block& block, const Panels& left, const Panels& right,
                       int64_t num_tokens, int64_t block_panels, double* scratch,
                       const Sums& into) {
  const int64_t columns = into.columns;
  const int64_t row_begin = block.row_panel * kPanel;
  const int64_t row_end = min64(row_begin + block_panels * kPanel, left.count * kPanel);
  const int64_t column_begin = block.column_panel * kPanel;
  const int64_t column_end = min64(column_begin + block_panels * kPanel, right.count * kPanel);
  const int64_t slab_tokens = left.tokens_per_slab();
  float* parts = reinterpret_cast<float*>(scratch);
  scratch += kTileSize * sizeof(float) / sizeof(double);
  // Calls visit(panels, row, column, sums) for the tiles that hold a wanted element.
  auto for_tiles = [&](auto visit) {
    double* sums = scratch;
    for (int64_t j = column_begin; j < column_end; j += kTileColumns) {
      const int64_t first_row = block.is_gram ? max64(row_begin, j) : row_begin;
      for (int64_t i = first_row; i < row_end; i += kTileRows, sums += kTileSize) {
        int64_t panels = min64(kTilePanels, (column_end - j) / kPanel);
        if (block.is_gram) panels = min64(panels, (i + kTileRows - 1 - j) / kPanel + 1);
        visit(panels, i, j, sums);
      }
    }
  };
  for (int64_t start = 0, slab = 0; start < num_tokens; start += slab_tokens, ++slab) {
    const int64_t tokens = min64(slab_tokens, num_tokens - start);
    const int64_t dwords = left.pairs ? round_up((tokens + 1) / 2, kPairDwords) : tokens;
    const float* a = left.data + slab * left.count * kPanelStride;
    const float* b = right.data + slab * right.count * kPanelStride;
    const bool is_last = start + slab_tokens >= num_tokens;
    for_tiles([&](int64_t panels, int64_t i, int64_t j, double* sums) {
      double* to = into.data + i * columns + j;
      const int64_t tile_rows = min64(kTileRows, into.rows - i);
      if (is_last) prefetch_tile(to, tile_rows, columns, panels);
      const int64_t in_panel = i % kPanel * (left.pairs ? kPairDwords : 1);
      const float* a_tile = a + (i / kPanel) * kPanelStride + in_panel;
      const float* b_tile = b + (j / kPanel) * kPanelStride;
      if (kHasPairs && left.pairs) {
        gram_tile_of<kHasPairs>(panels, dwords, a_tile, b_tile, slab == 0, parts, sums);
      } else {
        gram_tile_of<false>(panels, dwords, a_tile, b_tile, slab == 0, parts, sums);
      }
      if (!is_last) return;
      const int64_t width = panels * kPanel;
      for (int64_t r = 0; r < tile_rows; ++r, to += columns) {
        const int64_t limit = block.is_gram ? min64(columns, i + r + 1) : columns;
        const int64_t count = min64(width, limit - j);
        for (int64_t c = 0; c < count; ++c) to[c] += into.factor * sums[r * width + c];
      }
    });
  }
}

}  // namespace
}  // namespace ghosted_fast
