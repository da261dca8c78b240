"""The operators: check the arguments, pick the backend, call it.

Importing this package defines the operators in torch (`torch.ops.ghosted_fast`) and loads the
compiled extension where there is one.
"""

from ghosted_fast._native import backend_status
from ghosted_fast.ops.ghost import ghost_apply, ghost_apply_rms_norm
from ghosted_fast.ops.gram import gram_update
from ghosted_fast.ops.packing import pack_weight
from ghosted_fast.ops.solve import ghost_solve

__all__ = [
    "backend_status",
    "ghost_apply",
    "ghost_apply_rms_norm",
    "ghost_solve",
    "gram_update",
    "pack_weight",
]
