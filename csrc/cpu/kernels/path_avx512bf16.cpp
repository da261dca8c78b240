// The kernels of the path "avx512bf16"; setup.py gives this file its instruction-set flags.
#include "divergence.h"
#include "ghost_apply.h"
#include "ghost_solve.h"
#include "gram_update.h"

namespace ghosted_fast {

extern const KernelTable kAvx512Bf16Kernels;
const KernelTable kAvx512Bf16Kernels{"avx512bf16", &gram_update, &ghost_apply, &ghost_solve,
                                     &divergence};

}  // namespace ghosted_fast
