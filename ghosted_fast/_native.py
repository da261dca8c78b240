"""Finds the compiled extension `ghosted_fast._C` and remembers why it is absent.

Importing this module loads nothing. Loading the extension registers its operators with torch: those
for the CPU, and in a CUDA build `gram_update` for CUDA tensors.
"""

from __future__ import annotations

import importlib
import warnings
from functools import cache
from types import ModuleType

import torch

from ghosted_fast._env import native_disabled
from ghosted_fast.errors import BackendError

CUDA_OPERATORS = ("gram_update",)
BACKENDS = ("auto", "native", "reference", "triton")
_TRITON_REASON = "the Triton kernels are not part of this version"


@cache
def _find() -> tuple[ModuleType | None, str]:
    """Return the extension, or None with the reason."""
    if native_disabled():
        return None, "GHOSTED_FAST_NATIVE=0 is set"
    try:
        return importlib.import_module("ghosted_fast._C"), ""
    except ModuleNotFoundError:
        return None, (
            "ghosted_fast._C was not built; with a C++17 compiler, "
            "`GHOSTED_FAST_BUILD=cpu pip install --no-build-isolation .` builds it"
        )
    except ImportError as error:
        return None, f"ghosted_fast._C could not be loaded: {error}"


def extension() -> ModuleType | None:
    """Return the loaded extension, or None where there is none."""
    return _find()[0]


def absence_reason() -> str:
    """Return why there is no extension; empty where there is one."""
    return _find()[1]


def serves_cuda() -> bool:
    """Return whether the extension was built with the CUDA kernels."""
    module = extension()
    return module is not None and module.build_info()["kind"] == "cuda"


def require_backend(backend: str, device: torch.device, op: str = "") -> None:
    """Check that a backend named by the caller can run on a device. Never falls back.

    Args:
        backend: One of `BACKENDS` except "auto".
        device: Where the tensors are.
        op: Name of the operator, where it may have a compiled kernel for CUDA.

    Raises:
        BackendError: The name is unknown, or the backend cannot run here; says why.
    """
    if backend not in BACKENDS:
        raise BackendError(f"expected a backend of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "triton":
        raise BackendError(f"backend 'triton': {_TRITON_REASON}; use backend='auto'")
    if backend == "native" and extension() is None:
        raise BackendError(f"backend 'native': {absence_reason()}")
    on_cuda = device.type == "cuda" and op in CUDA_OPERATORS and serves_cuda()
    if backend == "native" and device.type != "cpu" and not on_cuda:
        raise BackendError(
            f"backend 'native': expected tensors on the CPU, got {device.type}; "
            "move them, or use backend='auto'"
        )


@cache
def warn_fallback(device_type: str) -> None:
    """Warn, once per kind of device, that `backend="auto"` runs plain torch, and why.

    An extension that was switched off on purpose is not warned about.
    """
    if device_type != "cpu":
        reason = f"this version has no compiled kernels for {device_type}"
    elif native_disabled():
        return
    else:
        reason = absence_reason()
    warnings.warn(f"ghosted_fast runs on plain torch: {reason}", RuntimeWarning, stacklevel=3)


def backend_status() -> list[tuple[str, bool, str]]:
    """Return (name, available, description or reason) of every backend."""
    module = extension()
    if module is None:
        native = absence_reason()
    else:
        native = f"C++ for the CPU, path {module.cpu_path()} of {', '.join(module.cpu_paths())}"
        if serves_cuda():
            devices = "" if torch.cuda.is_available() else ", but torch finds no CUDA device"
            native += f"; CUDA C++ for {', '.join(CUDA_OPERATORS)}{devices}"
    return [
        ("native", module is not None, native),
        ("reference", True, "torch in fp64, any device, slow"),
        ("triton", False, _TRITON_REASON),
    ]
