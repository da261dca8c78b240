// ghost_apply in tiles for up to 16 rows of bf16 with an int8 weight, as it lies: 16 outputs by 64
// inputs of it are the left tile of a product in int32.
//
// x is the right side: three digits of 8 bits (digits.h), which are three columns of a tile. One
// stream through the weight, bound by its reading.
#pragma once

#include "../digits.h"
#include "ghost_stream.h"

namespace ghosted_fast {
namespace {

// Inputs that one tile of int8 holds.
constexpr int64_t kByteInputs = 64;
// Rows whose digits fit the 16 columns of a tile.
constexpr int64_t kDigitRows = kAmxRows / kDigits;

// The rows of x as digits.
struct DigitRows {
  int64_t groups, rows, columns, steps;  // right tiles, rows and columns of each, and steps
  int8_t* digits = nullptr;              // [step][group][16 quads of inputs][columns][4]
  float* unit = nullptr;                 // [group * rows], what a last digit of 1 stands for

  DigitRows(int64_t num_rows, int64_t size)
      : groups((num_rows + kDigitRows - 1) / kDigitRows),
        rows((num_rows + groups - 1) / groups),
        columns(rows * kDigits),
        steps((size + kByteInputs - 1) / kByteInputs) {}
  int64_t tile_bytes() const { return kByteInputs * columns; }
  int64_t bytes() const { return steps * groups * tile_bytes(); }

  void fill(const ApplyArgs& args) {
    std::memset(digits, 0, static_cast<size_t>(bytes()));
    for (int64_t row = 0; row < groups * rows; ++row) {
      unit[row] = 0.0f;
      if (row < args.num_rows) fill_row(args, row);
    }
  }

 private:
  void fill_row(const ApplyArgs& args, int64_t row) {
    unit[row] = for_digits(args, row, [&](int64_t k, int64_t digit, VecB bytes) {
      int8_t* to = digits + (k / kByteInputs * groups + row / rows) * tile_bytes() +
                   (k % kByteInputs / 4 * columns + row % rows * kDigits) * 4;
      for (int64_t quad = 0; quad < kLanes / 4; ++quad) {
        std::memcpy(to + (quad * columns + digit) * 4,
                    reinterpret_cast<const char*>(&bytes) + 4 * quad, 4);
      }
    });
  }
};

// Sixteen rows of the weight, or fewer at its end.
struct ByteBlock {
  const int8_t* weight;
  int64_t size, rows;

  // The tile of a step, and from one of its rows to the next; what would reach beyond the weight is
  // copied to `copy`, with zeros after it.
  const int8_t* tile(int64_t step, int8_t* copy, int64_t& stride) const {
    const int64_t begin = step * kByteInputs, count = min64(kByteInputs, size - begin);
    stride = size;
    if (rows == kAmxRows && count == kByteInputs) return weight + begin;
    stride = kByteInputs;
    std::memset(copy, 0, kAmxRows * kByteInputs);
    for (int64_t r = 0; r < rows; ++r) {
      std::memcpy(copy + r * kByteInputs, weight + r * size + begin, static_cast<size_t>(count));
    }
    return copy;
  }
};

// The sums of the digits' products, in the tiles from 0 on. A single right tile has two chains.
template <int kGroups>
inline void multiply_bytes(const ByteBlock& block, const DigitRows& x) {
  alignas(64) int8_t copy[kAmxRows * kByteInputs];
  const int64_t x_stride = 4 * x.columns, x_tile = x.tile_bytes();
  const char* ahead = reinterpret_cast<const char*>(block.weight + kAmxRows * block.size);
  tile_zero<0>();
  tile_zero<1>();
  if constexpr (kGroups > 2) tile_zero<2>();
  if constexpr (kGroups > 3) tile_zero<3>();
  for (int64_t step = 0; step < x.steps; ++step, ahead += kAmxRows * kAmxRowBytes) {
    // The next block's bytes, in the order in which they lie.
    for (int64_t line = 0; line < kAmxRows; ++line) {
      __builtin_prefetch(ahead + line * kAmxRowBytes, 0, 2);
    }
    int64_t stride = 0;
    const int8_t* left = block.tile(step, copy, stride);
    tile_load<4>(left, stride);
    const int8_t* right = x.digits + step * kGroups * x_tile;
    tile_load<5>(right, x_stride);
    if constexpr (kGroups == 1) {
      if (step % 2 == 0) {
        tile_dot_int8<0, 4, 5>();
      } else {
        tile_dot_int8<1, 4, 5>();
      }
      continue;
    }
    tile_dot_int8<0, 4, 5>();
    tile_load<6>(right + x_tile, x_stride);
    tile_dot_int8<1, 4, 6>();
    if constexpr (kGroups > 2) {
      tile_load<7>(right + 2 * x_tile, x_stride);
      tile_dot_int8<2, 4, 7>();
    }
    if constexpr (kGroups > 3) {
      tile_load<5>(right + 3 * x_tile, x_stride);
      tile_dot_int8<3, 4, 5>();
    }
  }
}

// sums[row][16 outputs] of the rows of one right tile from what its tile of sums held.
inline void join_digits(const float* stored, const DigitRows& x, int64_t group, float* sums) {
  alignas(64) float columns[kAmxDwords];
  transpose_16(stored, columns);
  for (int64_t row = 0; row < x.rows; ++row) {
    const VecF unit = broadcast(x.unit[group * x.rows + row]);
    for (int v = 0; v < kPanel; v += kLanes) {
      const float* from = columns + row * kDigits * kPanel + v;
      VecF sum = {};
      for (int64_t digit = 0; digit < kDigits; ++digit) {
        const VecI exact = (VecI)load(from + digit * kPanel);
        sum = sum * 256.0f + __builtin_convertvector(exact, VecF);
      }
      store(sums + (group * x.rows + row) * kPanel + v, sum * unit);
    }
  }
}

template <int kGroups>
inline void apply_byte_block(const Epilogue& epilogue, const DigitRows& x, int64_t out) {
  const ApplyArgs& args = epilogue.args;
  const int64_t count = min64(kPanel, args.hidden_size - out);
  const ByteBlock block{static_cast<const int8_t*>(args.weight) + out * args.hidden_size,
                        args.hidden_size, count};
  multiply_bytes<kGroups>(block, x);
  alignas(64) float stored[4][kAmxDwords] = {};
  tile_store<0>(stored[0], kAmxRowBytes);
  tile_store<1>(stored[1], kAmxRowBytes);
  if constexpr (kGroups > 2) tile_store<2>(stored[2], kAmxRowBytes);
  if constexpr (kGroups > 3) tile_store<3>(stored[3], kAmxRowBytes);
  if constexpr (kGroups == 1) {
    for (int64_t i = 0; i < kAmxDwords; i += kLanes) {
      store(stored[0] + i, (VecF)((VecI)load(stored[0] + i) + (VecI)load(stored[1] + i)));
    }
  }
  alignas(64) float sums[kGroups * kDigitRows * kPanel];
  for (int64_t group = 0; group < kGroups; ++group) join_digits(stored[group], x, group, sums);
  for (int64_t row = 0; row < args.num_rows; ++row) {
    finish<Dtype::kBFloat16>(epilogue, row, out, count, sums + row * kPanel);
  }
}

inline TileConfig byte_tiles(const DigitRows& x) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) config.set(tile, kAmxRows, 4 * x.columns);
  config.set(4, kAmxRows, kAmxRowBytes);
  return config;
}

inline void apply_bytes(const Epilogue& epilogue, int64_t threads) {
  const ApplyArgs& args = epilogue.args;
  const int64_t size = args.hidden_size, blocks = (size + kPanel - 1) / kPanel;
  DigitRows x(args.num_rows, size);
  Scratch scratch(Scratch::bytes_for<int8_t>(x.bytes()) +
                  Scratch::bytes_for<float>(x.groups * x.rows));
  x.digits = scratch.take<int8_t>(x.bytes());
  x.unit = scratch.take<float>(x.groups * x.rows);
  x.fill(args);
  const TileConfig config = byte_tiles(x);
  const auto apply = x.groups == 1   ? &apply_byte_block<1>
                     : x.groups == 2 ? &apply_byte_block<2>
                     : x.groups == 3 ? &apply_byte_block<3>
                                     : &apply_byte_block<4>;
  for_each_run(blocks, size * size, threads, [&](int64_t begin, int64_t end) {
    const Tiles tiles(config);
    for (int64_t b = begin; b < end; ++b) apply(epilogue, x, b * kPanel);
  });
}

}  // namespace
}  // namespace ghosted_fast
