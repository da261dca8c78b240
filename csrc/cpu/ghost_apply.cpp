#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "dispatch.h"
#include "operators.h"

namespace ghosted_fast {
namespace {

constexpr const char* kGhostApply = "ghost_apply";

// The tensors of one call that the kernel reads, kept alive and contiguous.
struct Call {
  ApplyArgs args;
  Tensor x, weight;
  OptionalTensor bias, scale, first_state, is_first;
};

// Uninitialised, contiguous, of the given tensor's shape and dtype. A direct call: torch's
// dispatcher, which torch::stable::empty_like goes through by name, costs more than the kernel of a
// small ghost.
Tensor empty_of(const Tensor& tensor) {
  const int64_t dim = tensor.dim();
  std::vector<int64_t> strides(static_cast<size_t>(dim), 1);
  for (int64_t i = dim - 2; i >= 0; --i) {
    strides[i] = strides[i + 1] * std::max<int64_t>(tensor.size(i + 1), 1);
  }
  int32_t dtype = 0;
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, tensor.sizes().data(), strides.data(), dtype,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

const void* vector_of(const Call& call, const char* name, OptionalTensor& tensor, Dtype& dtype) {
  if (!tensor) return nullptr;
  check_cpu(kGhostApply, name, *tensor);
  dtype = float_dtype(kGhostApply, name, *tensor);
  check_shape(kGhostApply, name, *tensor, {call.args.hidden_size});
  tensor = as_contiguous(*tensor);
  return tensor->const_data_ptr();
}

void check_is_first(const Call& call) {
  const Tensor& is_first = *call.is_first;
  check_cpu(kGhostApply, "is_first", is_first);
  check_dtype(kGhostApply, "is_first", is_first, ScalarType::Bool);
  bool same = is_first.dim() == call.x.dim() - 1;
  for (int64_t i = 0; same && i < is_first.dim(); ++i) same = is_first.size(i) == call.x.size(i);
  if (!same) {
    fail(kGhostApply, "is_first of x's shape ", shape_of(call.x),
         " without its last dimension, got ", shape_of(is_first));
  }
}

void check_packed(const Call& call) {
  const Dtype dtype = call.args.weight_dtype;
  if (dtype != Dtype::kBFloat16 && dtype != Dtype::kFloat32) {
    fail(kGhostApply, "a packed weight in BFloat16 or Float, got ",
         torch::headeronly::toString(call.weight.scalar_type()));
  }
  const int64_t size = call.args.hidden_size, numbers = dtype == Dtype::kBFloat16 ? 2 : 1;
  check_shape(kGhostApply, "packed weight", call.weight,
              {(size + kPanel - 1) / kPanel, (size + numbers - 1) / numbers, kPanel, numbers});
}

// Checks the arguments and fills call.args but for the outputs.
void prepare(Call& call, std::optional<double> norm_eps) {
  ApplyArgs& args = call.args;
  check_cpu(kGhostApply, "x", call.x);
  args.dtype = float_dtype(kGhostApply, "x", call.x);
  if (call.x.dim() == 0) fail(kGhostApply, "x of shape [..., hidden_size], got a scalar");
  args.hidden_size = call.x.size(call.x.dim() - 1);
  args.num_rows = args.hidden_size == 0 ? 0 : call.x.numel() / args.hidden_size;
  check_cpu(kGhostApply, "weight", call.weight);
  if (call.weight.scalar_type() == ScalarType::Char) {
    if (!call.scale) fail(kGhostApply, "scale with an int8 weight, got None; pass scale");
    check_cpu(kGhostApply, "scale", *call.scale);
    check_dtype(kGhostApply, "scale", *call.scale, ScalarType::Float);
    check_shape(kGhostApply, "scale", *call.scale, {args.hidden_size});
    call.scale = as_contiguous(*call.scale);
    args.scale = static_cast<const float*>(call.scale->const_data_ptr());
    args.weight_dtype = Dtype::kInt8;
  } else {
    check_dtype(kGhostApply, "weight", call.weight, call.x.scalar_type());
    if (call.scale) fail(kGhostApply, "no scale with a float weight, got one");
    args.weight_dtype = args.dtype;
  }
  args.packed = call.weight.dim() == 4;
  if (args.packed) {
    check_packed(call);
  } else {
    check_shape(kGhostApply, "weight", call.weight, {args.hidden_size, args.hidden_size});
  }
  check_positive(kGhostApply, "norm_eps", norm_eps);
  args.normed = norm_eps.has_value();
  args.norm_eps = norm_eps.value_or(0.0);
  if (call.first_state.has_value() != call.is_first.has_value()) {
    fail(kGhostApply, "first_state and is_first together, got one alone; pass both");
  }
  args.bias = vector_of(call, "bias", call.bias, args.bias_dtype);
  args.first_state = vector_of(call, "first_state", call.first_state, args.first_state_dtype);
  if (call.is_first) {
    check_is_first(call);
    call.is_first = as_contiguous(*call.is_first);
    args.is_first = static_cast<const bool*>(call.is_first->const_data_ptr());
  }
  call.x = as_contiguous(call.x);
  call.weight = as_contiguous(call.weight);
  args.x = call.x.const_data_ptr();
  args.weight = call.weight.const_data_ptr();
}

}  // namespace

Tensor ghost_apply_cpu(Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor scale,
                       std::optional<double> norm_eps, OptionalTensor first_state,
                       OptionalTensor is_first) {
  Call call{{}, x, weight, bias, scale, first_state, is_first};
  prepare(call, norm_eps);
  Tensor y = empty_of(call.x);
  call.args.y = y.mutable_data_ptr();
  kernel_table().ghost_apply(call.args);
  return y;
}

}  // namespace ghosted_fast
