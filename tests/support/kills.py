"""Work in a child process that is killed: at one of its changes to files, or after a while."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import pytest
import torch
import tqdm.auto
from torch import Tensor

from ghosted_fast._atomic_files import exchange
from ghosted_fast.errors import GhostedFastError
from ghosted_fast.models.loading import load_model
from ghosted_fast.testing import random_tokens

Work = Callable[[], object]
TOKENS = random_tokens(1, 8)
# What the interpreter reports before it does it. Two names change places by a call through ctypes.
_CHANGES = {
    *("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.truncate", "os.link"),
    *("shutil.rmtree", "shutil.copyfile", "ctypes.dlopen"),
}


def _changes_files(event: str, given: tuple[object, ...]) -> bool:
    if event != "open":
        return event in _CHANGES
    flags = given[2]
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def _run(work: Work, told: int, at: int | None) -> NoReturn:
    """Work in a child, say how many changes there were or what went wrong, and end."""
    status, count = 1, 0

    def count_changes(event: str, given: tuple[object, ...]) -> None:
        nonlocal count
        if _changes_files(event, given):
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)

    # Progress bars share a lock between processes, which would stay locked for all if a child that
    # holds it is killed.
    for bar in (tqdm.std.tqdm, tqdm.auto.tqdm):
        bar.set_lock(threading.RLock())
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(nowhere, stream)
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115
        sys.addaudithook(count_changes)
        work()
        os.write(told, str(count).encode())
        status = 0
    except BaseException:
        os.write(told, traceback.format_exc()[-4000:].encode())
    finally:
        os._exit(status)


def run_in_child(work: Work, at: int | None = None, after: float | None = None) -> int | None:
    """Do a work in a child process, which may be killed.

    Args:
        work: The work. What it needs should have been imported.
        at: The change to files, counted from 1, just before which the child is killed.
        after: The seconds after which it is.

    Returns:
        How many changes to files it made; None if it was killed.
    """
    reading, told = os.pipe()
    child = os.fork()
    if child == 0:
        _run(work, told, at)
    os.close(told)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return None
    assert os.WEXITSTATUS(status) == 0, said
    return int(said)


def need_exchange(path: Path) -> None:
    """Skip the test if two names cannot change places at once in the file system of a path."""
    if not exchange(path, path):
        pytest.skip("this file system cannot let names change places")


def logits_of(folder: Path) -> Tensor:
    """Return what a saved model predicts."""
    model, _ = load_model(folder)
    with torch.inference_mode():
        logits: Tensor = model(TOKENS).logits
    return logits


def which(folder: Path, known: Sequence[Tensor]) -> int:
    """Return which of some models a folder holds; it must be one of them, and load."""
    found = logits_of(folder)
    places = [place for place, logits in enumerate(known) if torch.equal(logits, found)]
    assert len(places) == 1, f"{folder} loads, and is another model"
    return places[0]


def clear_leftovers(target: Path, known: Sequence[Tensor] = ()) -> None:
    """Remove what a killed process has left beside its target, and check that it harms nobody.

    It is hidden, and what would load of it is one of the models that are known.
    """
    for left in target.parent.iterdir():
        if left == target:
            continue
        assert left.name.startswith(f".{target.name}"), f"{left} lies beside the target"
        for config in left.rglob("config.json") if left.is_dir() else ():
            with contextlib.suppress(GhostedFastError, OSError, ValueError):  # it does not load
                which(config.parent, known)
        shutil.rmtree(left) if left.is_dir() else left.unlink()
