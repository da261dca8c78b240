"""Finds the CUDA compiler and the disassembler, as setup.py and users do."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path


def find_nvcc() -> str:
    """Return the path of nvcc: $CUDACXX, $CUDA_HOME, $PATH or PyPI's packages; empty for none."""
    candidates = [os.environ.get("CUDACXX", ""), "nvcc"]
    if home := os.environ.get("CUDA_HOME"):
        candidates.insert(1, str(Path(home) / "bin" / "nvcc"))
    for folder in sys.path:
        candidates += map(str, sorted((Path(folder) / "nvidia").glob("cu*/bin/nvcc")))
    return next((found for name in candidates if name and (found := shutil.which(name))), "")


def find_tool(name: str) -> str:
    """Return the path of cuobjdump or nvdisasm: the toolkit's, or that of the Triton wheel."""
    nvcc = find_nvcc()
    candidates = [name, *([str(Path(nvcc).resolve().parent / name)] if nvcc else [])]
    if (triton := importlib.util.find_spec("triton")) and triton.origin:
        bundled = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name
        candidates.append(str(bundled))
    return next((found for name in candidates if (found := shutil.which(name))), "")


def missing_tools() -> str:
    """Return why machine code cannot be made and read here; empty if it can."""
    if not find_nvcc():
        return "no nvcc; `make cuda` installs that of PyPI"
    for name in ("cuobjdump", "nvdisasm"):
        if not find_tool(name):
            return f"no {name}; it is in the CUDA toolkit and in the triton package"
    return ""
