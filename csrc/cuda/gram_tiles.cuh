// The products of gram_update: one block per 128 x 128 tile of G (lower triangle) or C.
//
// A sum is left^T right over the tokens. Either side may be cut into up to three 16-bit parts; then
// the products of parts are summed, the small ones first. Tiles of 32 tokens go through a pipeline
// of three stages in shared memory into the tensor cores. These truncate when they add in fp32, and
// truncation is biased: one token 1000 times the others and 30 after it would cost 1e-7. So the
// sums of 16 tokens are added, rounded to nearest, to a second set of registers, and those to the
// fp64 sums in memory every 1024 tokens. Where few tokens own the sums, these additions would cost
// 2e-7, and are compensated. No other block writes the tile: the order of all additions is fixed.
#pragma once

#include "primitives.cuh"

namespace ghosted_fast {

constexpr int kTile = 128;       // columns of either side
constexpr int kTileTokens = 32;  // tokens per stage
constexpr int kStepTokens = 16;  // tokens per instruction of the tensor cores
constexpr int kStages = 3;
// 8 elements of padding put the 8 rows that ldmatrix reads into 8 different groups of banks.
constexpr int kTileStride = kTile + 8;
constexpr int kStageElements = kTileTokens * kTileStride;
constexpr int kTileSharedBytes = 2 * kStages * kStageElements * 2;
constexpr int kTileThreads = 256;
// Registers per thread, at most; nothing is spilled for it. Either way one block fits a
// multiprocessor.
constexpr int kTileRegisters = 200, kCompensatedTileRegisters = 255;
constexpr int kWarpRows = 64, kWarpColumns = 32;
constexpr int kFragmentRows = kWarpRows / 16, kFragmentColumns = kWarpColumns / 8;
// Tiles of tokens before the second set goes to memory. The fp64 tile stays in the L2 cache while
// its block runs, and is half of the traffic of the operands.
constexpr int kFlushTiles = 1024 / kTileTokens;
constexpr int kMaxProducts = 6;

// out += factor * left^T right.
struct TileSum {
  const uint16_t* left = nullptr;
  const uint16_t* right = nullptr;
  int64_t left_stride = 0, right_stride = 0;
  int rows = 0, columns = 0;  // of out: columns of left and of right
  double* out = nullptr;
  double factor = 1.0;
  int num_products = 1;
  int64_t left_offset[kMaxProducts] = {}, right_offset[kMaxProducts] = {};  // of the parts
};

struct TileArgs {
  TileSum sums[2];  // G, C
  // Blocks of C; those of G follow. C often has more products, and the longest should begin first.
  int num_cross = 0;
  int num_tokens = 0;
  const float* token_weight = nullptr;  // rows of weight 0 are not read; null for none
};

struct TilePlace {
  int row = 0, column = 0;  // in tiles
};

// The tile of the lower triangle with this number, counted row by row.
__device__ __forceinline__ TilePlace lower_tile(int number) {
  int row = static_cast<int>((sqrtf(8.0f * static_cast<float>(number) + 1.0f) - 1.0f) * 0.5f);
  while (row * (row + 1) / 2 > number) --row;  // the root is rounded: correct it in integers
  while ((row + 1) * (row + 2) / 2 <= number) ++row;
  return {row, number - row * (row + 1) / 2};
}

// Which of the two rows of a tile that a thread copies count. Their weights are asked for when the
// tile before is copied, so that no copy waits for memory.
class RowMask {
 public:
  __device__ __forceinline__ explicit RowMask(int thread) : row_(thread / 16) {}

  __device__ __forceinline__ void look_ahead(const TileArgs& args, int first_token) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = first_token + row_ + 16 * i;
      weight_[i] = 0.0f;
      if (token < args.num_tokens) {
        weight_[i] = args.token_weight == nullptr ? 1.0f : args.token_weight[token];
      }
    }
  }

  __device__ __forceinline__ bool counts(int i) const { return weight_[i] != 0.0f; }

 private:
  int row_;
  float weight_[2];
};

// Copies tiles of 32 tokens x 128 columns of one side; every thread the same eight columns of two
// rows that are 16 apart.
class TileLoader {
 public:
  __device__ __forceinline__ TileLoader(const uint16_t* rows, int64_t stride, int first_column,
                                        int num_columns, int thread)
      : stride_(stride) {
    const int row = thread / 16, column = thread % 16 * 8;
    in_columns_ = first_column + column < num_columns;
    shared_offset_ = row * kTileStride + column;
    from_ = rows + row * stride + (in_columns_ ? first_column + column : 0);
  }

  // `offset` is that of the part.
  __device__ __forceinline__ void load(uint16_t* stage, int64_t offset, const RowMask& mask,
                                       const uint16_t* safe) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool wanted = in_columns_ && mask.counts(i);
      const uint16_t* from = from_ + offset + 16 * i * stride_;
      copy_async_16(stage + shared_offset_ + 16 * i * kTileStride, wanted ? from : safe, wanted);
    }
  }

  __device__ __forceinline__ void advance() { from_ += kTileTokens * stride_; }

 private:
  int shared_offset_;
  int64_t stride_;
  bool in_columns_;
  const uint16_t* from_;
};
static_assert(kTileTokens == 32 && kTile == 128 && kTileThreads == 256, "as TileLoader has it");

using TileSums = float[kFragmentRows][kFragmentColumns][4];

__device__ __forceinline__ void clear(TileSums& sums) {
#pragma unroll
  for (int i = 0; i < kFragmentRows; ++i) {
#pragma unroll
    for (int j = 0; j < kFragmentColumns; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[i][j][e] = 0.0f;
    }
  }
}

// Adds the products of the 16 tokens from `token` on of one stage: this warp's 64 x 32 elements.
template <Dtype kType>
__device__ __forceinline__ void multiply_step(const uint16_t* left, const uint16_t* right,
                                              int token, int warp_row, int warp_column, int lane,
                                              TileSums& sums) {
  const int matrix = lane / 8, matrix_row = lane % 8;
  uint32_t right_fragments[kFragmentColumns / 2][4];
#pragma unroll
  for (int j = 0; j < kFragmentColumns / 2; ++j) {
    const int row = token + matrix % 2 * 8 + matrix_row;
    const int column = warp_column + 16 * j + matrix / 2 * 8;
    load_matrices_transposed(right_fragments[j], right + row * kTileStride + column);
  }
#pragma unroll
  for (int i = 0; i < kFragmentRows; ++i) {
    uint32_t left_fragment[4];
    const int row = token + matrix / 2 * 8 + matrix_row;
    const int column = warp_row + 16 * i + matrix % 2 * 8;
    load_matrices_transposed(left_fragment, left + row * kTileStride + column);
#pragma unroll
    for (int j = 0; j < kFragmentColumns; ++j) {
      multiply_add_16x8x16<kType>(sums[i][j], left_fragment, right_fragments[j / 2][j % 2 * 2],
                                  right_fragments[j / 2][j % 2 * 2 + 1]);
    }
  }
}

// Moves what the tensor cores have summed to the second set. Compensated, what the addition rounds
// off stays in the tensor cores' sums and is part of the next ones (Kahan's summation): three
// additions for one.
template <bool kCompensated>
__device__ __forceinline__ void promote(TileSums& step_sums, TileSums& sums) {
#pragma unroll
  for (int i = 0; i < kFragmentRows; ++i) {
#pragma unroll
    for (int j = 0; j < kFragmentColumns; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float total = sums[i][j][e] + step_sums[i][j][e];
        const float added = total - sums[i][j][e];
        step_sums[i][j][e] = kCompensated ? step_sums[i][j][e] - added : 0.0f;
        sums[i][j][e] = total;
      }
    }
  }
}

// out += factor * sums; of G the elements on and below the diagonal.
__device__ __forceinline__ void add_to_memory(const TileSum& sum, bool is_lower, int first_row,
                                              int first_column, int lane, const TileSums& sums) {
#pragma unroll
  for (int i = 0; i < kFragmentRows; ++i) {
#pragma unroll
    for (int j = 0; j < kFragmentColumns; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first_row + 16 * i + 8 * half + lane / 4;
        const int column = first_column + 8 * j + lane % 4 * 2;
        if (row >= sum.rows || column >= sum.columns) continue;
        const double first = sum.factor * sums[i][j][2 * half];
        const double second = sum.factor * sums[i][j][2 * half + 1];
        double* to = sum.out + static_cast<int64_t>(row) * sum.columns + column;
        if (!is_lower || column < row) {
          double2 value = load_sums(to);
          value.x += first;
          value.y += second;
          store_sums(to, value);
        } else if (column == row) {
          *to += first;
        }
      }
    }
  }
}

// kSeveral: whether a sum may have several products. kCompensated: whether few tokens may own a
// sum, so that all roundings are at the size of the whole.
template <Dtype kType, bool kSeveral, bool kCompensated>
__global__ void __maxnreg__(kCompensated ? kCompensatedTileRegisters : kTileRegisters)
    gram_tiles(const TileArgs args) {
  GHOSTED_FAST_DYNAMIC_SHARED(uint16_t, shared);
  uint16_t* left_stages = shared;
  uint16_t* right_stages = shared + kStages * kStageElements;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int warp_row = warp % 2 * kWarpRows, warp_column = warp / 2 * kWarpColumns;
  const int block = static_cast<int>(blockIdx.x);
  const bool is_lower = block >= args.num_cross;
  const TileSum& sum = args.sums[is_lower ? 0 : 1];
  const int row_tiles = (sum.rows + kTile - 1) / kTile;
  const TilePlace place = is_lower ? lower_tile(block - args.num_cross)
                                   : TilePlace{block % row_tiles, block / row_tiles};

  TileLoader left_loader(sum.left, sum.left_stride, place.row * kTile, sum.rows, thread);
  TileLoader right_loader(sum.right, sum.right_stride, place.column * kTile, sum.columns, thread);
  // The loop over products costs the registers that a second step in flight would need.
  constexpr int kUnroll = kSeveral ? 1 : kTileTokens / kStepTokens;
  const int num_products = kSeveral ? sum.num_products : 1;
  int load_token = 0, load_product = 0, load_stage = 0;
  RowMask mask(thread);
  mask.look_ahead(args, load_token);
  // Begins to load the next product of parts, if there is one, and closes the group in any case:
  // the waits count groups.
  const auto load_next = [&] {
    if (load_token < args.num_tokens) {
      left_loader.load(left_stages + load_stage * kStageElements, sum.left_offset[load_product],
                       mask, sum.left);
      right_loader.load(right_stages + load_stage * kStageElements, sum.right_offset[load_product],
                        mask, sum.right);
      load_stage = load_stage + 1 == kStages ? 0 : load_stage + 1;
      if (++load_product == num_products) {
        load_product = 0;
        load_token += kTileTokens;
        mask.look_ahead(args, load_token);
        left_loader.advance();
        right_loader.advance();
      }
    }
    copy_async_commit();
  };
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) load_next();

  TileSums step_sums, sums;
  clear(step_sums);
  clear(sums);
  int stage = 0, tiles_in_sums = 0;
  for (int token = 0; token < args.num_tokens; token += kTileTokens) {
    for (int product = 0; product < num_products; ++product) {
      copy_async_wait<kStages - 2>();
      __syncthreads();  // the stage is whole, and all warps are done with the one before
      load_next();
      const uint16_t* left = left_stages + stage * kStageElements;
      const uint16_t* right = right_stages + stage * kStageElements;
#pragma unroll kUnroll
      for (int step = 0; step < kTileTokens; step += kStepTokens) {
        multiply_step<kType>(left, right, step, warp_row, warp_column, lane, step_sums);
        // The small products of parts that come before are not worth a rounding each.
        if (product == num_products - 1) promote<kCompensated>(step_sums, sums);
      }
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    if (++tiles_in_sums == kFlushTiles || token + kTileTokens >= args.num_tokens) {
      add_to_memory(sum, is_lower, place.row * kTile + warp_row, place.column * kTile + warp_column,
                    lane, sums);
      clear(sums);
      if (kCompensated) clear(step_sums);  // less than one rounding: not worth more registers
      tiles_in_sums = 0;
    }
  }
}

}  // namespace ghosted_fast
