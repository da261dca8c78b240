// ghost_apply in tiles for up to 96 rows of bf16 with a weight as it lies, [out, in]: 16 outputs by
// 32 inputs are a tile, which meets the same inputs of up to 16 rows of x in each tile of these.
//
// The weight is read once, as 16 rows side by side, and bounds the time; nothing is packed but x.
#pragma once

#include "ghost_stream.h"

namespace ghosted_fast {
namespace {

constexpr int64_t kMostGroups = 6;
constexpr int64_t kUnpackedRows = kMostGroups * kAmxRows;
// How far ahead of its reading each of the 16 rows is prefetched.
constexpr int64_t kRowsAhead = 1024;

// Whether apply_unpacked serves a call: it wants whole tiles of outputs, of which the last may
// overlap the one before.
inline bool is_read_as_it_lies(const ApplyArgs& args) {
  return !args.packed && args.weight_dtype == Dtype::kBFloat16 && args.hidden_size >= kPanel &&
         args.num_rows <= kUnpackedRows;
}

// to[group][step][16 pairs of inputs][16 rows] of x in dwords, zeros beyond the inputs and rows.
inline void transpose_rows(const uint16_t* x, int64_t rows, int64_t size, int64_t groups,
                           int64_t steps, float* to) {
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t row = group * kAmxRows;
    for (int64_t input = 0; input < steps * kTileInputs; input += kTileInputs, to += kAmxDwords) {
      TileCopy(x + row * size + input, size, rows - row, size - input).transpose(to);
    }
  }
}

// The rows of x, in tiles.
struct UnpackedRows {
  const float* tiles;
  int64_t steps;
  const float* tile(int64_t group, int64_t step) const {
    return tiles + (group * steps + step) * kAmxDwords;
  }
};

template <int kSum>
inline void add_rows(const float* x) {
  tile_load<6>(x, kAmxRowBytes);
  tile_dot<kSum, 7, 6>();
}

// Adds one step: tile 7 is of the weight, 6 of x; sums are the tiles from 0. A single group has two
// sums, for even and odd steps, which hides the latency of a product.
template <int kGroups, int kOdd>
inline void add_step(const UnpackedRows& x, int64_t step) {
  add_rows<kGroups == 1 ? kOdd : 0>(x.tile(0, step));
  if constexpr (kGroups > 1) add_rows<1>(x.tile(1, step));
  if constexpr (kGroups > 2) add_rows<2>(x.tile(2, step));
  if constexpr (kGroups > 3) add_rows<3>(x.tile(3, step));
  if constexpr (kGroups > 4) add_rows<4>(x.tile(4, step));
  if constexpr (kGroups > 5) add_rows<5>(x.tile(5, step));
}

// sums[group][16 outputs][16 rows] of the 16 outputs whose rows of the weight begin at `weight`; of
// a single group two sums, to be added.
template <int kGroups>
inline void unpacked_panel(const UnpackedRows& x, const uint16_t* weight, int64_t size,
                           float* sums) {
  const int64_t stride = size * static_cast<int64_t>(sizeof(uint16_t));
  const char* rows = reinterpret_cast<const char*>(weight);
  tile_zero<0>();
  tile_zero<1>();
  if constexpr (kGroups > 2) tile_zero<2>();
  if constexpr (kGroups > 3) tile_zero<3>();
  if constexpr (kGroups > 4) tile_zero<4>();
  if constexpr (kGroups > 5) tile_zero<5>();
  const auto load_weight = [&](int64_t step) {
    const int64_t at = step * kAmxRowBytes;
    // Behind the end of these rows the next 16 begin.
    const int64_t ahead =
        at + kRowsAhead < stride ? at + kRowsAhead : at + kRowsAhead + 15 * stride;
    for (int64_t row = 0; row < kAmxRows; ++row) {
      __builtin_prefetch(rows + row * stride + ahead, 0, 2);
    }
    tile_load<7>(rows + at, stride);
  };
  const int64_t whole = size / kTileInputs;
  int64_t step = 0;
  for (; step + 2 <= whole; step += 2) {
    load_weight(step);
    add_step<kGroups, 0>(x, step);
    load_weight(step + 1);
    add_step<kGroups, 1>(x, step + 1);
  }
  for (; step < whole; ++step) {
    load_weight(step);
    add_step<kGroups, 0>(x, step);
  }
  if (size % kTileInputs != 0) {
    const TileCopy rest(weight + whole * kTileInputs, size, kPanel, size % kTileInputs);
    tile_load<7>(rest.numbers, kAmxRowBytes);
    add_step<kGroups, 0>(x, whole);
  }
  tile_store<0>(sums, kAmxRowBytes);
  tile_store<1>(sums + kAmxDwords, kAmxRowBytes);
  if constexpr (kGroups > 2) tile_store<2>(sums + 2 * kAmxDwords, kAmxRowBytes);
  if constexpr (kGroups > 3) tile_store<3>(sums + 3 * kAmxDwords, kAmxRowBytes);
  if constexpr (kGroups > 4) tile_store<4>(sums + 4 * kAmxDwords, kAmxRowBytes);
  if constexpr (kGroups > 5) tile_store<5>(sums + 5 * kAmxDwords, kAmxRowBytes);
}

template <int kGroups>
inline void apply_unpacked_groups(const Epilogue& epilogue, int64_t threads) {
  const ApplyArgs& args = epilogue.args;
  const int64_t size = args.hidden_size, rows = args.num_rows;
  const int64_t panels = (size + kPanel - 1) / kPanel, steps = TileSteps(size).count();
  const uint16_t* weight = static_cast<const uint16_t*>(args.weight);
  Scratch scratch(Scratch::bytes_for<float>(kGroups * steps * kAmxDwords));
  float* tiles = scratch.take<float>(kGroups * steps * kAmxDwords);
  transpose_rows(static_cast<const uint16_t*>(args.x), rows, size, kGroups, steps, tiles);
  const UnpackedRows x{tiles, steps};
  const int64_t bytes = size * size * static_cast<int64_t>(sizeof(uint16_t));
  for_each_run(panels, bytes, threads, [&](int64_t begin, int64_t end) {
    const Tiles owned(whole_tiles());
    constexpr int64_t kSums = kGroups == 1 ? 2 : kGroups;
    alignas(64) float sums[kSums * kAmxDwords];
    alignas(64) float by_row[kAmxDwords + kPanel];  // may be read to a whole vector
    for (int64_t p = begin; p < end; ++p) {
      // The last 16 outputs may overlap those before, which are not written again.
      const int64_t out = p * kPanel, first = min64(out, size - kPanel);
      unpacked_panel<kGroups>(x, weight + first * size, size, sums);
      if constexpr (kGroups == 1) {
        for (int64_t i = 0; i < kAmxDwords; i += kLanes) {
          store(sums + i, load(sums + i) + load(sums + kAmxDwords + i));
        }
      }
      for (int64_t group = 0; group < kGroups; ++group) {
        transpose_16(sums + group * kAmxDwords, by_row);
        for (int64_t row = group * kAmxRows; row < min64(rows, (group + 1) * kAmxRows); ++row) {
          finish<Dtype::kBFloat16>(epilogue, row, out, min64(kPanel, size - out),
                                   by_row + row % kAmxRows * kPanel + out - first);
        }
      }
    }
  });
}

inline void apply_unpacked(const Epilogue& epilogue, int64_t threads) {
  switch ((epilogue.args.num_rows + kAmxRows - 1) / kAmxRows) {
    case 1:
      return apply_unpacked_groups<1>(epilogue, threads);
    case 2:
      return apply_unpacked_groups<2>(epilogue, threads);
    case 3:
      return apply_unpacked_groups<3>(epilogue, threads);
    case 4:
      return apply_unpacked_groups<4>(epilogue, threads);
    case 5:
      return apply_unpacked_groups<5>(epilogue, threads);
    default:
      return apply_unpacked_groups<6>(epilogue, threads);
  }
}

}  // namespace
}  // namespace ghosted_fast
