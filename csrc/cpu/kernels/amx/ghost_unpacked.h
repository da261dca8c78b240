// ghost_apply in tiles for up to 96 rows of bf16 with a weight as it lies, [out, in]: 16 outputs by
// 32 inputs are a tile, which meets the same inputs of up to 16 rows of x in each tile of these.
//
// The weight is read once, as 16 rows side by side, and bounds the time; nothing is packed but x.
// One of int8 is written as bf16, a few tiles ahead of their use, in the shadow of the products.
#pragma once

#include "ghost_stream.h"
#include "widened_tiles.h"

namespace ghosted_fast {
namespace {

constexpr int64_t kMostGroups = 6;
constexpr int64_t kUnpackedRows = kMostGroups * kAmxRows;
// Whether apply_unpacked serves a call: it wants whole tiles of outputs, of which the last may
// overlap the one before. A few rows meet a weight of int8 as digits.
inline bool is_read_as_it_lies(const ApplyArgs& args) {
  const bool in_digits = args.weight_dtype == Dtype::kInt8 && args.num_rows <= kStreamRows;
  return !args.packed && !in_digits && args.hidden_size >= kPanel && args.num_rows <= kUnpackedRows;
}

// The rows of x in tiles, [step][group][16 pairs of inputs][16 rows] in dwords: one stream,
// whatever the number of groups. Zeros beyond the inputs and the rows.
struct UnpackedRows {
  int64_t groups;
  float* tiles;

  float* tile(int64_t group, int64_t step) const {
    return tiles + (step * groups + group) * kAmxDwords;
  }
  void fill(const uint16_t* x, int64_t rows, int64_t size) const {
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t row = group * kAmxRows;
      for (int64_t step = 0; step * kTileInputs < size; ++step) {
        const int64_t input = step * kTileInputs;
        transpose_tile(x + row * size + input, size, rows - row, size - input, tile(group, step));
      }
    }
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

// The tiles of panels of a weight in bf16.
class StoredTiles {
 public:
  StoredTiles(const ApplyArgs& args, int64_t, int64_t)
      : weight_(static_cast<const uint16_t*>(args.weight)), size_(args.hidden_size) {}

  // A panel: the rows of the weight from `first` on.
  void begin(int64_t first) { rows_ = weight_ + first * size_; }

  // Fills tile 7 with a step of the panel.
  void load(int64_t step) const {
    const int64_t stride = size_ * static_cast<int64_t>(sizeof(uint16_t));
    prefetch_rows(rows_, stride, step * kAmxRowBytes);
    tile_load<7>(rows_ + step * kTileInputs, stride);
  }
  void load_rest(int64_t step) const {
    const int64_t input = step * kTileInputs;
    tile_load<7>(TileCopy(rows_ + input, size_, kPanel, size_ - input).dwords, kAmxRowBytes);
  }

 private:
  const uint16_t* weight_;
  const uint16_t* rows_ = nullptr;
  int64_t size_;
};

// sums[group][16 outputs][16 rows] of the 16 outputs that `weight` is at; of a single group two
// sums, to be added.
template <int kGroups, class Weight>
inline void unpacked_panel(const UnpackedRows& x, Weight& weight, int64_t size, float* sums) {
  tile_zero<0>();
  tile_zero<1>();
  if constexpr (kGroups > 2) tile_zero<2>();
  if constexpr (kGroups > 3) tile_zero<3>();
  if constexpr (kGroups > 4) tile_zero<4>();
  if constexpr (kGroups > 5) tile_zero<5>();
  const int64_t whole = size / kTileInputs;
  int64_t step = 0;
  for (; step + 2 <= whole; step += 2) {
    weight.load(step);
    add_step<kGroups, 0>(x, step);
    weight.load(step + 1);
    add_step<kGroups, 1>(x, step + 1);
  }
  for (; step < whole; ++step) {
    weight.load(step);
    add_step<kGroups, 0>(x, step);
  }
  if (size % kTileInputs != 0) {
    weight.load_rest(whole);
    add_step<kGroups, 0>(x, whole);
  }
  tile_store<0>(sums, kAmxRowBytes);
  tile_store<1>(sums + kAmxDwords, kAmxRowBytes);
  if constexpr (kGroups > 2) tile_store<2>(sums + 2 * kAmxDwords, kAmxRowBytes);
  if constexpr (kGroups > 3) tile_store<3>(sums + 3 * kAmxDwords, kAmxRowBytes);
  if constexpr (kGroups > 4) tile_store<4>(sums + 4 * kAmxDwords, kAmxRowBytes);
  if constexpr (kGroups > 5) tile_store<5>(sums + 5 * kAmxDwords, kAmxRowBytes);
}

template <int kGroups, class Weight>
inline void apply_unpacked_groups(const Epilogue& epilogue, int64_t threads) {
  const ApplyArgs& args = epilogue.args;
  const int64_t size = args.hidden_size, rows = args.num_rows;
  const int64_t panels = (size + kPanel - 1) / kPanel, steps = TileSteps(size).count();
  Scratch scratch(Scratch::bytes_for<float>(kGroups * steps * kAmxDwords));
  const UnpackedRows x{kGroups, scratch.take<float>(kGroups * steps * kAmxDwords)};
  x.fill(static_cast<const uint16_t*>(args.x), rows, size);
  const int64_t bytes = size * size * bytes_of(args.weight_dtype);
  for_each_run(panels, bytes, threads, [&](int64_t begin, int64_t end) {
    const Tiles owned(whole_tiles());
    constexpr int64_t kSums = kGroups == 1 ? 2 : kGroups;
    alignas(64) float sums[kSums * kAmxDwords];
    alignas(64) float by_row[kAmxDwords + kPanel];  // may be read to a whole vector
    Weight weight(args, begin, end);
    for (int64_t p = begin; p < end; ++p) {
      const int64_t out = p * kPanel, first = first_output(size, p);
      weight.begin(first);
      unpacked_panel<kGroups>(x, weight, size, sums);
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

template <class Weight>
inline void apply_unpacked_rows(const Epilogue& epilogue, int64_t threads) {
  switch ((epilogue.args.num_rows + kAmxRows - 1) / kAmxRows) {
    case 1:
      return apply_unpacked_groups<1, Weight>(epilogue, threads);
    case 2:
      return apply_unpacked_groups<2, Weight>(epilogue, threads);
    case 3:
      return apply_unpacked_groups<3, Weight>(epilogue, threads);
    case 4:
      return apply_unpacked_groups<4, Weight>(epilogue, threads);
    case 5:
      return apply_unpacked_groups<5, Weight>(epilogue, threads);
    default:
      return apply_unpacked_groups<6, Weight>(epilogue, threads);
  }
}

inline void apply_unpacked(const Epilogue& epilogue, int64_t threads) {
  if (epilogue.args.weight_dtype == Dtype::kInt8) {
    return apply_unpacked_rows<WidenedTiles>(epilogue, threads);
  }
  apply_unpacked_rows<StoredTiles>(epilogue, threads);
}

}  // namespace
}  // namespace ghosted_fast
