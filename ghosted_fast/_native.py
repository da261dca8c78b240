"""Finds the compiled extension `ghosted_fast._C` and remembers why it is absent.

Importing this module loads nothing. Loading the extension registers its operators with torch: those
for the CPU, and in a CUDA build `gram_update` for CUDA tensors.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import warnings
from functools import cache
from types import ModuleType

import torch

from ghosted_fast._env import native_disabled
from ghosted_fast.errors import BackendError

CUDA_OPERATORS = ("gram_update",)
BACKENDS = ("auto", "native", "reference", "triton")
# bf16 on tensor cores, and cp.async.
_OLDEST_CAPABILITY = (8, 0)


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


def triton_absence_reason() -> str:
    """Return why the Triton kernels cannot run here; empty where they can.

    Imports triton only where there is a GPU to use it.
    """
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; `pip install triton` installs it"
    if torch.version.hip is not None:
        return "the Triton kernels are made for CUDA, and this torch is built for ROCm"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return _capability_reason(torch.cuda.get_device_capability()) or _triton_import_problem()


@cache
def _triton_import_problem() -> str:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton could not be loaded: {error}"
    return ""


def _capability_reason(capability: tuple[int, int]) -> str:
    if capability < _OLDEST_CAPABILITY:
        return "expected a GPU of compute capability 8.0 or later, got {}.{}".format(*capability)
    return ""


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
        reason = triton_absence_reason()
        if not reason and device.type != "cuda":
            reason = f"expected tensors on a CUDA device, got {device.type}"
        if reason:
            raise BackendError(f"backend 'triton': {reason}; use backend='auto'")
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
    if device_type == "cuda" and torch.version.hip is not None:
        reason = triton_absence_reason()
    elif device_type != "cpu":
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
    absent = triton_absence_reason()
    return [
        ("native", module is not None, native),
        ("reference", True, "torch in fp64, any device, slow"),
        ("triton", not absent, absent or _triton_description()),
    ]


def _triton_description() -> str:
    major, minor = torch.cuda.get_device_capability()
    version = importlib.metadata.version("triton")
    return (
        f"Triton {version} for CUDA, sm_{major}{minor}: ghost_apply, ghost_apply_rms_norm, "
        "gram_update; other shapes and dtypes run on plain torch"
    )
