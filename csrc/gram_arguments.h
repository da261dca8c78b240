// What gram_update demands of its tensors on every device, and the plain arguments made of them.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <array>
#include <utility>

#include "checks.h"

namespace ghosted_fast {

constexpr const char* kGramUpdate = "gram_update";

struct GramCall {
  GramArgs args;
  Tensor weight;  // what args.token_weight points into
};

inline void check_device_of_x(const char* name, const Tensor& tensor, const Tensor& x) {
  if (tensor.is_cpu() != x.is_cpu() || tensor.get_device_index() != x.get_device_index()) {
    fail(kGramUpdate, name, " on the device of x, got another device; move it there");
  }
  check_storage(kGramUpdate, name, tensor);
}

struct Span {
  const char* name;
  const char* begin;
  const char* end;
};

// The memory of a tensor that passed check_storage.
inline Span span_of(const char* name, const Tensor& tensor) {
  int64_t last = 0;
  for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
  const char* begin = static_cast<const char*>(tensor.const_data_ptr());
  const int64_t count = tensor.numel() == 0 ? 0 : last + 1;
  return {name, begin, begin + count * static_cast<int64_t>(tensor.element_size())};
}

// That no sum is written over what is read, or over another sum.
inline void check_apart(std::initializer_list<std::pair<const char*, const OptionalTensor*>> read,
                        std::initializer_list<std::pair<const char*, const OptionalTensor*>> sums) {
  std::array<Span, 6> seen{};
  size_t count = 0;
  for (const auto& [name, tensor] : read) {
    if (*tensor) seen[count++] = span_of(name, **tensor);
  }
  for (const auto& [name, tensor] : sums) {
    if (!*tensor) continue;
    const Span own = span_of(name, **tensor);
    for (size_t i = 0; i < count; ++i) {
      if (own.begin < seen[i].end && seen[i].begin < own.end) {
        fail(kGramUpdate, name, " in memory of its own, got some of that of ", seen[i].name,
             "; pass another tensor");
      }
    }
    seen[count++] = own;
  }
}

inline Rows gram_rows(const char* name, const Tensor& tensor, const Tensor& x) {
  check_device_of_x(name, tensor, x);
  const Dtype dtype = float_dtype(kGramUpdate, name, tensor);
  if (tensor.size(1) > 1 && tensor.stride(1) != 1) {
    fail(kGramUpdate, name, " with neighbouring columns side by side, got a stride of ",
         tensor.stride(1), "; pass ", name, ".contiguous()");
  }
  return {tensor.const_data_ptr(), dtype, tensor.stride(0)};
}

inline double* gram_sums(const char* name, const OptionalTensor& tensor, const Tensor& x,
                         int64_t rows, int64_t columns) {
  if (!tensor) return nullptr;
  check_device_of_x(name, *tensor, x);
  check_dtype(kGramUpdate, name, *tensor, ScalarType::Double);
  check_shape(kGramUpdate, name, *tensor, {rows, columns});
  if (!tensor->is_contiguous()) fail(kGramUpdate, "a contiguous ", name, ", got other strides");
  return static_cast<double*>(tensor->mutable_data_ptr());
}

inline GramCall gram_call(const Tensor& x, const OptionalTensor& y,
                          const OptionalTensor& token_weight, std::optional<double> norm_eps,
                          bool delta, const OptionalTensor& gram, const OptionalTensor& cross,
                          const OptionalTensor& moments) {
  GramCall call;
  GramArgs& args = call.args;
  if (x.dim() != 2) fail(kGramUpdate, "x of shape [tokens, hidden_size], got ", shape_of(x));
  args.x = gram_rows("x", x, x);
  args.num_tokens = x.size(0);
  args.hidden_size = x.size(1);
  check_positive(kGramUpdate, "norm_eps", norm_eps);
  args.normed = norm_eps.has_value();
  args.norm_eps = norm_eps.value_or(0.0);
  args.delta = delta;
  if (y) {
    if (y->dim() != 2 || y->size(0) != args.num_tokens) {
      fail(kGramUpdate, "y of shape [", args.num_tokens, ", outputs], got ", shape_of(*y));
    }
    args.y = gram_rows("y", *y, x);
    args.num_outputs = y->size(1);
    if (args.num_outputs != args.hidden_size && (delta || moments)) {
      fail(kGramUpdate, "y of shape ", shape_of(x), " for delta or moments, got ", shape_of(*y));
    }
  } else if (cross || delta) {
    fail(kGramUpdate, "y for cross or delta, got None; pass y");
  }
  if (token_weight) {
    check_device_of_x("token_weight", *token_weight, x);
    check_dtype(kGramUpdate, "token_weight", *token_weight, ScalarType::Float);
    check_shape(kGramUpdate, "token_weight", *token_weight, {args.num_tokens});
    call.weight =
        token_weight->is_contiguous() ? *token_weight : torch::stable::contiguous(*token_weight);
    args.token_weight = static_cast<const float*>(call.weight.const_data_ptr());
  }
  args.gram = gram_sums("gram", gram, x, args.hidden_size, args.hidden_size);
  args.cross = gram_sums("cross", cross, x, args.hidden_size, args.num_outputs);
  args.moments = gram_sums("moments", moments, x, 3, args.hidden_size);
  const OptionalTensor rows = x;
  check_apart({{"x", &rows}, {"y", &y}, {"token_weight", &token_weight}},
              {{"gram", &gram}, {"cross", &cross}, {"moments", &moments}});
  return call;
}

[[noreturn]] inline void fail_on_weight(double weight, int64_t token) {
  fail(kGramUpdate, "finite token weights >= 0, got ", weight, " at token ", token);
}

[[noreturn]] inline void fail_on_activation(const char* name, int64_t token) {
  fail(kGramUpdate, "finite activations, got NaN or infinity in ", name, " at token ", token,
       "; nothing was added");
}

}  // namespace ghosted_fast
