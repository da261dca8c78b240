"""The paths of the CPU extension: what setup.py says of them, and how their kernels are called."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
ARM_PATHS = ("neonbf16", "neon")
TABLES = {
    "amx": "kAmxKernels",
    "avx512bf16": "kAvx512Bf16Kernels",
    "avx512": "kAvx512Kernels",
    "avx2": "kAvx2Kernels",
    "neonbf16": "kNeonBf16Kernels",
    "neon": "kNeonKernels",
    "portable": "kPortableKernels",
}


@cache
def import_setup() -> ModuleType:
    """Import setup.py, which knows the flags of each path, without building."""
    spec = importlib.util.spec_from_file_location("ghosted_fast_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
