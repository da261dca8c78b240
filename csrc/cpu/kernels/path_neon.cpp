// The kernels of the path "neon": the vectors that every 64-bit Arm processor has.
#define GHOSTED_FAST_NEON
#include "divergence.h"
#include "ghost_apply.h"
#include "ghost_solve.h"
#include "gram_update.h"

namespace ghosted_fast {

extern const KernelTable kNeonKernels;
const KernelTable kNeonKernels{"neon", &gram_update, &ghost_apply, &ghost_solve, &divergence};

}  // namespace ghosted_fast
