#include "../gram_arguments.h"
#include "dispatch.h"
#include "operators.h"

namespace ghosted_fast {

void gram_update_cpu(Tensor x, OptionalTensor y, OptionalTensor token_weight,
                     std::optional<double> norm_eps, bool delta, OptionalTensor gram,
                     OptionalTensor cross, OptionalTensor moments) {
  check_cpu(kGramUpdate, "x", x);
  const GramCall call = gram_call(x, y, token_weight, norm_eps, delta, gram, cross, moments);
  const GramArgs& args = call.args;
  if (args.num_tokens == 0 || args.hidden_size == 0) return;
  const GramStatus status = kernel_table().gram_update(args);
  if (status.problem == GramProblem::kWeight) {
    fail_on_weight(args.token_weight[status.token], status.token);
  }
  if (status.problem != GramProblem::kNone) {
    fail_on_activation(status.problem == GramProblem::kX ? "x" : "y", status.token);
  }
}

}  // namespace ghosted_fast
