// The kernels of the path "amx"; setup.py gives this file its instruction-set flags.
#include "amx/ghost_apply.h"
#include "amx/gram_update.h"
#include "divergence.h"
#include "ghost_solve.h"

namespace ghosted_fast {

extern const KernelTable kAmxKernels;
const KernelTable kAmxKernels{"amx", &amx_gram_update, &amx_ghost_apply, &ghost_solve, &divergence};

}  // namespace ghosted_fast
