"""Whatever the libraries below raise, callers of this one see its errors, raised from those."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import TracebackType
from typing import Any

from ghosted_fast.errors import ForeignError, GhostedFastError

_OWN = "ghosted_fast"
# By what messages of torch hold: what is wrong, and what to do.
_HINTS = {
    "index out of range": "a token or a position is beyond the model's tables: cut the text into "
    "shorter sequences (config.max_position_embeddings), and use the model's own tokenizer",
    "out of memory": "take smaller batches, shorter sequences, or another dtype",
    "can't allocate memory": "take smaller batches, shorter sequences, or another dtype",
}
_ELSE = "check what was passed; the original error is the cause of this one"


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
