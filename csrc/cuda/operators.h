// The operators on CUDA tensors: check, allocate through torch, and launch on the current stream.
#pragma once

#include <optional>

#include "../checks.h"

namespace ghosted_fast {

// Arguments that the kernel does not serve go on to ghosted_fast::gram_update_fallback. Waits once
// for the stream, to report NaN and infinity; under graph capture it does not, see gram_update.h.
void gram_update_cuda(Tensor x, OptionalTensor y, OptionalTensor token_weight,
                      std::optional<double> norm_eps, bool delta, OptionalTensor gram,
                      OptionalTensor cross, OptionalTensor moments);

}  // namespace ghosted_fast
