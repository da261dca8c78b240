// G or C for a group of the right side's pairs, in tiles: the rows stream past the group.
//
// The group lies in the L2 cache. A pair of left tiles over one slab stays in the L1 cache while
// each right pair is loaded past it and multiplied, 2 x 2 tiles from zero. In the shadow of the
// tiles the vector units add the sums of the micro-kernel before to the row's, in fp32, carry the
// row before to the fp64 sums in memory, and prefetch those and the next left tiles. What passes
// through the L1 cache meanwhile must stay below 16 KiB, or it evicts the left tiles.
#pragma once

#include "gram_pack.h"

namespace ghosted_fast {
namespace {

// Right pairs of a group: 1 to 1.1 MiB over 2048 tokens.
constexpr int64_t kGroupPairs = 8;
constexpr int64_t kSplitGroupPairs = 3;
// Sums of a micro-kernel, 32 x 32.
constexpr int64_t kKernelSums = kPairFeatures * kPairFeatures;
constexpr int64_t kKernelVectors = kKernelSums / kLanes;

// The fp32 sums of 32 rows on their way to the sums in memory, 32 numbers of one row at a time.
struct Drain {
  const float* sums = nullptr;  // [pair][32][32]
  double* to = nullptr;         // the first row's first number
  int64_t stride = 0, rows = 0, columns = 0, pairs = 0;
  int64_t diagonal = 0;  // columns of row 0 that are wanted; one more for each row after it
  double factor = 1.0;
  int64_t row = 0, pair = 0, next_row = 0, next_pair = 0;  // next to be added, and prefetched

  void prefetch(int64_t count) {
    for (; count > 0 && next_row < rows; --count) {
      const double* line = to + next_row * stride + next_pair * kPairFeatures;
      for (int64_t c = 0; c < kPairFeatures; c += 8) __builtin_prefetch(line + c, 1, 2);
      if (++next_pair == pairs) next_pair = 0, ++next_row;
    }
  }

  void advance(int64_t count) {
    for (; count > 0 && row < rows; --count) {
      const float* from = sums + pair * kKernelSums + row * kPairFeatures;
      double* line = to + row * stride + pair * kPairFeatures;
      const int64_t wanted = min64(columns, diagonal + row) - pair * kPairFeatures;
      if (wanted >= kPairFeatures) {
        GHOSTED_FAST_UNROLL
        for (int64_t c = 0; c < kPairFeatures; c += kDoubleLanes) {
          HalfF narrow;
          std::memcpy(&narrow, from + c, sizeof(narrow));
          store(line + c, load(line + c) + factor * __builtin_convertvector(narrow, VecD));
        }
      } else {
        for (int64_t c = 0; c < wanted; ++c) line[c] += factor * from[c];
      }
      if (++pair == pairs) pair = 0, ++row;
    }
  }

 private:
  typedef float HalfF __attribute__((vector_size(kDoubleLanes * 4)));
};

// Numbers that are yet to be added to sums; without `sums` they are the sums.
struct PendingSlab {
  float *values = nullptr, *sums = nullptr;

  void add(int64_t begin, int64_t end) const {
    for (int64_t i = begin * kLanes; i < end * kLanes; i += kLanes) {
      store(sums + i, load(sums + i) + load(values + i));
    }
  }
};

template <int kTile>
inline void start_tile(float* former) {
  constexpr int64_t kStride = kPairFeatures * sizeof(float);
  constexpr int64_t kAt = kTile / 2 * kAmxRows * kPairFeatures + kTile % 2 * kPanel;
  if (former != nullptr) tile_store<kTile>(former + kAt, kStride);
  tile_zero<kTile>();
}

// Two left tiles and two right ones over the steps of a slab, into the tiles 0 to 3. Their former
// content goes to `former` when this kernel's first products want the tiles. work(k) is done in the
// shadow of step k.
template <int kParts, class Work>
inline void multiply_slab(const float* left, const float* right, int64_t steps, float* former,
                          Work&& work) {
  for (int64_t k = 0; k < steps; ++k, left += kAmxDwords) {
    tile_load<4>(left, kAmxRowBytes);
    tile_load<5>(left + kHalfDwords, kAmxRowBytes);
    GHOSTED_FAST_UNROLL
    for (int part = 0; part < kParts; ++part, right += kAmxDwords) {
      tile_load_past_l1<6>(right, kAmxRowBytes);
      tile_load_past_l1<7>(right + kParts * kHalfDwords, kAmxRowBytes);
      const bool is_first = k == 0 && part == 0;
      if (is_first) start_tile<0>(former);
      tile_dot<0, 4, 6>();
      if (is_first) start_tile<1>(former);
      tile_dot<1, 4, 7>();
      if (is_first) start_tile<2>(former);
      tile_dot<2, 5, 6>();
      if (is_first) start_tile<3>(former);
      tile_dot<3, 5, 7>();
    }
    work(k);
  }
}

// What one call of multiply_group adds up: rows [row_begin, row_end) of pairs with the right pairs
// [first, last) of one chunk.
struct Group {
  bool is_gram = false;
  int64_t first = 0, last = 0, row_begin = 0, row_end = 0;
};

// The rows of a group in order.
template <int kParts>
class GroupRows {
 public:
  static constexpr int64_t kFloats = (2 * kGroupPairs + 1) * kKernelSums;

  // left: of all features; right: of the group; memory: kFloats.
  GroupRows(const Group& group, const Sums& into, const Slabs& slabs, const float* left,
            const float* right, float* memory)
      : group_(group), into_(into), slabs_(slabs), left_(left), right_(right), memory_(memory) {}

  void run() {
    const Tiles tiles(whole_tiles());
    for (int64_t row = group_.row_begin; row < group_.row_end; ++row) multiply_row(row);
    flush();
  }

 private:
  void multiply_row(int64_t row) {
    const int64_t last = group_.is_gram ? min64(group_.last, row + 1) : group_.last;
    const int64_t width = last - group_.first, count = slabs_.count(), kernels = width * count;
    float* sums = memory_ + (turn_ ^= 1) * kGroupPairs * kKernelSums;
    // The sums of the row before are complete after this row's first kernel.
    const bool is_overlapped = kernels > 2;
    if (!is_overlapped) flush();
    const int64_t pieces =
        is_overlapped ? (kPairFeatures * drain_.pairs + kernels - 2) / (kernels - 1) : 0;
    int64_t kernel = 0;
    for (int64_t slab = 0; slab < count; ++slab) {
      const float* left = left_ + (row * count + slab) * 2 * kHalfDwords;
      const int64_t steps = slabs_.steps_of(slab);
      // The lines of the next left tiles, per step.
      const int64_t lines = (2 * kHalfDwords / kPanel + width * steps - 1) / (width * steps);
      const float* ahead = left + 2 * kHalfDwords;
      for (int64_t pair = 0; pair < width; ++pair, ++kernel) {
        const int64_t quota = kernel == 0 ? 0 : pieces;
        const float* right = right_ + (pair * count + slab) * 2 * kHalfDwords * kParts;
        multiply_slab<kParts>(left, right, steps, in_tiles_.values, [&](int64_t k) {
          if (in_tiles_.sums != nullptr) {
            in_tiles_.add(k * kKernelVectors / steps, (k + 1) * kKernelVectors / steps);
          }
          for (int64_t n = 0; n < lines; ++n, ahead += kPanel) __builtin_prefetch(ahead, 0, 2);
          const int64_t now = (k + 1) * quota / steps - k * quota / steps;
          drain_.prefetch(now);
          drain_.advance(now);
        });
        float* kernel_sums = sums + pair * kKernelSums;
        float* spare = memory_ + 2 * kGroupPairs * kKernelSums;
        in_tiles_ = slab == 0 ? PendingSlab{kernel_sums, nullptr} : PendingSlab{spare, kernel_sums};
      }
    }
    drain_.advance(kPairFeatures * kGroupPairs);
    start_drain(row, width, sums);
  }

  void start_drain(int64_t row, int64_t width, const float* sums) {
    const int64_t first_row = row * kPairFeatures, column = group_.first * kPairFeatures;
    drain_ = {};
    drain_.sums = sums;
    drain_.to = into_.data + first_row * into_.columns + column;
    drain_.stride = into_.columns;
    drain_.rows = min64(kPairFeatures, into_.rows - first_row);
    drain_.columns = into_.columns - column;
    drain_.pairs = width;
    drain_.diagonal = group_.is_gram ? first_row - column + 1 : into_.columns;
    drain_.factor = into_.factor;
    drain_.prefetch(kPairFeatures / 2);
  }

  // Everything that is under way.
  void flush() {
    if (in_tiles_.values != nullptr) {
      start_tile<0>(in_tiles_.values);
      start_tile<1>(in_tiles_.values);
      start_tile<2>(in_tiles_.values);
      start_tile<3>(in_tiles_.values);
    }
    if (in_tiles_.sums != nullptr) in_tiles_.add(0, kKernelVectors);
    in_tiles_ = {};
    drain_.advance(kPairFeatures * kGroupPairs);
  }

  const Group& group_;
  const Sums& into_;
  const Slabs& slabs_;
  const float *left_, *right_;
  float* memory_;
  int turn_ = 0;
  Drain drain_;
  PendingSlab in_tiles_;
};

}  // namespace
}  // namespace ghosted_fast
