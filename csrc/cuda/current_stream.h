// Torch's current stream on a device, as CUDA knows it: by what each torch from 2.10 on has.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <stdexcept>

// Before torch 2.13 its calls do not tell why they fail: torch prints that to stderr.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace ghosted_fast {

#if defined(TORCH_VERSION_2_13_0) && TORCH_FEATURE_VERSION >= TORCH_VERSION_2_13_0
inline void* current_cuda_stream(int32_t device) {
  return torch::stable::accelerator::getCurrentStream(device).nativeHandle();
}
#else
// The library of torch that has it is loaded wherever there are CUDA tensors; linking it would keep
// a CUDA build from loading under torch for the CPU.
inline void* current_cuda_stream(int32_t device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* symbol =
      library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream");
  if (symbol == nullptr) {
    throw std::runtime_error(
        "gram_update: expected aoti_torch_get_current_cuda_stream in libtorch_cuda.so, got none; "
        "build ghosted_fast with torch 2.13 or later");
  }
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(reinterpret_cast<Function>(symbol)(device, &stream));
  return stream;
}
#endif

}  // namespace ghosted_fast
