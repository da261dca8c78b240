"""The Triton kernels, for CUDA devices. triton is imported by the first call that needs it."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from functools import cache
from types import ModuleType
from typing import Any

import torch

from ghosted_fast.ops.operands import Operands, needs_gradient

OPERATORS = ("ghost_apply", "gram_update")
_DEVICE_TYPE = "cuda"
# bf16 on tensor cores, and cp.async.
_OLDEST_CAPABILITY = (8, 0)


def absence_reason() -> str:
    """Return why the Triton kernels cannot run here; empty where they can.

    Imports triton only where there is a GPU to use it.
    """
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; `pip install triton` installs it"
    if torch.version.hip is not None:
        return "the Triton kernels are made for CUDA, and this torch is built for ROCm"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return _capability_reason(torch.cuda.get_device_capability()) or _import_problem()


@cache
def _import_problem() -> str:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton could not be loaded: {error}"
    return ""


def _capability_reason(capability: tuple[int, int]) -> str:
    if capability < _OLDEST_CAPABILITY:
        return "expected a GPU of compute capability 8.0 or later, got {}.{}".format(*capability)
    return ""


def description() -> str:
    """Return the version, the device, and what is served."""
    major, minor = torch.cuda.get_device_capability()
    return (
        f"Triton {importlib.metadata.version('triton')} for CUDA, sm_{major}{minor}: "
        f"{', '.join(OPERATORS)}; other shapes and dtypes run on plain torch"
    )


def _kernels(operator: str) -> ModuleType:
    from ghosted_fast.kernels import ghost_apply, gram_update

    return {"ghost_apply": ghost_apply, "gram_update": gram_update}[operator]


def refusal(operator: str, operands: Operands) -> str:
    """Return why Triton does not serve these operands; empty if it does."""
    x, other, *_ = operands
    if operator not in OPERATORS:
        return f"expected one of {', '.join(OPERATORS)}, got {operator}"
    if x.device.type != _DEVICE_TYPE:
        return f"expected tensors on a CUDA device, got {x.device.type}"
    if needs_gradient(operands):
        return "expected inputs without gradients, got one that requires them: use torch.no_grad()"
    reason: str = _kernels(operator).refusal(x, other)
    return reason


def is_left_to_torch(operator: str, operands: Operands) -> bool:
    """Return whether torch has a product for operands that are served, and the faster one.

    It has one for a plain ghost: nothing but x and a weight.
    """
    x, weight, *others = operands
    if operator != "ghost_apply" or any(other is not None for other in others):
        return False
    found: bool = _kernels(operator).is_slower_than_torch(x, weight)
    return found


def run(operator: str, operands: Operands) -> Any:
    """Launch the kernels on the device of the operands."""
    with torch.cuda.device_of(operands[0]):
        return getattr(_kernels(operator), operator)(*operands)
