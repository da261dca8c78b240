"""A calibration text: brought into one form, and hashed and split, once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

from ghosted_fast.text.batches import Batch, iterate_batches
from ghosted_fast.text.fingerprints import text_digest


class CalibrationText:
    """Batches of tokens that a whole run shares.

    Iterating yields `Batch`es. What the caller gave is read as it is iterated, so that a text that
    is needed once takes no memory; `hold` keeps it as token ids.

    Args:
        batches: See `iterate_batches`.

    Attributes:
        is_same_everywhere: Whether all ranks of a process group are known to have the same text.
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches = batches
        self._held: list[Batch] | None = None
        self.is_same_everywhere = False

    @classmethod
    def of(cls, batches: Iterable[Any]) -> CalibrationText:
        """Return the text of some batches; one that is a text already is returned as it is."""
        return batches if isinstance(batches, cls) else cls(batches)

    def __iter__(self) -> Iterator[Batch]:
        return iterate_batches(self._batches) if self._held is None else iter(self._held)

    def hold(self) -> list[Batch]:
        """Keep the batches in memory as token ids, to be read again, and return them.

        Raises:
            ArgumentError: An element is no batch.
        """
        if self._held is None:
            self._held = list(iterate_batches(self._batches))
            self._batches = ()
        return self._held

    @property
    def beginning(self) -> Batch | None:
        """Its first batch; None where that cannot be seen without being read, or there is none."""
        given = self._batches if self._held is None else self._held
        return next(iterate_batches(given[:1]), None) if isinstance(given, Sequence) else None

    @cached_property
    def digest(self) -> str:
        """A digest of its tokens and masks; the text is held."""
        return text_digest(self.hold())

    @cached_property
    def num_tokens(self) -> int:
        """Its attended tokens; the text is held."""
        return sum(batch.num_tokens for batch in self.hold())
