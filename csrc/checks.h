// What the operators demand of their arguments, in short: ghosted_fast/ops/operands.py says it in
// full to those who call the library, who see these words only where they call torch.ops directly.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "arguments.h"

namespace ghosted_fast {

using OptionalTensor = std::optional<torch::stable::Tensor>;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << op << ": expected ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i == 0 ? "" : ", ") << tensor.size(i);
  text << ']';
  return text.str();
}

// That all of a tensor lies in its storage: one that was resized, or whose data was let go, does
// not, and reading it ends the process.
inline void check_storage(const char* op, const char* name, const Tensor& tensor) {
  int64_t last = tensor.storage_offset(), bytes = 0;
  const int64_t dim = tensor.dim();
  for (int64_t i = 0; i < dim; ++i) {
    int64_t reach = 0;
    if (tensor.size(i) == 0) return;
    if (__builtin_mul_overflow(tensor.size(i) - 1, tensor.stride(i), &reach) ||
        __builtin_add_overflow(last, reach, &last)) {
      last = INT64_MAX / 16;
      break;
    }
  }
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes));
  if (last >= bytes / static_cast<int64_t>(tensor.element_size())) {
    fail(op, name, " with all of its numbers in memory, got a storage of ", bytes,
         " bytes for shape ", shape_of(tensor), "; load or copy it anew");
  }
}

inline void check_cpu(const char* op, const char* name, const Tensor& tensor) {
  if (!tensor.is_cpu()) fail(op, name, " on cpu, got another device; move it there");
  check_storage(op, name, tensor);
}

inline void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType dtype) {
  if (tensor.scalar_type() != dtype) {
    fail(op, name, " in ", torch::headeronly::toString(dtype), ", got ",
         torch::headeronly::toString(tensor.scalar_type()));
  }
}

inline void check_shape(const char* op, const char* name, const Tensor& tensor,
                        std::initializer_list<int64_t> shape) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t i = 0;
  for (int64_t size : shape) same = same && tensor.size(i++) == size;
  if (same) return;
  std::ostringstream wanted;
  i = 0;
  for (int64_t size : shape) wanted << (i++ == 0 ? "" : ", ") << size;
  fail(op, name, " of shape [", wanted.str(), "], got ", shape_of(tensor));
}

inline Dtype float_dtype(const char* op, const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    case ScalarType::Float:
      return Dtype::kFloat32;
    default:
      fail(op, name, " in bfloat16, float16 or float32, got ",
           torch::headeronly::toString(tensor.scalar_type()));
  }
}

inline void check_positive(const char* op, const char* name, std::optional<double> value) {
  if (value && !(*value > 0.0)) fail(op, name, " > 0 or None, got ", *value);
}

}  // namespace ghosted_fast
