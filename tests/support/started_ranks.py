"""Starts functions in processes that are ranks of one group."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from support import rank_programs

WAIT_S = 300.0
# What takes long to import; each rank is a fork of one process that has it.
_IMPORTED = ["ghosted_fast.pipeline", "ghosted_fast.cli.app", "ghosted_fast.grid"]
_FAMILIES = ("llama", "gpt2", "mixtral")
_IMPORTED += [f"transformers.models.{name}.modeling_{name}" for name in _FAMILIES]


def start(target: Callable[..., None], calls: list[tuple[Any, ...]], impatient: bool) -> None:
    """Run a function in processes that are forked where all is imported, and wait for them.

    Or wait for the first of them only, and kill the others.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    processes = [context.Process(target=target, args=call, daemon=True) for call in calls]
    for process in processes:
        process.start()
    for process in processes:
        process.join(WAIT_S)
        if impatient:
            for other in processes[1:]:
                other.kill()
        assert process.exitcode is not None, "a rank hangs"


def run_ranks(
    program: Callable[..., Any],
    size: int,
    folder: Path,
    *arguments: Any,
    timeout_s: float = 120.0,
    impatient: bool = False,
) -> list[Any]:
    """Return what each rank's program returned, or its error, as (name, message)."""
    calls = [(program, rank, size, folder, timeout_s, arguments) for rank in range(size)]
    start(rank_programs.be_a_rank, calls, impatient)
    files = [folder / f"result{rank}" for rank in range(size)]
    return [torch.load(file)[0] if file.exists() else None for file in files]
