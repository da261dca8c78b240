"""Runs parts one after the other, each in a process of its own, and remembers what is done."""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ghosted_fast._atomic_files import write_atomically
from gpu.plan import LIMIT, ROOT, Command, Part, Setting

DONE, FAILED, LATE, ABSENT, LEFT = "done", "failed", "too late", "absent", "not run"
_TAIL = 30  # lines of a log that the page shows of what went wrong


def state_file(name: str, setting: Setting) -> Path:
    """Return the file that says how a part ended."""
    return setting.folder / "states" / f"{name}.json"


def state_of(part: Part, setting: Setting) -> dict[str, Any]:
    """Return how a part ended with this device and shape; `LEFT` where it never ran."""
    path = state_file(part.name, setting)
    if path.exists():
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if (state["device"], state["shape"]) == (setting.device, setting.shape):
            return state
    return {"status": LEFT}


def run_part(part: Part, setting: Setting, limit: float = LIMIT) -> dict[str, Any]:
    """Run a part, write down how it ended, and return that."""
    command = part.command(setting)
    state: dict[str, Any] = {
        "device": setting.device,
        "shape": setting.shape,
        "command": " ".join(command.words),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    if part.program and shutil.which(part.program) is None:
        state |= {"status": ABSENT, "seconds": 0.0, "said": [f"there is no {part.program} here"]}
    else:
        state |= _run(command, setting.folder / "logs" / f"{part.name}.log", limit)
    write_atomically(state_file(part.name, setting), json.dumps(state, indent=2) + "\n")
    return state


def _run(command: Command, log: Path, limit: float) -> dict[str, Any]:
    """Run a command with its output in a file; end it, and what it started, at its limit."""
    log.parent.mkdir(parents=True, exist_ok=True)
    began, status = time.monotonic(), DONE
    with log.open("wb") as file:
        process = subprocess.Popen(
            list(command.words),
            cwd=ROOT,
            env={**os.environ, **command.environment, "PYTHONUNBUFFERED": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            status = LATE
        finally:
            _end(process)
    text = log.read_text(encoding="utf-8", errors="replace")
    if status == DONE and (code != 0 or not re.search(command.must_say, text)):
        status = FAILED
    said = [] if status == DONE else text.splitlines()[-_TAIL:]
    return {"status": status, "seconds": time.monotonic() - began, "said": said}


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process that still runs, and its children."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def chosen(
    known: Sequence[Part], setting: Setting, only: Sequence[str], again: Sequence[str]
) -> list[Part]:
    """Return the parts that are to run: those named, or all; not those that are done.

    Raises:
        SystemExit: A name is unknown.
    """
    names = [part.name for part in known]
    for name in (*only, *again):
        if name not in names:
            raise SystemExit(f"expected parts of {', '.join(names)}, got {name!r}")
    wanted = [part for part in known if part.name in {*only, *again} or not (only or again)]
    return [
        part for part in wanted if part.name in again or state_of(part, setting)["status"] != DONE
    ]
