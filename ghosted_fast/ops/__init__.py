"""The operators: one file each, with its schema and its public function.

`operands.py` holds what an operator takes and demands, `reference.py` what it computes, `backends/`
who computes it: one file for each. Importing this package defines the operators in torch
(`torch.ops.ghosted_fast`) and loads the compiled extension where there is one.
"""

from ghosted_fast.ops.backends import backend_status
from ghosted_fast.ops.divergence import divergence, local_divergence
from ghosted_fast.ops.ghost_apply import ghost_apply
from ghosted_fast.ops.ghost_solve import ghost_solve
from ghosted_fast.ops.gram_update import gram_update
from ghosted_fast.ops.packing import pack_weight
from ghosted_fast.ops.stream_sum import stream_sum

__all__ = [
    "backend_status",
    "divergence",
    "ghost_apply",
    "ghost_solve",
    "gram_update",
    "local_divergence",
    "pack_weight",
    "stream_sum",
]
