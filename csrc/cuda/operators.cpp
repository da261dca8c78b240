#include "operators.h"

#include <array>

#include "../gram_arguments.h"
#include "current_stream.h"
#include "gram_update.h"

namespace ghosted_fast {
namespace {

// Makes the device of a tensor torch's current one, and finds torch's current stream on it.
class OnDeviceOf {
 public:
#ifdef GHOSTED_FAST_EMULATION
  explicit OnDeviceOf(const Tensor&) {}
  int index() const { return emulation::device_of_tensors; }
  void* stream() const { return nullptr; }
#else
  explicit OnDeviceOf(const Tensor& tensor)
      : index_(tensor.get_device_index()), guard_(index_), stream_(current_cuda_stream(index_)) {}
  int index() const { return index_; }
  void* stream() const { return stream_; }

 private:
  int index_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_;
#endif
};

void check_cuda(int code) {
  if (code == 0) return;
  throw std::runtime_error(std::string("gram_update: CUDA says: ") + gram_update_cuda_error(code));
}

Tensor workspace(const Tensor& x, size_t bytes) {
  return torch::stable::new_empty(x, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
}

void call_fallback(const Tensor& x, const OptionalTensor& y, const OptionalTensor& token_weight,
                   std::optional<double> norm_eps, bool delta, const OptionalTensor& gram,
                   const OptionalTensor& cross, const OptionalTensor& moments) {
  using torch::stable::detail::from;
  std::array<StableIValue, 8> stack{from(x),     from(y),    from(token_weight), from(norm_eps),
                                    from(delta), from(gram), from(cross),        from(moments)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("ghosted_fast::gram_update_fallback", "",
                                                      stack.data(), TORCH_ABI_VERSION));
}

void check_status(const GramArgs& args, const GramTokenStatus& status, void* stream) {
  if (status.bad_weight != kNoToken) {
    float weight = 0.0f;
    check_cuda(gram_update_cuda_read_float(args.token_weight + status.bad_weight, &weight, stream));
    fail_on_weight(weight, static_cast<int64_t>(status.bad_weight));
  }
  if (status.bad_x != kNoToken) fail_on_activation("x", static_cast<int64_t>(status.bad_x));
  if (status.bad_y != kNoToken) fail_on_activation("y", static_cast<int64_t>(status.bad_y));
}

}  // namespace

void gram_update_cuda(Tensor x, OptionalTensor y, OptionalTensor token_weight,
                      std::optional<double> norm_eps, bool delta, OptionalTensor gram,
                      OptionalTensor cross, OptionalTensor moments) {
  const GramCall call = gram_call(x, y, token_weight, norm_eps, delta, gram, cross, moments);
  const GramArgs& args = call.args;
  if (args.num_tokens == 0 || args.hidden_size == 0) return;
  const OnDeviceOf device(x);
  check_cuda(gram_update_cuda_set_device(device.index()));
  if (!gram_update_cuda_serves(&args)) {
    call_fallback(x, y, token_weight, norm_eps, delta, gram, cross, moments);
    return;
  }
  void* stream = device.stream();
  const bool capturing = gram_update_cuda_is_capturing(stream);
  if (!capturing) check_cuda(gram_update_cuda_load());
  Tensor tokens = workspace(x, gram_update_cuda_token_bytes(&args));
  check_cuda(gram_update_cuda_begin(&args, tokens.mutable_data_ptr(), stream));
  GramTokenStatus found;
  const GramTokenStatus* status = nullptr;
  if (!capturing) {
    check_cuda(gram_update_cuda_read_status(tokens.const_data_ptr(), &found, stream));
    check_status(args, found, stream);
    status = &found;
  }
  Tensor operands = workspace(x, gram_update_cuda_operand_bytes(&args, status));
  check_cuda(gram_update_cuda_run(&args, status, tokens.const_data_ptr(),
                                  operands.mutable_data_ptr(), stream));
}

}  // namespace ghosted_fast
