// ghost_apply on the path of AMX: bf16 rows in tiles, everything else as on the path avx512.
#pragma once

#include "ghost_block.h"
#include "ghost_int8.h"
#include "ghost_unpacked.h"

namespace ghosted_fast {
namespace {

// Rows of x that are in tiles at a time, for each thread: four blocks.
constexpr int64_t kTiledRows = 4 * kBlockRows;

// Rows [row, row + rows) of x as [pass][row tile][step][16][32], zeros beyond them, but for those
// that are read in place.
inline void tile_block(const ApplyArgs& args, const Passes& passes, int64_t row, int64_t rows,
                       uint16_t* to) {
  const int64_t size = args.hidden_size, tiles = round_up(rows, 2 * kAmxRows) / kAmxRows;
  constexpr int64_t kRowTile = kAmxRows * kTileInputs;
  const int64_t first = reads_in_place(args) ? rows / (2 * kAmxRows) * 2 * kAmxRows : 0;
  for (int64_t r = first; r < tiles * kAmxRows; ++r) {
    const uint16_t* from = static_cast<const uint16_t*>(args.x) + (row + r) * size;
    for (int64_t pass = 0; pass < passes.count; ++pass) {
      const int64_t steps = passes.length_of(pass);
      uint16_t* tile = to + (pass * tiles * passes.length + r / kAmxRows * steps) * kRowTile +
                       r % kAmxRows * kTileInputs;
      for (int64_t k = 0; k < steps; ++k, tile += kRowTile) {
        const int64_t input = (pass * passes.length + k) * kTileInputs;
        const int64_t count = r < rows ? min64(kTileInputs, size - input) : 0;
        if (count == kTileInputs) {
          std::memcpy(tile, from + input, kAmxRowBytes);
          continue;
        }
        std::memset(tile, 0, kAmxRowBytes);
        if (count > 0) std::memcpy(tile, from + input, static_cast<size_t>(count) * 2);
      }
    }
  }
}

// Panels [begin, end) of a weight that is not packed, in bf16 and in whole steps. int8 is exact.
inline void pack_panels(const ApplyArgs& args, const TileSteps& steps, int64_t begin, int64_t end,
                        float* to) {
  const int64_t size = args.hidden_size;
  for (int64_t panel = begin; panel < end; ++panel) {
    for (int64_t k = 0; k < steps.count(); ++k, to += kAmxDwords) {
      const int64_t input = k * kTileInputs, at = panel * kPanel * size + input;
      const int64_t rows = min64(kPanel, size - panel * kPanel), count = size - input;
      if (args.weight_dtype == Dtype::kBFloat16) {
        transpose_tile(static_cast<const uint16_t*>(args.weight) + at, size, rows, count, to);
        continue;
      }
      alignas(64) float tile[kAmxDwords];
      widen_tile(static_cast<const int8_t*>(args.weight) + at, size, rows, count, tile);
      transpose_16(tile, to);
    }
  }
}

// The panels of the pairs [begin, end), written to `buffer` where the weight is not packed.
inline BlockPanels panels_of(const ApplyArgs& args, const TileSteps& steps, int64_t begin,
                             int64_t end, float* buffer) {
  const int64_t size = args.hidden_size, panels = (size + kPanel - 1) / kPanel;
  if (args.packed) {
    const int64_t stride = packed_dwords<Dtype::kBFloat16>(size) * kPanel;
    return {static_cast<const float*>(args.weight), stride, 0, panels};
  }
  pack_panels(args, steps, 2 * begin, min64(panels, 2 * end), buffer);
  return {buffer, steps.count() * kAmxDwords, 2 * begin, panels};
}

inline void apply_blocks(const Epilogue& epilogue, int64_t threads) {
  const ApplyArgs& args = epilogue.args;
  const int64_t size = args.hidden_size, panels = (size + kPanel - 1) / kPanel;
  const int64_t pairs = (panels + 1) / 2, groups = (pairs + kBlockPairs - 1) / kBlockPairs;
  const Passes passes(size);
  // Rows of a block: fewer where there would not be enough of them for the threads.
  int64_t block_rows = min64(kBlockRows, round_up(args.num_rows, 2 * kAmxRows));
  while (threads > 1 && block_rows > 4 * kAmxRows &&
         groups * ((args.num_rows + block_rows - 1) / block_rows) < 2 * threads) {
    block_rows = round_up(block_rows / 2, 2 * kAmxRows);
  }
  const int64_t row_size = passes.steps.count() * kTileInputs;
  const int64_t chunk = round_up(min64(args.num_rows, kTiledRows * threads), block_rows);
  const int64_t slot_floats = BlockMemory::floats(passes, args.packed);
  Scratch scratch(Scratch::bytes_for<uint16_t>(chunk * row_size) +
                  static_cast<size_t>(threads) * Scratch::bytes_for<float>(slot_floats));
  uint16_t* x = scratch.take<uint16_t>(chunk * row_size);
  float* memory = scratch.take<float>(threads * slot_floats);
  for (int64_t first = 0; first < args.num_rows; first += chunk) {
    const int64_t rows = min64(chunk, args.num_rows - first);
    const int64_t blocks = (rows + block_rows - 1) / block_rows;
    for_each_task(blocks, threads, [&](int64_t block, int64_t) {
      tile_block(args, passes, first + block * block_rows,
                 min64(block_rows, rows - block * block_rows), x + block * block_rows * row_size);
    });
    // Where panels are packed on the way, a task takes all blocks of rows.
    const int64_t shares = args.packed ? blocks : 1;
    for_each_task(shares * groups, threads, [&](int64_t task, int64_t slot) {
      const int64_t share = task % shares, begin = task / shares * kBlockPairs;
      const int64_t end = min64(pairs, begin + kBlockPairs);
      const BlockMemory of_thread(memory + slot * slot_floats, passes);
      const BlockPanels given = panels_of(args, passes.steps, begin, end, of_thread.panels);
      for (int64_t block = share; block < blocks; block += shares) {
        const int64_t row = block * block_rows;
        BlockProduct product(epilogue, passes, of_thread, x + row * row_size, first + row,
                             min64(block_rows, rows - row));
        product.run(given, begin, end);
      }
    });
  }
}

// Which kernel serves a call; null for that of the path avx512.
inline auto tiled_kernel(const ApplyArgs& args) -> void (*)(const Epilogue&, int64_t) {
  if (args.dtype != Dtype::kBFloat16) return nullptr;
  if (is_read_as_it_lies(args)) return &apply_unpacked;
  if (args.num_rows > kStreamRows) return &apply_blocks;
  if (args.packed) return &apply_stream;
  const bool is_int8 = args.weight_dtype == Dtype::kInt8 && args.hidden_size <= kMaxByteInputs;
  return is_int8 ? &apply_bytes : nullptr;
}

inline void amx_ghost_apply(const ApplyArgs& args) {
  if (args.hidden_size == 0 || args.num_rows == 0) return;
  const auto kernel = tiled_kernel(args);
  if (kernel == nullptr) return ghost_apply(args);
  const int64_t threads = max64(1, num_threads()), padded = round_up(args.hidden_size, kLanes);
  Scratch scratch(epilogue_bytes(args, padded));
  kernel(make_epilogue(args, padded, threads, scratch), threads);
}

}  // namespace
}  // namespace ghosted_fast
