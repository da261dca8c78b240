#include <torch/csrc/stable/ops.h>

#include "dispatch.h"
#include "operators.h"

namespace ghosted_fast {

std::tuple<Tensor, Tensor> ghost_solve_cpu(Tensor gram, Tensor cross, double damping) {
  constexpr const char* op = "ghost_solve";
  check_cpu(op, "gram", gram);
  check_cpu(op, "cross", cross);
  check_dtype(op, "gram", gram, ScalarType::Double);
  check_dtype(op, "cross", cross, ScalarType::Double);
  if (gram.dim() != 2 || gram.size(0) != gram.size(1)) {
    fail(op, "a square gram, got shape ", shape_of(gram));
  }
  if (cross.dim() != 2 || cross.size(0) != gram.size(0)) {
    fail(op, "cross of shape [", gram.size(0), ", outputs], got ", shape_of(cross));
  }
  if (!(damping >= 0.0) || std::isinf(damping)) fail(op, "a finite damping >= 0, got ", damping);
  gram = torch::stable::contiguous(gram);
  cross = torch::stable::contiguous(cross);
  Tensor solution = torch::stable::empty_like(cross);
  Tensor info = torch::stable::new_empty(cross, {3});

  SolveArgs args;
  args.gram = static_cast<const double*>(gram.const_data_ptr());
  args.cross = static_cast<const double*>(cross.const_data_ptr());
  args.size = gram.size(0);
  args.num_outputs = cross.size(1);
  args.damping = damping;
  args.solution = static_cast<double*>(solution.mutable_data_ptr());
  const SolveInfo result = kernel_table().ghost_solve(args);
  if (result.non_finite != nullptr) {
    fail(op, "a finite ", result.non_finite, ", got NaN or infinity");
  }
  double* values = static_cast<double*>(info.mutable_data_ptr());
  values[0] = static_cast<double>(result.failing_pivot);
  values[1] = result.condition;
  values[2] = result.residual;
  return {solution, info};
}

}  // namespace ghosted_fast
