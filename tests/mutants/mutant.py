"""What a mutant is: one fault, and the tests that must find it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """A fault planted in a copy of the tree.

    Attributes:
        name: What was broken, in a few words.
        file: Path from the root of the tree.
        old: Text that occurs exactly once in the file.
        new: What replaces it.
        tests: Arguments for pytest; at least one of these tests must fail on the mutated copy.
        equivalent: Why no test can tell, for a fault that changes nothing that counts.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    equivalent: str | None = None
