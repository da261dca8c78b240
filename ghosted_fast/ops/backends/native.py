"""The compiled kernels: C++ for the CPU, and in a CUDA build CUDA C++ for some operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ghosted_fast.ops import compiled, crossings
from ghosted_fast.ops.operands import Operands, needs_gradient

CUDA_OPERATORS = ("gram_update",)
# The CUDA kernels copy so many bytes at a time.
_VECTOR_BYTES = 16
_COLUMNS = 8


def absence_reason() -> str:
    """Return why there are no compiled kernels; empty where there are."""
    return compiled.absence_reason()


def description() -> str:
    """Return which path of the processor is in use, and what runs on CUDA tensors."""
    module = compiled.extension()
    assert module is not None
    text = f"C++ for the CPU, path {module.cpu_path()} of {', '.join(module.cpu_paths())}"
    if problem := module.amx_problem():
        text += f"; the processor's AMX is not used: {problem}"
    if problem := module.neonbf16_problem():
        text += f"; the path neonbf16 is not used: {problem}"
    if compiled.serves_cuda():
        devices = "" if torch.cuda.is_available() else ", but torch finds no CUDA device"
        text += f"; CUDA C++ for {', '.join(CUDA_OPERATORS)}{devices}"
    return text


def refusal(operator: str, operands: Operands) -> str:
    """Return why the compiled kernels do not serve these operands; empty if they do."""
    x, other, *_ = operands
    if needs_gradient(operands):
        return "expected inputs without gradients, got one that requires them: use torch.no_grad()"
    if x.is_cpu:
        return ""
    if x.is_cuda and operator in CUDA_OPERATORS and compiled.serves_cuda():
        return unserved_rows(x, other)
    return f"expected tensors on the CPU, got {x.device.type}"


def unserved_rows(x: Tensor, y: Tensor | None) -> str:
    """Return why the CUDA kernel of `gram_update` does not serve these rows; empty if it does.

    The compiled operator checks the same for itself.
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


def is_left_to_torch(operator: str, operands: Operands) -> bool:
    """Return whether torch is faster on the processor at what the compiled kernels serve too."""
    x, weight, *others = operands
    return operator == "ghost_apply" and crossings.is_left_to_torch(x, weight, others)


def run(operator: str, operands: Operands) -> Any:
    """Run the kernel that the extension registered with torch."""
    return getattr(torch.ops.ghosted_fast, operator).default(*operands)
