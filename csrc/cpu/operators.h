// The operators on CPU tensors: check, and call the kernels of the path in use.
#pragma once

#include <optional>
#include <tuple>

#include "../checks.h"

namespace ghosted_fast {

void gram_update_cpu(Tensor x, OptionalTensor y, OptionalTensor token_weight,
                     std::optional<double> norm_eps, bool delta, OptionalTensor gram,
                     OptionalTensor cross, OptionalTensor moments);

Tensor ghost_apply_cpu(Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor scale,
                       std::optional<double> norm_eps, OptionalTensor first_state,
                       OptionalTensor is_first);

std::tuple<Tensor, Tensor> divergence_cpu(Tensor dense, Tensor smaller, OptionalTensor counted,
                                          bool wants_gradient, OptionalTensor first,
                                          OptionalTensor second, OptionalTensor third);

std::tuple<Tensor, Tensor> ghost_solve_cpu(Tensor gram, Tensor cross, double damping);

}  // namespace ghosted_fast
