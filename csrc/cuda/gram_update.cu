// gram_update on the tensor cores of sm_80 and later.
//
//   G += sum_t w_t f_t f_t^T (lower triangle)     C += sum_t w_t f_t t_t^T     t = y or y - x
//
// The left side is x; all scales (w, w / rms, w / rms^2) are on the right side. A product of two
// bf16 or fp16 numbers is exact in fp32, so operands that are such numbers go into the tensor cores
// as they are: x without scales straight from the caller's rows, x times powers of two copied once.
// Everything else is cut into three bf16 parts, hi + mid + lo, 24 bits in all, and the products of
// parts down to 2^-24 are summed: 3 products where x is bf16, 6 where it is fp32. Nothing is ever
// rounded to 16 bits. C of y - x is not taken as C of y less G, which would need one product: its
// error would be relative to y, of which y - x may be a small part.
//
// 2 T d^2 flops per product (528 of 1024 tiles of G at d = 4096), 8 T (rows + columns) bytes per
// pair of tiles from the caches, 16 d^2 bytes per 1024 tokens for the fp64 sums. Accuracy: relative
// error to fp64 below 1e-6 in Frobenius norm and 1e-7 scaled, as on the CPU.
#include <algorithm>
#include <atomic>

#include "gram_plan.cuh"

namespace ghosted_fast {
namespace {

int launch_split(const Side& side, int64_t first, int64_t num_tokens, uint16_t* parts,
                 void* stream) {
  const int64_t threads = num_tokens * side.source.columns / kVector;
  if (side.num_parts == 0 || threads == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>((threads + kRowThreads - 1) / kRowThreads));
  GHOSTED_FAST_LAUNCH(split_operand, grid, dim3(kRowThreads), 0, stream, side.source, first,
                      num_tokens, parts);
  return cudaGetLastError();
}

// Where a side's rows for the tokens from `first` on are, and the offset of each part.
void place_side(const Side& side, const uint16_t* parts, int64_t first, const uint16_t** data,
                int64_t* stride) {
  if (side.num_parts == 0) {
    *data = static_cast<const uint16_t*>(side.rows.data) + first * side.rows.stride;
    *stride = side.rows.stride;
  } else {
    *data = parts;
    *stride = side.source.columns;
  }
}

TileSum sum_of(const Side& left, const Side& right, const uint16_t* left_parts,
               const uint16_t* right_parts, int64_t first, int64_t tokens, int64_t rows,
               int64_t columns, double* out, double factor) {
  TileSum sum;
  place_side(left, left_parts, first, &sum.left, &sum.left_stride);
  place_side(right, right_parts, first, &sum.right, &sum.right_stride);
  sum.rows = static_cast<int>(rows);
  sum.columns = static_cast<int>(columns);
  sum.out = out;
  sum.factor = factor;
  sum.num_products = 0;
  // A part is at most 2^-8 of the one before: pairs whose numbers add up to more than 2 do not
  // count in fp32. The smallest come first.
  for (int order = kMaxParts - 1; order >= 0; --order) {
    for (int i = 0; i <= order; ++i) {
      if (i >= std::max(left.num_parts, 1) || order - i >= std::max(right.num_parts, 1)) continue;
      sum.left_offset[sum.num_products] = i * tokens * left.source.columns;
      sum.right_offset[sum.num_products] = (order - i) * tokens * right.source.columns;
      ++sum.num_products;
    }
  }
  return sum;
}

template <Dtype kType, bool kSeveral, bool kCompensated>
int launch_tiles(const TileArgs& args, int blocks, void* stream) {
  const cudaError_t error = cudaFuncSetAttribute(
      reinterpret_cast<const void*>(&gram_tiles<kType, kSeveral, kCompensated>),
      cudaFuncAttributeMaxDynamicSharedMemorySize, kTileSharedBytes);
  if (error != cudaSuccess) return error;
  GHOSTED_FAST_LAUNCH((gram_tiles<kType, kSeveral, kCompensated>),
                      dim3(static_cast<unsigned>(blocks)), dim3(kTileThreads), kTileSharedBytes,
                      stream, args);
  return cudaGetLastError();
}

template <bool kCompensated>
auto tile_launcher(Dtype type, bool several) {
  if (type == Dtype::kFloat16) return &launch_tiles<Dtype::kFloat16, false, kCompensated>;
  return several ? &launch_tiles<Dtype::kBFloat16, true, kCompensated>
                 : &launch_tiles<Dtype::kBFloat16, false, kCompensated>;
}

// G and C in one launch where their elements have the same type, else one after the other.
int launch_sums(const Plan& plan, TileArgs args, void* stream) {
  const auto tiles = [](int64_t size) { return static_cast<int>((size + kTile - 1) / kTile); };
  const int rows = tiles(args.sums[0].rows);
  const int num_lower = plan.want_gram ? rows * (rows + 1) / 2 : 0;
  const int num_cross =
      plan.want_cross ? tiles(args.sums[1].rows) * tiles(args.sums[1].columns) : 0;
  for (const Dtype type : {Dtype::kBFloat16, Dtype::kFloat16}) {
    args.num_cross = plan.cross_type == type ? num_cross : 0;
    const int blocks = args.num_cross + (plan.gram_type == type ? num_lower : 0);
    if (blocks == 0) continue;
    const bool several = (args.num_cross > 0 && args.sums[1].num_products > 1) ||
                         (blocks > args.num_cross && args.sums[0].num_products > 1);
    const auto launch =
        plan.compensated ? tile_launcher<true>(type, several) : tile_launcher<false>(type, several);
    const int error = launch(args, blocks, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// Loads the machine code of a kernel to the current device.
template <class Kernel>
int load_kernel(Kernel* kernel) {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
}

template <bool kCompensated>
int load_tile_kernels() {
  int error = load_kernel(&gram_tiles<Dtype::kBFloat16, false, kCompensated>);
  if (error == cudaSuccess) {
    error = load_kernel(&gram_tiles<Dtype::kBFloat16, true, kCompensated>);
  }
  if (error == cudaSuccess) {
    error = load_kernel(&gram_tiles<Dtype::kFloat16, false, kCompensated>);
  }
  return error;
}

bool device_is_supported() {
  constexpr int kOldest = 8;  // sm_80: bf16 tensor cores and cp.async
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         major >= kOldest;
}

bool is_served(const Rows& rows, int64_t columns, int64_t num_tokens) {
  const int64_t per_vector = rows.dtype == Dtype::kFloat32 ? 4 : 8;
  return columns % kVector == 0 && columns < (int64_t{1} << 20) &&
         reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 &&
         (num_tokens <= 1 || rows.stride % per_vector == 0);
}

}  // namespace
}  // namespace ghosted_fast

using namespace ghosted_fast;

bool gram_update_cuda_serves(const GramArgs* args) {
  const auto aligned = [](const double* sums) {
    return reinterpret_cast<uintptr_t>(sums) % 16 == 0;
  };
  return device_is_supported() && is_served(args->x, args->hidden_size, args->num_tokens) &&
         (args->y.data == nullptr || is_served(args->y, args->num_outputs, args->num_tokens)) &&
         aligned(args->gram) && aligned(args->cross) && args->num_tokens < (int64_t{1} << 31);
}

bool gram_update_cuda_is_capturing(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t error = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status);
  return error == cudaSuccess && status != cudaStreamCaptureStatusNone;
}

int gram_update_cuda_set_device(int device) { return cudaSetDevice(device); }

int gram_update_cuda_load() {
  static std::atomic<uint64_t> loaded{0};  // a bit for each device
  int device = 0;
  const cudaError_t found = cudaGetDevice(&device);
  if (found != cudaSuccess) return found;
  const uint64_t bit = uint64_t{1} << (device % 64);
  if ((loaded.load() & bit) != 0) return cudaSuccess;
  int error = load_kernel(&check_tokens);
  if (error == cudaSuccess) error = load_kernel(&split_operand);
  if (error == cudaSuccess) error = load_kernel(&add_moments);
  if (error == cudaSuccess) error = load_tile_kernels<false>();
  if (error == cudaSuccess) error = load_tile_kernels<true>();
  if (error == cudaSuccess) loaded.fetch_or(bit);
  return error;
}

size_t gram_update_cuda_token_bytes(const GramArgs* args) {
  const int64_t scales = has_scales(*args) ? 2 * args->num_tokens * int64_t{sizeof(double)} : 0;
  return static_cast<size_t>(round_up(sizeof(GramTokenStatus), 16) + scales);
}

int gram_update_cuda_begin(const GramArgs* args, void* tokens, void* stream) {
  GramTokenStatus* status = static_cast<GramTokenStatus*>(tokens);
  const size_t token_bytes = offsetof(GramTokenStatus, x_exponent);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  cudaError_t error = cudaMemsetAsync(status, 0xff, token_bytes, cuda_stream);
  if (error != cudaSuccess) return error;
  error = cudaMemsetAsync(&status->x_exponent, 0, sizeof *status - token_bytes, cuda_stream);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>((args->num_tokens + kRowTokens - 1) / kRowTokens));
  GHOSTED_FAST_LAUNCH(check_tokens, grid, dim3(kRowThreads), kFindingsSharedBytes, stream, *args,
                      scales_in(*args, tokens), status);
  return cudaGetLastError();
}

int gram_update_cuda_read_float(const float* from, float* to, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error =
      cudaMemcpyAsync(to, from, sizeof *to, cudaMemcpyDeviceToHost, cuda_stream);
  return error != cudaSuccess ? error : cudaStreamSynchronize(cuda_stream);
}

int gram_update_cuda_read_status(const void* tokens, GramTokenStatus* status, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error =
      cudaMemcpyAsync(status, tokens, sizeof *status, cudaMemcpyDeviceToHost, cuda_stream);
  return error != cudaSuccess ? error : cudaStreamSynchronize(cuda_stream);
}

size_t gram_update_cuda_operand_bytes(const GramArgs* args, const GramTokenStatus* status) {
  const Plan plan = plan_for(*args, status, nullptr);
  return static_cast<size_t>(plan.workspace_elements(plan.chunk)) * sizeof(uint16_t);
}

int gram_update_cuda_run(const GramArgs* args, const GramTokenStatus* status, const void* tokens,
                         void* operands, void* stream) {
  const Plan plan = plan_for(*args, status, tokens);
  for (int64_t first = 0; first < args->num_tokens; first += plan.chunk) {
    const int64_t count = std::min(plan.chunk, args->num_tokens - first);
    uint16_t* left = static_cast<uint16_t*>(operands);
    uint16_t* gram_right = left + plan.split_left.workspace_elements(count);
    uint16_t* cross_right = gram_right + plan.split_gram.workspace_elements(count);
    int error = launch_split(plan.split_left, first, count, left, stream);
    if (error == cudaSuccess) {
      error = launch_split(plan.split_gram, first, count, gram_right, stream);
    }
    if (error == cudaSuccess) {
      error = launch_split(plan.split_cross, first, count, cross_right, stream);
    }
    if (error != cudaSuccess) return error;
    TileArgs tiles;
    tiles.num_tokens = static_cast<int>(count);
    tiles.token_weight = args->token_weight == nullptr ? nullptr : args->token_weight + first;
    if (plan.want_gram) {
      const uint16_t* right = plan.split_gram.num_parts == 0 ? left : gram_right;
      tiles.sums[0] = sum_of(plan.gram_left, plan.gram_right, left, right, first, count,
                             args->hidden_size, args->hidden_size, args->gram, plan.gram_factor);
    }
    if (plan.want_cross) {
      tiles.sums[1] = sum_of(plan.cross_left, plan.cross_right, left, cross_right, first, count,
                             args->hidden_size, args->num_outputs, args->cross, plan.cross_factor);
    }
    error = launch_sums(plan, tiles, stream);
    if (error != cudaSuccess) return error;
  }
  if (args->moments == nullptr) return cudaSuccess;
  const int64_t blocks = (args->hidden_size + kMomentColumns - 1) / kMomentColumns;
  GHOSTED_FAST_LAUNCH(add_moments, dim3(static_cast<unsigned>(blocks)), dim3(kRowThreads),
                      kMomentSharedBytes, stream, *args, scales_in(*args, tokens));
  return cudaGetLastError();
}

const char* gram_update_cuda_error(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}
