"""The only module that knows environment variables."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the folder for downloads: `GHOSTED_FAST_CACHE`, else in the user's cache."""
    if chosen := os.environ.get("GHOSTED_FAST_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ghosted_fast"


def native_disabled() -> bool:
    """Return whether `GHOSTED_FAST_NATIVE=0` asks for the reference in place of the extension."""
    return os.environ.get("GHOSTED_FAST_NATIVE", "1") == "0"


def prepare_vllm() -> None:
    """Set what vLLM on the processor needs to be measured, where the user has set nothing.

    Its processes are not bound to cores: several engines share them, in turn.
    """
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
