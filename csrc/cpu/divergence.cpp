#include <torch/csrc/stable/ops.h>

#include <vector>

#include "dispatch.h"
#include "operators.h"

namespace ghosted_fast {

std::tuple<Tensor, Tensor> divergence_cpu(Tensor dense, Tensor smaller, OptionalTensor counted,
                                          bool wants_gradient, OptionalTensor first,
                                          OptionalTensor second, OptionalTensor third) {
  constexpr const char* op = "divergence";
  DivergenceArgs args;
  args.dtype = float_dtype(op, "smaller", smaller);
  if (smaller.dim() != 2 || smaller.size(1) == 0) {
    fail(op, "smaller of shape [rows, words], got ", shape_of(smaller));
  }
  args.num_rows = smaller.size(0);
  args.num_columns = smaller.size(1);
  // Kept until the kernel has run: what is not contiguous is copied.
  std::vector<Tensor> kept;
  const auto logits = [&](const char* name, const Tensor& tensor) {
    check_cpu(op, name, tensor);
    check_dtype(op, name, tensor, smaller.scalar_type());
    check_shape(op, name, tensor, {args.num_rows, args.num_columns});
    kept.push_back(torch::stable::contiguous(tensor));
    return kept.back().const_data_ptr();
  };
  args.dense = logits("dense", dense);
  args.smaller = logits("smaller", smaller);
  for (const OptionalTensor& moved : {first, second, third}) {
    if (moved) args.moved[args.num_moved++] = logits("a moved row", *moved);
  }
  if (counted) {
    check_cpu(op, "counted", *counted);
    check_dtype(op, "counted", *counted, ScalarType::Bool);
    check_shape(op, "counted", *counted, {args.num_rows});
    kept.push_back(torch::stable::contiguous(*counted));
    args.counted = static_cast<const bool*>(kept.back().const_data_ptr());
  }
  const int64_t count = args.num_moved, found = 1 + count + count * (count + 1) / 2;
  Tensor sums = torch::stable::new_empty(smaller, {args.num_rows, found}, ScalarType::Double);
  Tensor gradient = torch::stable::new_empty(
      smaller, {wants_gradient ? args.num_rows : 0, args.num_columns}, smaller.scalar_type());
  args.sums = static_cast<double*>(sums.mutable_data_ptr());
  if (wants_gradient) args.gradient = gradient.mutable_data_ptr();
  if (args.num_rows > 0) kernel_table().divergence(args);
  return {sums, gradient};
}

}  // namespace ghosted_fast
