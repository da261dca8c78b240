// The operands of gram_update in tiles.
//
// The left side is x times a power of two, exact in bf16: tiles [16 features][16 pairs of tokens].
// The right side is x, y or y - x times the rest of the token's scale, tiles [16 pairs][16
// features]: in one part where it is exact in bf16, else as fp32 in three parts of 8 bits each,
// which are exact together. So a product keeps 24 bits on either side.
#pragma once

#include "../ghost_gemm.h"
#include "../gram_update.h"
#include "tiles.h"

namespace ghosted_fast {
namespace {

// Tokens that a tile holds, and that are summed in tiles from zero: 16 additions for each output.
// With 1024 tokens the error of the weighted form would reach its bound.
constexpr int64_t kStepTokens = 32;
constexpr int64_t kTiledTokens = 512;
constexpr int64_t kSlabSteps = kTiledTokens / kStepTokens;
// Features per side of a micro-kernel: two tiles.
constexpr int64_t kPairFeatures = 2 * kPanel;
// Of one tile's features over a slab; a pair of them (32 KiB) stays in the L1 cache.
constexpr int64_t kHalfDwords = kSlabSteps * kAmxDwords;
constexpr int64_t kSplitParts = 3;

// What the tokens are multiplied with on each side.
struct TileScales {
  float* left = nullptr;   // powers of two
  float* gram = nullptr;   // left * gram is the token's scale in G, squared
  float* cross = nullptr;  // left * cross is its scale in C

  static size_t bytes(int64_t count) { return 3 * Scratch::bytes_for<float>(count); }

  TileScales(const Tokens& tokens, Scratch& scratch) {
    left = scratch.take<float>(tokens.count);
    gram = scratch.take<float>(tokens.count);
    cross = scratch.take<float>(tokens.count);
    for (int64_t i = 0; i < tokens.count; ++i) {
      // The power of two at or below; not that of a denormal.
      const uint32_t exponent = float_to_bits(tokens.feature_scale[i]) & 0x7f800000u;
      left[i] = bits_to_float(exponent != 0 ? exponent : 0x00800000u);
      const float rest = tokens.feature_scale[i] / left[i];
      gram[i] = tokens.feature_scale[i] * rest;
      cross[i] = tokens.target_scale[i] * rest;
    }
  }
};

// The rows of one step, and their factors: 0 for those beyond the last token, which repeat it.
struct StepRows {
  const char* row[kStepTokens];
  const char* minus[kStepTokens];
  float scale[kStepTokens];

  StepRows(const PackSource& source, const int64_t* index, int64_t begin, int64_t end) {
    for (int64_t t = 0; t < kStepTokens; ++t) {
      const int64_t i = min64(begin + t, end - 1);
      row[t] = row_of(source.rows, index[i]);
      minus[t] = source.minus == nullptr ? nullptr : row_of(*source.minus, index[i]);
      scale[t] = begin + t < end ? source.scale[i] : 0.0f;
    }
  }
};

constexpr int32_t kTopHalf = static_cast<int32_t>(0xffff0000u);

// The top halves of numbers side by side: two bf16 where nothing is below.
inline VecF pair_of(VecF even, VecF odd) {
  return (VecF)((((VecI)even >> 16) & 0xffff) | ((VecI)odd & kTopHalf));
}

// The compiler may not merge what made the value with what uses it: a fused multiply-subtract of a
// product and its own first part would change the last bits.
inline VecF rounded(VecF value) {
  asm("" : "+x"(value));
  return value;
}

// to[part][lanes]: one part of numbers that are bf16, or three of fp32 numbers.
template <int kParts>
inline void store_parts(VecF even, VecF odd, float* to) {
  GHOSTED_FAST_UNROLL
  for (int part = 0; part < kParts; ++part, to += kAmxDwords) {
    store(to, pair_of(even, odd));
    if (part + 1 == kParts) return;
    even -= (VecF)((VecI)even & kTopHalf);
    odd -= (VecF)((VecI)odd & kTopHalf);
  }
}

template <Dtype kType, bool kMinus>
inline VecF scaled_values(const StepRows& rows, int64_t token, int64_t column, int64_t count) {
  const StorageOf<kType>* row = reinterpret_cast<const StorageOf<kType>*>(rows.row[token]);
  VecF value = load_as_float<kType>(row + column, count);
  if constexpr (kMinus) {
    const uint16_t* minus = reinterpret_cast<const uint16_t*>(rows.minus[token]);
    value -= load_as_float<Dtype::kBFloat16>(minus + column, count);
  }
  return rounded(value * broadcast(rows.scale[token]));
}

// Two tiles of the right side, `half` dwords apart, from 32 columns; zeros beyond the last.
template <Dtype kType, bool kMinus, int kParts>
inline void pack_right_tiles(const StepRows& rows, int64_t column, int64_t columns, int64_t half,
                             float* to) {
  for (int64_t k = 0; k < kAmxRows; ++k) {
    GHOSTED_FAST_UNROLL
    for (int64_t c = 0; c < kPairFeatures; c += kLanes) {
      const int64_t count = columns - column - c, at = count > 0 ? column + c : 0;
      const VecF even = scaled_values<kType, kMinus>(rows, 2 * k, at, count);
      const VecF odd = scaled_values<kType, kMinus>(rows, 2 * k + 1, at, count);
      store_parts<kParts>(even, odd, to + c / kPanel * half + k * kPanel + c % kPanel);
    }
  }
}

template <int kParts>
inline void pack_right_tiles_of(const PackSource& source, const StepRows& rows, int64_t column,
                                int64_t half, float* to) {
  with_dtype(source.rows.dtype, [&](auto tag) {
    constexpr Dtype kType = decltype(tag)::kDtype;
    if (source.minus != nullptr) {
      pack_right_tiles<kType, true, kParts>(rows, column, source.columns, half, to);
    } else {
      pack_right_tiles<kType, false, kParts>(rows, column, source.columns, half, to);
    }
  });
}

// to[half][step][16 features][16 pairs]: two tiles of the left side.
inline void pack_left_tiles(const StepRows& rows, int64_t column, int64_t columns, float* to) {
  alignas(64) float pairs[2 * kAmxDwords];
  pack_right_tiles<Dtype::kBFloat16, false, 1>(rows, column, columns, kAmxDwords, pairs);
  transpose_16(pairs, to);
  transpose_16(pairs + kAmxDwords, to + kHalfDwords);
}

// The tokens [begin, end) of a chunk, in slabs.
struct Slabs {
  int64_t begin, end;
  int64_t count() const { return (end - begin + kTiledTokens - 1) / kTiledTokens; }
  int64_t steps_of(int64_t slab) const {
    const int64_t tokens = min64(kTiledTokens, end - begin - slab * kTiledTokens);
    return (tokens + kStepTokens - 1) / kStepTokens;
  }
};

// Calls tile(pair, step, rows) for the features of the pairs [first, last) over one slab.
template <class Tile>
inline void for_slab_tiles(const PackSource& source, const int64_t* index, const Slabs& slabs,
                           int64_t slab, int64_t first, int64_t last, Tile&& tile) {
  for (int64_t step = 0; step < slabs.steps_of(slab); ++step) {
    const StepRows rows(source, index, slabs.begin + slab * kTiledTokens + step * kStepTokens,
                        slabs.end);
    for (int64_t pair = first; pair < last; ++pair) tile(pair, step, rows);
  }
}

// to[pair][slab][half][step] of all features.
inline void pack_left(const PackSource& source, const int64_t* index, const Slabs& slabs,
                      int64_t threads, float* to) {
  constexpr int64_t kPairs = 8;  // that one task takes: 512 bytes of a row
  const int64_t pairs = (source.columns + kPairFeatures - 1) / kPairFeatures;
  const int64_t groups = (pairs + kPairs - 1) / kPairs;
  for_each_task(slabs.count() * groups, threads, [&](int64_t task, int64_t) {
    const int64_t slab = task / groups, first = task % groups * kPairs;
    for_slab_tiles(source, index, slabs, slab, first, min64(pairs, first + kPairs),
                   [&](int64_t pair, int64_t step, const StepRows& rows) {
                     float* half = to + (pair * slabs.count() + slab) * 2 * kHalfDwords;
                     pack_left_tiles(rows, pair * kPairFeatures, source.columns,
                                     half + step * kAmxDwords);
                   });
  });
}

// to[pair - first][slab][half][step][part] of the pairs [first, last).
template <int kParts>
inline void pack_right(const PackSource& source, const int64_t* index, const Slabs& slabs,
                       int64_t first, int64_t last, float* to) {
  for (int64_t slab = 0; slab < slabs.count(); ++slab) {
    for_slab_tiles(source, index, slabs, slab, first, last,
                   [&](int64_t pair, int64_t step, const StepRows& rows) {
                     const int64_t at = (pair - first) * slabs.count() + slab;
                     pack_right_tiles_of<kParts>(
                         source, rows, pair * kPairFeatures, kParts * kHalfDwords,
                         to + (2 * at * kHalfDwords + step * kAmxDwords) * kParts);
                   });
  }
}

}  // namespace
}  // namespace ghosted_fast
