"""Defines an operator in torch: its schema, its fake, and what runs where no kernel does.

The compiled extension registers its kernels under these schemas when it is loaded, for the CPU and
where it was built so for CUDA. On CUDA tensors what it does not serve is Triton's, and what Triton
does not serve is plain torch's, with a warning that says why. On ROCm, as on any other device,
plain torch runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from ghosted_fast.ops import compiled
from ghosted_fast.ops.backends import kernels_absence_reason, native, triton
from ghosted_fast.ops.operands import Operands
from ghosted_fast.ops.reference import ghost_apply_product

NAMESPACE = "ghosted_fast"
library = torch.library.Library(NAMESPACE, "DEF")

# A fact of the build, so that importing this asks no driver.
_IS_CUDA = torch.version.hip is None and torch.backends.cuda.is_built()


@cache
def _warn_plain(subject: str, reason: str) -> None:
    warnings.warn(f"{subject} runs on plain torch: {reason}", RuntimeWarning, stacklevel=3)


def run_on_cuda(operator: str, operands: Operands, plain: Callable[[Any], Any]) -> Any:
    """Run an operator by Triton, or by plain torch with one warning for each reason.

    A plain ghost of many rows is cuBLAS's, without a warning: as exact, and faster on paper.
    """
    operands.check()
    if reason := triton.absence_reason() or triton.refusal(operator, operands):
        _warn_plain(f"{NAMESPACE}.{operator}", reason)
        return plain(operands)
    if triton.is_left_to_torch(operator, operands):
        x, weight, *_ = operands
        return ghost_apply_product(x, weight)
    return triton.run(operator, operands)


def run_plain(operator: str, operands: Operands, plain: Callable[[Any], Any]) -> Any:
    """Run an operator by plain torch, with one warning for each kind of device."""
    operands.check()
    if reason := kernels_absence_reason(operator, operands[0].device.type):
        _warn_plain(NAMESPACE, reason)
    return plain(operands)


def define(
    operator: str,
    schema: str,
    operands: Callable[..., Operands],
    fake: Callable[[Any], Any],
    plain: Callable[[Any], Any],
) -> Any:
    """Define an operator, and return it.

    Args:
        operator: Its name.
        schema: Its arguments, in the order of its operands, and what it returns.
        operands: The type of its operands.
        fake: Makes empty results of operands.
        plain: Computes the results of operands in plain torch, on any device.
    """

    def checked_fake(*arguments: Any) -> Any:
        given = operands(*arguments)
        given.check()
        return fake(given)

    def on_cuda(*arguments: Any) -> Any:
        return run_on_cuda(operator, operands(*arguments), plain)

    names = [operator]
    if operator in native.CUDA_OPERATORS:
        names.append(f"{operator}_fallback")  # what the compiled CUDA kernel calls
    for name in names:
        library.define(name + schema)
        torch.library.register_fake(f"{NAMESPACE}::{name}", checked_fake, lib=library)
        library.impl(
            name,
            lambda *arguments: run_plain(operator, operands(*arguments), plain),
            "CompositeExplicitAutograd",
        )
        is_compiled = name in native.CUDA_OPERATORS and compiled.serves_cuda()
        if _IS_CUDA and operator in triton.OPERATORS and not is_compiled:
            library.impl(name, on_cuda, "CUDA")
    return getattr(torch.ops.ghosted_fast, operator).default
