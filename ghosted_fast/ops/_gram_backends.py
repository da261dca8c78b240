"""Which backend runs `gram_update`: the one place where it is chosen.

`backend="auto"` takes the first that is there and serves the arguments:

1. the compiled kernel of the tensors' device, chosen by torch's dispatcher: C++ on the CPU, CUDA
   C++ on CUDA tensors where it was built in, which hands on what `unserved_by_cuda` describes;
2. `gram_update_without_native`, for everything else.
"""

from __future__ import annotations

from torch import Tensor

from ghosted_fast.ops.reference import gram_update_reference

_VECTOR_BYTES = 16
_COLUMNS = 8


def gram_update_without_native(
    x: Tensor,
    y: Tensor | None,
    token_weight: Tensor | None,
    norm_eps: float | None,
    delta: bool,
    gram: Tensor | None,
    cross: Tensor | None,
    moments: Tensor | None,
) -> None:
    """Run `gram_update` where no compiled kernel serves: torch's own operators in fp64.

    Raises:
        TypeError, ArgumentError, RuntimeError: See `ops.gram.gram_update`.
    """
    gram_update_reference(x, y, token_weight, norm_eps, delta, gram, cross, moments)


def unserved_by_cuda(x: Tensor, y: Tensor | None) -> str:
    """Return why the compiled CUDA kernel does not serve these rows; empty if it does.

    The kernel copies 16 bytes at a time. The compiled operator checks the same for itself.
    """
    for name, rows in (("x", x), ("y", y)):
        if rows is None:
            continue
        if rows.shape[1] % _COLUMNS:
            return f"expected {name} with a multiple of {_COLUMNS} columns, got {rows.shape[1]}"
        row_bytes = rows.stride(0) * rows.element_size()
        if rows.data_ptr() % _VECTOR_BYTES or (len(rows) > 1 and row_bytes % _VECTOR_BYTES):
            return f"expected rows of {name} that start at multiples of {_VECTOR_BYTES} bytes"
    return ""
