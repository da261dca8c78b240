"""The course of a healing: how large its steps are, how often it is judged, and against what."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.healed_models import fitted, healed, text
from torch import Tensor

from ghosted_fast.facts import HealingFacts
from ghosted_fast.improve import healing
from ghosted_fast.improve.exits import Exit
from ghosted_fast.testing import tiny_model
from ghosted_fast.text import folds
from ghosted_fast.text.batches import Batch

PER_STEP = 16 * 24
RATE = 0.02


class Course:
    """What a healing does, with nothing computed in it.

    Attributes:
        sizes: Of the steps, in learning rates.
        seconds: That a step takes; a judgement takes none.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[float] = []
        self.seconds, now, real = 0.0, [0.0], healing.take_step

        def gradients(run: Any, _: Any) -> list[Tensor]:
            now[0] += self.seconds
            return [torch.zeros_like(part) for part in run._trained.parameters]

        def step(run: Any, gradients: Any, size: float, shares: Any) -> None:
            self.sizes.append(size / RATE)
            real(run, gradients, size, shares)

        monkeypatch.setattr(healing._Healing, "_gradients", gradients)
        monkeypatch.setattr(healing._Healing, "_judge", lambda *_: 1.0)
        monkeypatch.setattr(healing, "take_step", step)
        monkeypatch.setattr(healing.time, "perf_counter", lambda: now[0])

    def of(self, **options: Any) -> HealingFacts:
        """Go through a healing of 320 sequences of 24 tokens."""
        dense = tiny_model("llama")
        return healed(fitted(dense), dense, learning_rate=RATE, **options)


def test_steps_rise_stay_and_fall_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    course = Course(monkeypatch)
    facts = course.of()
    assert facts.ended == "tokens"
    falling = [0.926, 0.741, 0.556, 0.370, 0.185]  # (18 - 13) / 18 of the run are left, over 0.3
    assert course.sizes == pytest.approx([1 / 3, 2 / 3, *11 * [1.0], *falling], abs=1e-3)


def test_steps_fall_by_the_minutes_where_these_end_first(monkeypatch: pytest.MonkeyPatch) -> None:
    course = Course(monkeypatch)
    course.seconds = 1.0
    facts = course.of(minutes=0.25)
    assert facts.ended == "time" and facts.tokens == 15 * PER_STEP
    falling = [0.889, 0.667, 0.444, 0.222]  # (15 - 11) / 15 seconds
    assert course.sizes == pytest.approx([1 / 3, 2 / 3, *9 * [1.0], *falling], abs=1e-3)


@pytest.mark.parametrize(
    ("options", "steps", "judged"),
    [
        ({"held_out_tokens": 768}, 18, [9, 18]),  # a quarter of 6912 is 2.25 times 768
        ({"held_out_tokens": 384}, 19, [4, 8, 12, 16, 19]),  # 4.75 times
        ({"held_out_tokens": 144}, 20, list(range(2, 21, 2))),  # 13.08 times, ten at most
        ({"held_out_tokens": 768, "tokens": 1900}, 5, [3, 5]),  # 0.6 times, two at least
    ],
    ids=str,
)
def test_judging_reads_a_quarter_of_what_is_learned_from(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, int], steps: int, judged: list[int]
) -> None:
    course = Course(monkeypatch)
    facts = course.of(**options)
    assert len(course.sizes) == steps
    places = [min(step * PER_STEP, facts.tokens) for step in judged]
    assert [point.tokens for point in facts.curve] == [0, *places]


def padded_text() -> list[dict[str, Tensor]]:
    """Return the text with padding: at the end, at the beginning, and without."""
    batches = []
    for ids in text(20):
        mask = torch.ones_like(ids)
        mask[1::4, 20:] = mask[3::8, :5] = 0
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def held_out_divergence(dense: Any, smaller: Any) -> float:
    """Return the divergence per token over every fourth sequence, up to 600 tokens, in fp64."""
    found, tokens = 0.0, 0
    rows = [
        (ids[None], mask[None])
        for batch in padded_text()
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    for ids, mask in rows[3::4]:
        if tokens < 600:
            with torch.no_grad():
                p, q = (
                    model(ids, attention_mask=mask).logits[mask.bool()].double().log_softmax(-1)
                    for model in (dense, smaller)
                )
            found += float((p.exp() * (p - q)).sum())
            tokens += int(mask.sum())
    return found / tokens


def test_it_is_judged_against_the_dense_model_which_reads_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dense = tiny_model("llama")
    smaller, real = fitted(dense), Exit.states
    read: dict[str, list[Tensor]] = {"dense": [], "smaller": []}

    def states(self: Exit, batch: Batch, gradients: bool = False) -> Tensor:
        read["dense" if self._model is dense else "smaller"].append(batch.input_ids)
        return real(self, batch, gradients)

    monkeypatch.setattr(Exit, "states", states)
    monkeypatch.setattr(folds, "PASS_TOKENS", 200)  # several passes to judge
    before = held_out_divergence(dense, smaller)
    facts = healed(smaller, dense, padded_text(), held_out_tokens=600)
    assert facts.before == pytest.approx(before, rel=1e-4)
    assert facts.after == pytest.approx(held_out_divergence(dense, smaller), rel=1e-4)
    assert facts.after < 0.97 * facts.before
    held_out = read["dense"][:4]
    assert sum(ids.numel() for ids in held_out) >= 600

    def times(name: str, wanted: Tensor) -> int:
        return sum(torch.equal(ids, wanted) for ids in read[name])

    for wanted in held_out:
        assert times("dense", wanted) == 1
        assert times("smaller", wanted) == len(facts.curve)
