"""Finds the compiled extension `ghosted_fast._C` and remembers why it is absent.

Importing this module loads nothing. Loading the extension registers its operators with torch: those
for the CPU, and in a CUDA build `gram_update` for CUDA tensors.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

from ghosted_fast._env import native_disabled


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
