"""Problems that a seed makes, and scores of models whose answers are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from support.tiny_text import tiny_tokenizer

from ghosted_fast.errors import ArgumentError
from ghosted_fast.measure import exact_answers as module
from ghosted_fast.measure.exact_answers import KINDS, exact_answers, make_problems
from ghosted_fast.testing import tiny_model

PAIRS = {"(": ")", "[": "]", "{": "}"}


def test_problems_have_the_answers_they_say() -> None:
    for item in make_problems("adding", 40):
        one, other = item.prompt.rpartition("\n\n")[2].removesuffix(" =").split(" + ")
        assert int(one) + int(other) == int(item.answer)
    for item in make_problems("copying", 40):
        asked = item.prompt.rpartition("\n\n")[2]
        assert asked == f"Words: {item.answer}\nAgain:"
    for item in make_problems("brackets", 40):
        opened = item.prompt.rpartition("Open: ")[2].removesuffix("\nClose:").split()
        stack = list(opened)
        for closing in item.answer.split():
            assert PAIRS[stack.pop()] == closing
        assert not stack


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_makes_them(kind: str) -> None:
    assert make_problems(kind, 20, seed=1) == make_problems(kind, 20, seed=1)
    assert make_problems(kind, 20, seed=1) != make_problems(kind, 20, seed=2)
    assert make_problems(kind, 20)[:5] == make_problems(kind, 5)
    for item in make_problems(kind, 20):
        *examples, asked = item.prompt.split("\n\n")
        assert len(examples) == 4 and not any(line.startswith(asked) for line in examples)


def test_scores_and_flips(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dense model solves all but each fifth problem, the other one all but each fourth."""
    texts: dict[int, str] = {}

    class Tokenizer:
        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            texts[len(texts)] = text
            return {"input_ids": [len(texts) - 1]}

        def decode(self, tokens: Sequence[int], skip_special_tokens: bool) -> str:
            return texts[tokens[0]]

    def answers(model: int, prompts: Any, *_: Any) -> list[list[int]]:
        found = []
        for place, (key,) in enumerate(prompts):
            problem = next(item for item in known if item.prompt == texts[key])
            good = f" {problem.answer} \nand more"
            texts[len(texts)] = good if place % model else f"{problem.answer} and"
            found.append([len(texts) - 1])
        return found

    known = [item for kind in KINDS for item in make_problems(kind, 20)]
    monkeypatch.setattr(module, "greedy_answers", answers)
    scores = exact_answers({"dense": 5, "other": 4}, Tokenizer(), count=20)
    for dense, other in zip(*scores.values(), strict=True):
        assert (dense.value, dense.flips, dense.num_samples) == (0.8, None, 20)
        assert dense.stderr == pytest.approx((0.8 * 0.2 / 19) ** 0.5)
        # Wrong are 0, 5, 10, 15 here and 0, 4, 8, 12, 16 there.
        assert (other.value, other.flips) == (0.75, 7 / 20)
        assert [place for place in range(20) if not other.right[place]] == [0, 4, 8, 12, 16]
        assert "right" not in other.to_dict()


def test_on_a_model() -> None:
    model = tiny_model("llama", 2)
    scores = exact_answers({"dense": model, "same": model}, tiny_tokenizer(), count=3)
    assert [score.kind for score in scores["dense"]] == list(KINDS)
    assert all(score.flips == 0.0 for score in scores["same"])


def test_the_longest_answer_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here a token is a character, and an answer may stand behind a blank and before a new line."""

    class Characters:
        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [0] * add_special_tokens + [ord(letter) for letter in text]}

        def decode(self, tokens: Sequence[int], skip_special_tokens: bool) -> str:
            return "".join(map(chr, tokens))

    lengths = []

    def answers(_: Any, prompts: Any, new_tokens: int, *__: Any) -> list[list[int]]:
        lengths.append(new_tokens)
        asked = ["".join(map(chr, prompt[1:])) for prompt in prompts]
        return [[ord(letter) for letter in known[text]][:new_tokens] for text in asked]

    problems = {kind: make_problems(kind, 20) for kind in KINDS}
    known = {item.prompt: f" {item.answer}\n" for items in problems.values() for item in items}
    monkeypatch.setattr(module, "greedy_answers", answers)
    (scores,) = exact_answers({"dense": None}, Characters(), count=20).values()
    assert [score.value for score in scores] == [1.0, 1.0, 1.0]
    longest = [max(len(item.answer) for item in items) for items in problems.values()]
    assert all(2 < new - most < 6 for new, most in zip(lengths, longest, strict=True))


def test_refusals() -> None:
    with pytest.raises(ArgumentError, match="kind out of copying, adding, brackets, got 'magic'"):
        make_problems("magic", 1)
    with pytest.raises(ArgumentError, match="count >= 1"):
        make_problems("adding", 0)
