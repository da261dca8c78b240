// ghost_apply in tiles for many rows: blocks of 512 rows and 256 outputs.
//
// x is copied once into tiles, unless its rows can be read where they lie. A pair of panels over
// one pass of the inputs (at most 36 KiB) stays in the L1 cache while the rows are loaded past it
// and multiplied, 2 x 2 tiles at a time; x over one pass and the block's sums stay in the L2 cache.
// The sums of the last pass become outputs one micro-kernel later, in the shadow of the tiles.
#pragma once

#include "ghost_stream.h"

namespace ghosted_fast {
namespace {

// Steps of 32 inputs per pass: the fewest passes of which a pair of panels fits the L1 cache.
constexpr int64_t kMaxPassSteps = 18;
constexpr int64_t kBlockRows = 512;
// Outputs of a micro-kernel, and pairs of panels of a block.
constexpr int64_t kPairOutputs = 2 * kPanel;
constexpr int64_t kBlockPairs = 8;
constexpr int64_t kPairSums = 2 * kAmxRows * kPairOutputs;

// The weight's panels as they lie in a packed weight, or copies of the block's.
struct BlockPanels {
  const float* data = nullptr;
  int64_t panel_stride = 0;  // dwords from one panel to the next
  int64_t first = 0;         // the panel that lies at `data`
  int64_t count = 0;         // panels of the weight

  const float* at(int64_t panel) const { return data + (panel - first) * panel_stride; }
};

// How the inputs are cut into passes.
struct Passes {
  TileSteps steps;
  int64_t count, length;  // passes, and steps in each but the last

  explicit Passes(int64_t size)
      : steps(size),
        count((steps.count() + kMaxPassSteps - 1) / kMaxPassSteps),
        length((steps.count() + count - 1) / count) {}
  int64_t length_of(int64_t pass) const { return min64(length, steps.count() - pass * length); }
};

// Sums of 32 rows and 32 outputs that are yet to become outputs.
struct PendingSums {
  const float* sums = nullptr;
  int64_t row = 0, rows = 0, column = 0, columns = 0;

  void finish_rows(const Epilogue& epilogue, int64_t begin, int64_t end) const {
    constexpr Dtype kType = Dtype::kBFloat16;
    for (int64_t r = begin; r < min64(end, rows); ++r) {
      const float* from = sums + r * kPairOutputs;
      if (columns == kPairOutputs) {
        finish<kType, kPairOutputs>(epilogue, row + r, column, columns, from);
      } else {
        finish<kType>(epilogue, row + r, column, columns, from);
      }
    }
  }
};

// Where the tiles 0 to 3 go, as 32 rows of 32 numbers, and where the next content comes from.
struct TileTurn {
  float* former = nullptr;      // null: nothing is in them
  const float* next = nullptr;  // null: zeros
};

template <int kTile>
inline void turn_tile(const TileTurn& turn) {
  constexpr int64_t kStride = kPairOutputs * sizeof(float);
  constexpr int64_t kAt = kTile / 2 * kAmxRows * kPairOutputs + kTile % 2 * kPanel;
  if (turn.former != nullptr) tile_store<kTile>(turn.former + kAt, kStride);
  if (turn.next != nullptr) {
    tile_load<kTile>(turn.next + kAt, kStride);
  } else {
    tile_zero<kTile>();
  }
}

// Whether tiles of x are read where they lie: whole steps of whole cache lines, of rows that do not
// fall into the same cache sets.
inline bool reads_in_place(const ApplyArgs& args) {
  constexpr int64_t kConflict = 1024;
  const bool is_aligned = reinterpret_cast<uintptr_t>(args.x) % kAmxRowBytes == 0;
  return is_aligned && args.hidden_size % kTileInputs == 0 && 2 * args.hidden_size % kConflict != 0;
}

// What one micro-kernel multiplies: `steps` steps of two row tiles with two panels.
struct PairProduct {
  const uint16_t *upper, *lower;  // of the first step
  int64_t x_step, x_stride;       // numbers from one step to the next, bytes from row to row
  const float *left, *right;      // [step][16 dwords][16 outputs]
  int64_t steps;
};

// Leaves the sums in the tiles 0 to 3, whose content turns when this kernel's first products want
// them. work(k) is done in the shadow of step k.
template <class Work>
inline void multiply_pair(const PairProduct& p, const TileTurn& turn, Work&& work) {
  for (int64_t k = 0; k < p.steps; ++k) {
    tile_load<6>(p.left + k * kAmxDwords, kAmxRowBytes);
    tile_load<7>(p.right + k * kAmxDwords, kAmxRowBytes);
    tile_load_past_l1<4>(p.upper + k * p.x_step, p.x_stride);
    tile_load_past_l1<5>(p.lower + k * p.x_step, p.x_stride);
    if (k == 0) turn_tile<0>(turn);
    tile_dot<0, 4, 6>();
    if (k == 0) turn_tile<1>(turn);
    tile_dot<1, 4, 7>();
    if (k == 0) turn_tile<2>(turn);
    tile_dot<2, 5, 6>();
    if (k == 0) turn_tile<3>(turn);
    tile_dot<3, 5, 7>();
    work(k);
  }
}

// The memory of one thread.
struct BlockMemory {
  float* sums = nullptr;    // [pair of panels][pair of row tiles][32][32], of earlier passes
  float* spare = nullptr;   // a micro-kernel's sums on their way to outputs
  float* ends = nullptr;    // two panels over one pass, zero-padded to whole steps
  float* panels = nullptr;  // the block's panels where the weight is not packed

  static int64_t floats(const Passes& passes, bool is_packed) {
    const int64_t sums = passes.count > 1 ? kBlockPairs * kBlockRows / (2 * kAmxRows) : 0;
    return (sums + 1) * kPairSums + 2 * passes.length * kAmxDwords +
           (is_packed ? 0 : 2 * kBlockPairs * passes.steps.count() * kAmxDwords);
  }
  BlockMemory(float* data, const Passes& passes) {
    spare = data;
    ends = spare + kPairSums;
    sums = ends + 2 * passes.length * kAmxDwords;
    panels = sums + (passes.count > 1 ? kBlockPairs * kBlockRows / (2 * kAmxRows) * kPairSums : 0);
  }
};

// The outputs of `rows` rows from `row` on, for the pairs of panels [begin, end) whose panels begin
// at `panels`. x: [pass][row tile][step][16][32], which may lack what is read in place.
class BlockProduct {
 public:
  BlockProduct(const Epilogue& epilogue, const Passes& passes, const BlockMemory& memory,
               const uint16_t* x, int64_t row, int64_t rows)
      : epilogue_(epilogue),
        passes_(passes),
        memory_(memory),
        x_(x),
        row_(row),
        rows_(rows),
        tiles_(round_up(rows, 2 * kAmxRows) / kAmxRows),
        in_place_(reads_in_place(epilogue.args)) {}

  void run(const BlockPanels& panels, int64_t begin, int64_t end) {
    const Tiles tiles(whole_tiles());
    for (int64_t pass = 0; pass < passes_.count; ++pass) {
      for (int64_t pair = begin; pair < end; ++pair) {
        const bool is_last = pair + 1 == end;
        // What is read next: the next pair's panels, or the first pair's in the next pass.
        const float* next = is_last ? at(panels, begin, pass + 1) : at(panels, pair + 1, pass);
        multiply_rows(panels, pass, pair, pair - begin, next);
      }
    }
    const TileTurn last{former_, nullptr};
    turn_tile<0>(last);
    turn_tile<1>(last);
    turn_tile<2>(last);
    turn_tile<3>(last);
    pending_.finish_rows(epilogue_, 0, 2 * kAmxRows);
  }

 private:
  const float* at(const BlockPanels& panels, int64_t pair, int64_t pass) const {
    return panels.at(2 * pair) + pass * passes_.length * kAmxDwords;
  }

  // Panels whose last step is no whole one, or of which there is one only, are copied.
  void copy_panel(const BlockPanels& panels, int64_t panel, int64_t pass, float* to) const {
    const int64_t begin = pass * passes_.length * kAmxDwords;
    const int64_t wanted = passes_.length_of(pass) * kAmxDwords;
    const int64_t there =
        panel < panels.count ? min64(wanted, panels.panel_stride - begin) : int64_t{0};
    if (there > 0) {
      std::memcpy(to, panels.at(panel) + begin, static_cast<size_t>(there) * sizeof(float));
    }
    std::memset(to + there, 0, static_cast<size_t>(wanted - there) * sizeof(float));
  }

  // Fetches what the rows [begin, end) of a micro-kernel will be finished with, and where.
  void prefetch_outputs(int64_t begin, int64_t end, int64_t column) const {
    const ApplyArgs& args = epilogue_.args;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t at = row * args.hidden_size + column;
      __builtin_prefetch(static_cast<const uint16_t*>(args.x) + at, 0, 3);
      __builtin_prefetch(static_cast<uint16_t*>(args.y) + at, 1, 3);
    }
  }

  // Two tiles of rows from 32 * t on, over one pass.
  void set_rows(int64_t pass, int64_t t, PairProduct& product) const {
    const int64_t row = 2 * t * kAmxRows, size = epilogue_.args.hidden_size;
    if (in_place_ && row + 2 * kAmxRows <= rows_) {
      product.upper = static_cast<const uint16_t*>(epilogue_.args.x) + (row_ + row) * size +
                      pass * passes_.length * kTileInputs;
      product.lower = product.upper + kAmxRows * size;
      product.x_step = kTileInputs;
      product.x_stride = 2 * size;
      return;
    }
    constexpr int64_t kRowTile = kAmxRows * kTileInputs;
    product.upper = x_ + (pass * tiles_ * passes_.length + 2 * t * product.steps) * kRowTile;
    product.lower = product.upper + product.steps * kRowTile;
    product.x_step = kRowTile;
    product.x_stride = kAmxRowBytes;
  }

  void multiply_rows(const BlockPanels& panels, int64_t pass, int64_t pair, int64_t slot,
                     const float* next) {
    const int64_t steps = passes_.length_of(pass), row_pairs = tiles_ / 2;
    const bool is_last_pass = pass + 1 == passes_.count;
    PairProduct product{nullptr, nullptr, 0, 0, at(panels, pair, pass), nullptr, steps};
    product.right = product.left + panels.panel_stride;
    if (2 * pair + 1 >= panels.count || (is_last_pass && panels.panel_stride % kAmxDwords != 0)) {
      copy_panel(panels, 2 * pair, pass, memory_.ends);
      copy_panel(panels, 2 * pair + 1, pass, memory_.ends + passes_.length * kAmxDwords);
      product.left = memory_.ends;
      product.right = memory_.ends + passes_.length * kAmxDwords;
    }
    // The lines of both panels, shared out over all steps.
    const int64_t lines = steps * kAmxRows, all_steps = row_pairs * steps;
    int64_t step = 0, line = 0;
    for (int64_t t = 0; t < row_pairs; ++t) {
      const int64_t column = pair * kPairOutputs, row = 2 * t * kAmxRows;
      set_rows(pass, t, product);
      float* sums = memory_.sums + (slot * kBlockRows / (2 * kAmxRows) + t) * kPairSums;
      const TileTurn turn{former_, pass == 0 ? nullptr : sums};
      multiply_pair(product, turn, [&](int64_t k) {
        ++step;
        for (const int64_t until = step * lines / all_steps; line < until; ++line) {
          __builtin_prefetch(next + line * kPanel, 0, 2);
          __builtin_prefetch(next + panels.panel_stride + line * kPanel, 0, 2);
        }
        const int64_t begin = k * 2 * kAmxRows / steps, end = (k + 1) * 2 * kAmxRows / steps;
        if (is_last_pass)
          prefetch_outputs(row_ + row + begin, min64(row_ + rows_, row_ + row + end), column);
        pending_.finish_rows(epilogue_, begin, end);
      });
      former_ = is_last_pass ? memory_.spare : sums;
      pending_ = {};
      if (is_last_pass) {
        pending_ = {former_, row_ + row, rows_ - row, column,
                    min64(kPairOutputs, epilogue_.args.hidden_size - column)};
      }
    }
  }

  const Epilogue& epilogue_;
  const Passes& passes_;
  const BlockMemory& memory_;
  const uint16_t* x_;
  int64_t row_, rows_, tiles_;
  bool in_place_;
  float* former_ = nullptr;
  PendingSums pending_;
};

}  // namespace
}  // namespace ghosted_fast
