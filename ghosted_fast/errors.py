"""The errors this library raises on its own account.

Each is also a built-in error of the kind a caller would expect (`ValueError`, `RuntimeError`), so
code that catches those keeps working. Wrong argument types raise `TypeError`, as torch does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar, cast


class GhostedFastError(Exception):
    """The base of every error below; catch it to catch them all."""


class ArgumentError(GhostedFastError, ValueError):
    """An argument has a value that cannot be used: the message says which would do."""


class CalibrationError(GhostedFastError, ValueError):
    """The calibration data cannot determine a ghost (too few tokens, empty text)."""


class NonFiniteError(GhostedFastError, ValueError):
    """Activations hold NaN or infinity. The statistics are as they were before the batch."""


class UnknownFamilyError(GhostedFastError, ValueError):
    """The family is not in the table, and its layers could not be found by structure."""


class UnsupportedModelError(GhostedFastError, ValueError):
    """The family is known, but this configuration of it cannot lose layers."""


class CheckpointError(GhostedFastError, ValueError):
    """A saved model is damaged, incomplete, or of a format this version does not read."""


class BackendError(GhostedFastError, RuntimeError):
    """A backend was named that cannot run here; the message holds the reason."""


class SolveError(GhostedFastError, ValueError):
    """The normal equations could not be solved, even with the largest damping."""


class SourceError(GhostedFastError, ValueError):
    """A model or a text was named that cannot be read."""


class OutputError(GhostedFastError, OSError):
    """A model or a report cannot be written: no room, no right, or the place is taken."""


class ForeignError(GhostedFastError, RuntimeError):
    """A library that was called failed in a way that has no error here; it is the cause."""


class BudgetError(GhostedFastError, ValueError):
    """A bound on quality or speed cannot be kept; the message holds the best that was reached."""


class VersionError(GhostedFastError, ImportError):
    """A package is too old or too new; the message holds the command that installs another."""


class MissingExtraError(GhostedFastError, ImportError):
    """An optional package is needed; the message holds the command that installs it."""


class GateError(GhostedFastError, RuntimeError):
    """What was to be timed computes something wrong: nothing is reported."""


class RankError(GhostedFastError, RuntimeError):
    """Another process of the group that shares the work has failed; the message says why."""


class RanksLostError(RankError):
    """Another process of the group has ended without a word, or does not answer in time."""


_OWN = "ghosted_fast"
# By what messages of torch hold: what is wrong, and what to do.
_HINTS = {
    "index out of range": "a token or a position is beyond the model's tables: cut the text into "
    "shorter sequences (config.max_position_embeddings), and use the model's own tokenizer",
    "out of memory": "take smaller batches, shorter sequences, or another dtype",
    "can't allocate memory": "take smaller batches, shorter sequences, or another dtype",
}
_ELSE = "check what was passed; the original error is the cause of this one"
T = TypeVar("T", bound=Callable[..., Any])


def renamed(**names: str) -> Callable[[T], T]:
    """Refuse old names of keyword arguments, and say what they are called now.

    Decorates a function or a class.

    Args:
        names: What has taken the place of each old name.
    """

    def decorate(target: T) -> T:
        function: Any = target.__init__ if isinstance(target, type) else target  # type: ignore[misc]

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            for name in names.keys() & kwargs.keys():
                raise TypeError(f"{target.__name__}() has no {name!r}: it is {names[name]} now")
            return function(*args, **kwargs)

        if not isinstance(target, type):
            return cast(T, checked)
        target.__init__ = checked  # type: ignore[misc]
        return target

    return decorate


def check_at_least(least: float, **values: float) -> None:
    """Raise ArgumentError for the first value, by its name, that is below a bound."""
    for name, value in values.items():
        if not value >= least:
            raise ArgumentError(f"expected {name} >= {least}, got {value}")


def check_above(bound: float, **values: float) -> None:
    """Raise ArgumentError for the first value, by its name, that is not above a bound."""
    for name, value in values.items():
        if not value > bound:
            raise ArgumentError(f"expected {name} > {bound}, got {value}")


def raising_ours(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that raises this library's errors alone.

    Wrong types of arguments stay TypeErrors, and MemoryError stays what it is.

    Args:
        function: A public function of this library.
    """

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (GhostedFastError, MemoryError):
            raise
        except Exception as error:
            said = " ".join(str(error).split())
            called = said.startswith(f"{function.__name__}() ")
            if isinstance(error, TypeError) and (called or _is_own(error.__traceback__)):
                raise
            advice = next((hint for part, hint in _HINTS.items() if part in said), _ELSE)
            raise ForeignError(
                f"expected {function.__name__} to finish, got {type(error).__name__}: "
                f"{said or 'no more'}; {advice}"
            ) from error

    return guarded


def _is_own(trace: TracebackType | None) -> bool:
    """Return whether an error was raised by this library itself."""
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    name = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", ""))
    return name.partition(".")[0] == _OWN
