// The binding of csrc/cuda over the emulated kernels, as an operator on CPU tensors:
// ghosted_fast_emulation::gram_update.
#include <torch/csrc/stable/library.h>

#include "gram_update.cu"
#include "operators.cpp"

STABLE_TORCH_LIBRARY(ghosted_fast_emulation, m) {
  m.def(
      "gram_update(Tensor x, Tensor? y, Tensor? token_weight, float? norm_eps, bool delta, "
      "Tensor(a!)? gram, Tensor(b!)? cross, Tensor(c!)? moments) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ghosted_fast_emulation, CPU, m) {
  m.impl("gram_update", TORCH_BOX(&ghosted_fast::gram_update_cuda));
}

extern "C" void emulation_configure(bool capturing, int compute_capability_major) {
  emulation::capturing = capturing;
  emulation::compute_capability_major = compute_capability_major;
}

extern "C" void emulation_put_tensors_on(int device) { emulation::device_of_tensors = device; }

extern "C" long long emulation_launched_blocks() {
  const long long blocks = emulation::counters.blocks;
  emulation::counters = {};
  return blocks;
}
