#include <torch/csrc/stable/ops.h>

#include "dispatch.h"
#include "operators.h"

namespace ghosted_fast {
namespace {

constexpr const char* kOp = "gram_update";

Rows rows_of(const char* name, const Tensor& tensor) {
  check_cpu(kOp, name, tensor);
  const Dtype dtype = float_dtype(kOp, name, tensor);
  if (tensor.size(1) > 1 && tensor.stride(1) != 1) {
    fail(kOp, name, " with neighbouring columns side by side, got a stride of ", tensor.stride(1),
         "; pass ", name, ".contiguous()");
  }
  return {tensor.const_data_ptr(), dtype, tensor.stride(0)};
}

double* sums_of(const char* name, OptionalTensor& tensor, int64_t rows, int64_t columns) {
  if (!tensor) return nullptr;
  check_cpu(kOp, name, *tensor);
  check_dtype(kOp, name, *tensor, ScalarType::Double);
  check_shape(kOp, name, *tensor, {rows, columns});
  if (!tensor->is_contiguous()) fail(kOp, "a contiguous ", name, ", got other strides");
  return static_cast<double*>(tensor->mutable_data_ptr());
}

}  // namespace

void gram_update_cpu(Tensor x, OptionalTensor y, OptionalTensor token_weight,
                     std::optional<double> norm_eps, bool delta, OptionalTensor gram,
                     OptionalTensor cross, OptionalTensor moments) {
  GramArgs args;
  if (x.dim() != 2) fail(kOp, "x of shape [tokens, hidden_size], got ", shape_of(x));
  args.x = rows_of("x", x);
  args.num_tokens = x.size(0);
  args.hidden_size = x.size(1);
  check_positive(kOp, "norm_eps", norm_eps);
  args.normed = norm_eps.has_value();
  args.norm_eps = norm_eps.value_or(0.0);
  args.delta = delta;
  if (y) {
    if (y->dim() != 2 || y->size(0) != args.num_tokens) {
      fail(kOp, "y of shape [", args.num_tokens, ", outputs], got ", shape_of(*y));
    }
    args.y = rows_of("y", *y);
    args.num_outputs = y->size(1);
    if (args.num_outputs != args.hidden_size && (delta || moments)) {
      fail(kOp, "y of shape ", shape_of(x), " for delta or moments, got ", shape_of(*y));
    }
  } else if (cross || delta) {
    fail(kOp, "y for cross or delta, got None; pass y");
  }
  Tensor weight;
  if (token_weight) {
    check_cpu(kOp, "token_weight", *token_weight);
    check_dtype(kOp, "token_weight", *token_weight, ScalarType::Float);
    check_shape(kOp, "token_weight", *token_weight, {args.num_tokens});
    weight =
        token_weight->is_contiguous() ? *token_weight : torch::stable::contiguous(*token_weight);
    args.token_weight = static_cast<const float*>(weight.const_data_ptr());
  }
  args.gram = sums_of("gram", gram, args.hidden_size, args.hidden_size);
  args.cross = sums_of("cross", cross, args.hidden_size, args.num_outputs);
  args.moments = sums_of("moments", moments, 3, args.hidden_size);
  if (args.num_tokens == 0 || args.hidden_size == 0) return;

  const GramStatus status = kernel_table().gram_update(args);
  if (status.problem == GramProblem::kWeight) {
    fail(kOp, "finite token weights >= 0, got ", args.token_weight[status.token], " at token ",
         status.token);
  }
  if (status.problem != GramProblem::kNone) {
    fail(kOp, "finite activations, got NaN or infinity in ",
         status.problem == GramProblem::kX ? "x" : "y", " at token ", status.token,
         "; nothing was added");
  }
}

}  // namespace ghosted_fast
