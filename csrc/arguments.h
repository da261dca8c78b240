// What the operators and their kernels, of every device, say to each other: plain structs.
//
// Every file `cpu/kernels/path_*.cpp` is compiled with its own instruction-set flags and offers one
// `KernelTable`; `cpu/dispatch.cpp` picks the table at run time.
#pragma once

#include <cstdint>

namespace ghosted_fast {

// Outputs that lie side by side in a packed weight: the width of a panel on every path.
constexpr int kPanel = 16;

enum class Dtype : int32_t { kBFloat16, kFloat16, kFloat32, kInt8 };

struct Rows {
  const void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
  int64_t stride = 0;  // elements from one row to the next
};

struct GramArgs {
  Rows x;
  Rows y;  // data is null where there is no y
  int64_t num_tokens = 0;
  int64_t hidden_size = 0;
  int64_t num_outputs = 0;
  const float* token_weight = nullptr;
  bool normed = false;
  double norm_eps = 0.0;
  bool delta = false;
  double* gram = nullptr;
  double* cross = nullptr;
  double* moments = nullptr;
};

enum class GramProblem : int32_t { kNone, kWeight, kX, kY };

struct GramStatus {
  GramProblem problem = GramProblem::kNone;
  int64_t token = 0;
};

struct ApplyArgs {
  const void* x = nullptr;  // [num_rows, hidden_size], contiguous
  Dtype dtype = Dtype::kFloat32;
  int64_t num_rows = 0;
  int64_t hidden_size = 0;
  // [out, in], or packed as [panels][in / n][kPanel][n], n numbers to a dword, zeros
  // where there are no more: bf16 or fp32 then. Contiguous.
  const void* weight = nullptr;
  bool packed = false;
  Dtype weight_dtype = Dtype::kFloat32;
  const void* bias = nullptr;
  Dtype bias_dtype = Dtype::kFloat32;
  const float* scale = nullptr;
  bool normed = false;
  double norm_eps = 0.0;
  const void* first_state = nullptr;
  Dtype first_state_dtype = Dtype::kFloat32;
  const bool* is_first = nullptr;
  void* y = nullptr;
};

struct SolveArgs {
  const double* gram = nullptr;   // [size, size], contiguous, lower triangle
  const double* cross = nullptr;  // [size, num_outputs], contiguous
  int64_t size = 0;
  int64_t num_outputs = 0;
  double damping = 0.0;
  double* solution = nullptr;
};

struct SolveInfo {
  int64_t failing_pivot = 0;  // 1-based, 0 for success
  double condition = 0.0;
  double residual = 0.0;
  const char* non_finite = nullptr;  // the argument that holds NaN or infinity
};

// Rows that a local model of a divergence can be asked about at once.
constexpr int kMostMoved = 3;

struct DivergenceArgs {
  const void* dense = nullptr;  // logits [num_rows, num_columns], contiguous, as the others
  const void* smaller = nullptr;
  Dtype dtype = Dtype::kFloat32;
  int64_t num_rows = 0;
  int64_t num_columns = 0;
  const bool* counted = nullptr;  // [num_rows], or null for all
  const void* moved[kMostMoved] = {};
  int64_t num_moved = 0;
  double* sums = nullptr;    // [num_rows, 1 + k + k (k + 1) / 2] for k moved rows
  void* gradient = nullptr;  // like smaller, or null
};

struct KernelTable {
  const char* name;
  GramStatus (*gram_update)(const GramArgs&);
  void (*ghost_apply)(const ApplyArgs&);
  SolveInfo (*ghost_solve)(const SolveArgs&);
  void (*divergence)(const DivergenceArgs&);
};

}  // namespace ghosted_fast
