"""Small tasks whose answer is written, not chosen, and is right or wrong to the character.

Three kinds that models of a hundred million parameters can do, each shown by examples in the
prompt: copying words, adding two numbers, closing brackets. A seed makes them, so no model has read
them. Unlike multiple choice they show whether a model can still keep to a text over many tokens.

Source: ours.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ghosted_fast.errors import ArgumentError, check_at_least
from ghosted_fast.measure.greedy import greedy_answers

_WORDS = (
    *("apple", "river", "stone", "cloud", "green", "seven", "paper", "light", "table", "horse"),
    *("music", "winter", "garden", "yellow", "bread", "ocean", "silver", "candle", "forest"),
    *("window", "mirror", "bridge", "summer", "pencil", "rabbit", "purple", "island", "button"),
)
_BRACKETS = {"(": ")", "[": "]", "{": "}"}
_EXAMPLES = 4
# Behind the right answer a model may write this much more before its line is cut.
_MORE_TOKENS = 2


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        prompt: Examples, and what is asked.
        answer: All that is to stand on the line.
    """

    prompt: str
    answer: str


@dataclass(frozen=True)
class ExactScore:
    """A model's score on one kind of problem.

    Attributes:
        kind: A key of `KINDS`.
        value: Share of the problems whose line is right.
        stderr: Standard error of it.
        flips: Share of the problems on which the model and the dense one are not both right or both
            wrong; None for the dense one.
        num_samples: Problems.
        right: Whether each is solved. Not part of the JSON.
    """

    kind: str
    value: float
    stderr: float
    flips: float | None
    num_samples: int
    right: tuple[bool, ...] = field(default=(), repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        return {name: value for name, value in asdict(self).items() if name != "right"}


def _copying(draw: random.Random) -> tuple[str, str]:
    words = " ".join(draw.sample(_WORDS, 5))
    return f"Words: {words}\nAgain:", words


def _adding(draw: random.Random) -> tuple[str, str]:
    one, other = draw.randint(1, 20), draw.randint(1, 20)
    return f"{one} + {other} =", str(one + other)


def _closing(draw: random.Random) -> tuple[str, str]:
    opened = [draw.choice("([{") for _ in range(4)]
    closed = [_BRACKETS[bracket] for bracket in reversed(opened)]
    return f"Open: {' '.join(opened)}\nClose:", " ".join(closed)


KINDS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "copying": _copying,
    "adding": _adding,
    "brackets": _closing,
}


def make_problems(kind: str, count: int, seed: int = 0) -> list[Problem]:
    """Return problems of a kind, each behind four examples of its own; the same for a seed.

    Args:
        kind: A key of `KINDS`.
        count: How many.
        seed: Of what is asked and shown.

    Raises:
        ArgumentError: There is no such kind, or `count` is below 1.
    """
    check_at_least(1, count=count)
    if kind not in KINDS:
        raise ArgumentError(f"expected a kind out of {', '.join(KINDS)}, got {kind!r}")
    draw = random.Random(f"{kind} {seed}")
    problems = []
    for _ in range(count):
        shown: dict[str, str] = {}
        while len(shown) <= _EXAMPLES:
            shown.update([KINDS[kind](draw)])
        *examples, (asked, answer) = shown.items()
        lines = [f"{question} {right}" for question, right in examples]
        problems.append(Problem("\n\n".join([*lines, asked]), answer))
    return problems


def exact_answers(
    models: Mapping[str, Any],
    tokenizer: Any,
    count: int = 50,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = False,
) -> dict[str, list[ExactScore]]:
    """Score models on problems of each kind.

    Args:
        models: Causal language models by name, the dense one first.
        tokenizer: Theirs.
        count: Problems of each kind.
        seed: Of the problems.
        batch_size: Problems at a time.
        progress: Show progress bars on stderr.

    Returns:
        The scores of each model, in the order of `KINDS`.

    Raises:
        ArgumentError: A number is below 1.
    """
    scores: dict[str, list[ExactScore]] = {name: [] for name in models}
    for kind in KINDS:
        problems = make_problems(kind, count, seed)
        dense: list[bool] | None = None
        for name, model in models.items():
            right = _right(model, tokenizer, problems, batch_size, progress)
            scores[name].append(_score(kind, right, dense))
            dense = right if dense is None else dense
    return scores


def _right(
    model: Any, tokenizer: Any, problems: Sequence[Problem], batch_size: int, progress: bool
) -> list[bool]:
    """Return which problems a model solves."""
    prompts = [list(tokenizer(item.prompt)["input_ids"]) for item in problems]
    longest = max(len(_tokens_of(tokenizer, item.answer)) for item in problems)
    answers = greedy_answers(model, prompts, longest + _MORE_TOKENS, batch_size, progress)
    texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
    return [
        text.strip().partition("\n")[0].strip() == item.answer
        for text, item in zip(texts, problems, strict=True)
    ]


def _tokens_of(tokenizer: Any, answer: str) -> list[int]:
    return list(tokenizer(f" {answer}\n", add_special_tokens=False)["input_ids"])


def _score(kind: str, right: Sequence[bool], dense: Sequence[bool] | None) -> ExactScore:
    count = len(right)
    value = sum(right) / count
    flips = None
    if dense is not None:
        flips = sum(one != other for one, other in zip(right, dense, strict=True)) / count
    error = math.sqrt(value * (1 - value) / max(count - 1, 1))
    return ExactScore(kind, value, error, flips, count, tuple(right))
