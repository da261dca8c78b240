"""What can run the operators: one file for each backend, and this table of them.

"auto" is none of them: it leaves the choice to torch, which knows the kernels of each device. A
backend that is named runs, or says why it cannot.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from ghosted_fast._env import native_disabled
from ghosted_fast.errors import BackendError
from ghosted_fast.ops.backends import native, reference, triton
from ghosted_fast.ops.operands import Operands


class Backend(Protocol):
    """What the file of a backend holds."""

    def absence_reason(self) -> str:
        """Return why it cannot run on this machine; empty where it can."""

    def description(self) -> str:
        """Return what it is, where it can run."""

    def refusal(self, operator: str, operands: Operands) -> str:
        """Return why it does not serve these operands, which were checked; empty if it does."""

    def run(self, operator: str, operands: Operands) -> Any:
        """Run an operator that was not refused."""


BACKENDS: dict[str, Backend] = {"native": native, "reference": reference, "triton": triton}


def insist(backend: str, operator: str, operands: Operands) -> Any:
    """Run an operator by the backend that the caller named. Never falls back.

    Raises:
        TypeError, ArgumentError: An operand does not fit.
        BackendError: The name is unknown, or the backend cannot run here; says why.
    """
    if backend not in BACKENDS:
        names = ", ".join(["auto", *BACKENDS])
        raise BackendError(f"expected a backend of {names}, got {backend!r}")
    chosen = BACKENDS[backend]
    reason = chosen.absence_reason()
    if not reason:
        operands.check()
        reason = chosen.refusal(operator, operands)
    if reason:
        raise BackendError(f"backend {backend!r}: {reason}; use backend='auto'")
    return chosen.run(operator, operands)


def served_by(operator: str, operands: Operands, backend: str = "auto") -> str:
    """Return what runs an operator on operands that were checked: a backend, or "torch".

    Args:
        operator: Its name.
        operands: What it is called with.
        backend: What the caller names: "auto", or a backend, which then runs it.
    """
    if backend != "auto":
        return backend
    if not native.absence_reason() and not native.refusal(operator, operands):
        return "torch" if native.is_left_to_torch(operator, operands) else "native"
    if triton.absence_reason() or triton.refusal(operator, operands):
        return "torch"
    return "torch" if triton.is_left_to_torch(operator, operands) else "triton"


def kernels_absence_reason(operator: str, device_type: str) -> str:
    """Return why `backend="auto"` runs an operator by plain torch on a kind of device.

    Empty where that is no news: for an extension that was switched off on purpose, and for what is
    left to torch's own solvers on CUDA.
    """
    if device_type == "cpu":
        return "" if native_disabled() else native.absence_reason()
    if device_type == "cuda":
        if operator in triton.OPERATORS or torch.version.hip is not None:
            return triton.absence_reason()
        return ""
    return f"this version has no compiled kernels for {device_type}"


def backend_status() -> list[tuple[str, bool, str]]:
    """Return (name, available, description or reason) of every backend."""
    status = []
    for name, backend in BACKENDS.items():
        absence = backend.absence_reason()
        status.append((name, not absence, absence or backend.description()))
    return status
