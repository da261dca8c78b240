"""The only module that knows environment variables."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple


class Launch(NamedTuple):
    """What `torchrun` says of a process.

    Attributes:
        rank: Its number, from 0.
        size: How many there are.
        local_rank: Its number on this machine.
    """

    rank: int
    size: int
    local_rank: int


def launched() -> Launch | None:
    """Return what `torchrun` says of this process; None if it is the only one, or by itself."""
    named = os.environ.keys() >= {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    if not named or int(os.environ["WORLD_SIZE"]) == 1:
        return None
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    return Launch(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), local_rank)


def silence_bars() -> None:
    """Switch off the progress bars of libraries that have not been imported yet."""
    os.environ.setdefault("TQDM_DISABLE", "1")


def cache_folder() -> Path:
    """Return the folder for downloads: `GHOSTED_FAST_CACHE`, else in the user's cache."""
    if chosen := os.environ.get("GHOSTED_FAST_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ghosted_fast"


def native_disabled() -> bool:
    """Return whether `GHOSTED_FAST_NATIVE=0` asks for the reference in place of the extension."""
    return os.environ.get("GHOSTED_FAST_NATIVE", "1") == "0"


def verifies_all() -> bool:
    """Return whether `GHOSTED_FAST_VERIFY=1` asks to check every weight of a ghosted folder."""
    return os.environ.get("GHOSTED_FAST_VERIFY", "0") == "1"


def compiler() -> str | None:
    """Return the C++ compiler that the user has named: `CXX`."""
    return os.environ.get("CXX")


def prepare_vllm() -> None:
    """Set what vLLM on the processor needs to be measured, where the user has set nothing.

    Its processes are not bound to cores: several engines share them, in turn.
    """
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
