// The kernels of the path "neonbf16"; setup.py gives this file its instruction-set flags.
#define GHOSTED_FAST_NEON
#include "divergence.h"
#include "ghost_bytes.h"
#include "ghost_solve.h"
#include "gram_update.h"

#if !defined(GHOSTED_FAST_NEON_BF16) || !defined(__ARM_FEATURE_MATMUL_INT8)
#error "expected flags with products of bf16 and int8: -march=armv8.2-a+bf16+i8mm, as in setup.py"
#endif

namespace ghosted_fast {

extern const KernelTable kNeonBf16Kernels;
const KernelTable kNeonBf16Kernels{"neonbf16", &gram_update, &neonbf16_ghost_apply, &ghost_solve,
                                   &divergence};

}  // namespace ghosted_fast
