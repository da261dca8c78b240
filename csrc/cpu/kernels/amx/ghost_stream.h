// ghost_apply in tiles for up to 16 rows of bf16 with a packed weight: every 16 dwords of its
// panels, [16][16 outputs], are a tile as they lie, and meet one tile of as many rows as there are.
//
// One stream through the weight, bound by its reading.
#pragma once

#include "../ghost_apply.h"
#include "tiles.h"

namespace ghosted_fast {
namespace {

// Inputs that one tile of bf16 holds.
constexpr int64_t kTileInputs = 32;
// Rows that one tile holds: up to so many the weight is read once.
constexpr int64_t kStreamRows = kAmxRows;

// How far ahead of its reading the stream is prefetched into the L2 cache. What is fetched into L1
// may be gone before it is used, where another thread shares that cache.
constexpr int64_t kTileStreamAhead = 16384;

// How the inputs are cut into tiles.
struct TileSteps {
  int64_t whole = 0;  // of 16 dwords
  int64_t rest = 0;   // dwords after them

  explicit TileSteps(int64_t size)
      : whole(packed_dwords<Dtype::kBFloat16>(size) / kAmxRows),
        rest(packed_dwords<Dtype::kBFloat16>(size) % kAmxRows) {}
  int64_t count() const { return whole + (rest > 0 ? 1 : 0); }
};

// A copy of up to 16 rows of up to 32 inputs, beside zeros.
struct alignas(64) TileCopy {
  float dwords[kAmxDwords] = {};

  TileCopy(const uint16_t* from, int64_t stride, int64_t rows, int64_t inputs) {
    const size_t bytes = static_cast<size_t>(min64(kTileInputs, inputs)) * sizeof(uint16_t);
    for (int64_t row = 0; row < min64(kAmxRows, rows); ++row) {
      std::memcpy(dwords + row * kPanel, from + row * stride, bytes);
    }
  }
};

// to[16 pairs of inputs][16 rows], in dwords, of up to 16 rows of up to 32 inputs; zeros beyond.
inline void transpose_tile(const uint16_t* from, int64_t stride, int64_t rows, int64_t inputs,
                           float* to) {
  if (rows >= kAmxRows && inputs >= kTileInputs) {
    return transpose_16(from, stride * static_cast<int64_t>(sizeof(uint16_t)), to);
  }
  transpose_16(TileCopy(from, stride, rows, inputs).dwords, to);
}

// to[step][tile_rows][32 inputs] of rows of x, zeros beyond the inputs and the rows.
inline void tile_rows(const uint16_t* x, int64_t rows, int64_t size, int64_t tile_rows,
                      uint16_t* to) {
  const int64_t whole = size / kTileInputs, rest = size % kTileInputs;
  for (int64_t row = 0; row < tile_rows; ++row) {
    uint16_t* tile = to + row * kTileInputs;
    const int64_t step_size = tile_rows * kTileInputs;
    if (row >= rows) {
      for (int64_t k = 0; k < TileSteps(size).count(); ++k) {
        std::memset(tile + k * step_size, 0, kAmxRowBytes);
      }
      continue;
    }
    const uint16_t* from = x + row * size;
    for (int64_t k = 0; k < whole; ++k) {
      std::memcpy(tile + k * step_size, from + k * kTileInputs, kAmxRowBytes);
    }
    if (rest == 0) continue;
    std::memset(tile + whole * step_size, 0, kAmxRowBytes);
    std::memcpy(tile + whole * step_size, from + whole * kTileInputs,
                static_cast<size_t>(rest) * sizeof(uint16_t));
  }
}

// sums[row][output] and more[row][output] of one panel: two chains hide the latency of a product.
inline void stream_panel(const uint16_t* x, int64_t rows, const float* panel,
                         const TileSteps& steps, float* sums, float* more) {
  const int64_t x_step = rows * kTileInputs;
  const auto prefetch = [](const float* from, int64_t lines) {
    const char* ahead = reinterpret_cast<const char*>(from) + kTileStreamAhead;
    for (int64_t line = 0; line < lines; ++line) {
      __builtin_prefetch(ahead + line * kAmxRowBytes, 0, 2);
    }
  };
  tile_zero<0>();
  tile_zero<1>();
  int64_t k = 0;
  for (; k + 2 <= steps.whole; k += 2) {
    const float* b = panel + k * kAmxDwords;
    prefetch(b, 2 * kAmxRows);
    tile_load<4>(x + k * x_step, kAmxRowBytes);
    tile_load<6>(b, kAmxRowBytes);
    tile_dot<0, 4, 6>();
    tile_load<5>(x + (k + 1) * x_step, kAmxRowBytes);
    tile_load<7>(b + kAmxDwords, kAmxRowBytes);
    tile_dot<1, 5, 7>();
  }
  if (k < steps.whole) {
    prefetch(panel + k * kAmxDwords, kAmxRows);
    tile_load<4>(x + k * x_step, kAmxRowBytes);
    tile_load<6>(panel + k * kAmxDwords, kAmxRowBytes);
    tile_dot<0, 4, 6>();
  }
  if (steps.rest > 0) {  // tiles of fewer inputs: the next panel begins after them
    prefetch(panel + steps.whole * kAmxDwords, steps.rest);
    tile_load<2>(x + steps.whole * x_step, kAmxRowBytes);
    tile_load<3>(panel + steps.whole * kAmxDwords, kAmxRowBytes);
    tile_dot<1, 2, 3>();
  }
  tile_store<0>(sums, kAmxRowBytes);
  tile_store<1>(more, kAmxRowBytes);
}

inline TileConfig stream_tiles(int64_t rows, const TileSteps& steps) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) config.set(tile, tile < 6 ? rows : kAmxRows, kAmxRowBytes);
  if (steps.rest > 0) {
    config.set(2, rows, 4 * steps.rest);
    config.set(3, steps.rest, kAmxRowBytes);
  }
  return config;
}

inline void apply_stream(const Epilogue& epilogue, int64_t threads) {
  const ApplyArgs& args = epilogue.args;
  const int64_t size = args.hidden_size, rows = args.num_rows;
  const int64_t dwords = packed_dwords<Dtype::kBFloat16>(size);
  const int64_t panels = (size + kPanel - 1) / kPanel;
  const TileSteps steps(size);
  const int64_t inputs = steps.count() * rows * kTileInputs;
  Scratch scratch(Scratch::bytes_for<uint16_t>(inputs));
  uint16_t* x = scratch.take<uint16_t>(inputs);
  tile_rows(static_cast<const uint16_t*>(args.x), rows, size, rows, x);
  const TileConfig config = stream_tiles(rows, steps);
  const int64_t bytes = panels * dwords * kPanel * static_cast<int64_t>(sizeof(float));
  for_each_run(panels, bytes, threads, [&](int64_t begin, int64_t end) {
    const Tiles tiles(config);
    alignas(64) float sums[2][kStreamRows * kPanel];
    for (int64_t p = begin; p < end; ++p) {
      const float* panel = static_cast<const float*>(args.weight) + p * dwords * kPanel;
      stream_panel(x, rows, panel, steps, sums[0], sums[1]);
      const int64_t out = p * kPanel, count = min64(kPanel, size - out);
      for (int64_t row = 0; row < rows; ++row) {
        float* sum = sums[0] + row * kPanel;
        for (int v = 0; v < kPanel; v += kLanes) {
          store(sum + v, load(sum + v) + load(sums[1] + row * kPanel + v));
        }
        finish<Dtype::kBFloat16>(epilogue, row, out, count, sum);
      }
    }
  });
}

}  // namespace
}  // namespace ghosted_fast
