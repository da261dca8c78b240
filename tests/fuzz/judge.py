"""What may come of a damaged input: an error that helps, or what comes of it undamaged."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ghosted_fast.errors import GhostedFastError

# A verb of advice, somewhere in the message.
_ADVICE = re.compile(
    r"\b(give|name|copy|download|save|pass|check|correct|write|leave|put|take|convert|install|"
    r"load|choose|free|move|rename|split|use|remove|unpack|cut)\b"
)


@dataclass
class Outcomes:
    """What came of damaged inputs."""

    counts: Counter[str] = field(default_factory=Counter)
    foreign: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    unclear: list[str] = field(default_factory=list)

    def judge(self, said: str, run: Callable[[], Any], right: Callable[[Any], bool]) -> None:
        """Run on a damaged input, and keep what came.

        Args:
            said: How the input was damaged.
            run: Uses it.
            right: Whether a result is what it should be.
        """
        try:
            found = run()
        except GhostedFastError as error:
            self.counts["error"] += 1
            message = str(error)
            clear = "expected" in message and "got" in message and _ADVICE.search(message)
            if not clear or "/" not in message or "\n" in message or len(message) > 1000:
                self.unclear.append(f"{said}: {message}")
        except Exception as error:  # what must not come
            self.foreign.append(f"{said}: {type(error).__name__}: {error}")
        else:
            self.counts["result"] += 1
            if not right(found):
                self.wrong.append(said)

    @property
    def total(self) -> int:
        """How many inputs there were."""
        return sum(self.counts.values()) + len(self.foreign)
