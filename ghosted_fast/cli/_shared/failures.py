"""How a verb ends that fails: one line that names what was given, and nothing half written."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from ghosted_fast.errors import GhostedFastError, OutputError

# What a shell says of a program that a signal has ended.
_SIGNALLED = 128
# Options that name what is read and written, the first that are shown.
_NAMED = ("model", "folder", "dense", "operators", "calibration", "evaluation", "output", "report")


def line_of(error: BaseException, verb: str, values: Mapping[str, Any]) -> str:
    """Return what is said of an error: what was expected, what came, what to do.

    Args:
        error: What was raised.
        verb: The verb that it ended.
        values: The values of its options.
    """
    said = " ".join(str(error).split())
    if isinstance(error, GhostedFastError):
        return said or type(error).__name__
    got = said if isinstance(error, OSError) else f"{type(error).__name__}: {said or 'no more'}"
    given = " ".join(f"{name}={_shown(values[name])}" for name in _NAMED if values.get(name))
    if isinstance(error, MemoryError):
        advice = "take fewer --tokens, a smaller --batch-size or --dtype bf16"
    elif isinstance(error, OSError):
        advice = "check the paths, the rights to them and the room there"
    else:
        advice = "check that what is named is whole; --debug shows where it ended"
    return f"expected {verb} to finish on {given or 'what was given'}, got {got}: {advice}"


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def check_working_folder() -> None:
    """Raise unless the working folder is still there: without it torch does not even load.

    Raises:
        OutputError: It was removed.
    """
    try:
        os.getcwd()  # noqa: PTH109
    except OSError as error:
        raise OutputError(
            f"expected a working folder, got one that was removed ({error.strerror}): go to "
            "another (cd) and start again"
        ) from error


@contextlib.contextmanager
def ending_on_terminate() -> Iterator[None]:
    """Let SIGTERM end the work as Ctrl-C does, so that nothing half written is left."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def end(number: int, _: object) -> None:
        raise SystemExit(_SIGNALLED + number)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def escape_odd_names() -> None:
    """Let stdout and stderr show what their encoding does not have as escapes; be there at all."""
    if sys.stdout is None:
        sys.stdout = io.TextIOWrapper(io.BytesIO())
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def leave_stdout() -> None:
    """Have the interpreter write nothing more to a stdout that takes nothing."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
