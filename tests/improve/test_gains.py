"""What corrections are worth on text that none of them saw, from little text to learn from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ghosted_fast.improve import correction
from ghosted_fast.improve.correction import correct_ghosts
from ghosted_fast.measure.paired import Difference, paired_difference
from ghosted_fast.options import RunOptions
from ghosted_fast.pipeline import ghost_model
from ghosted_fast.testing import VOCABULARY_SIZE, random_tokens, tiny_model
from ghosted_fast.text.batches import iterate_batches

LENGTH = 24


def written_by(model: Any, rows: int, seed: int) -> Tensor:
    """Return text that the model finds likely, drawn from it."""
    generator = torch.Generator().manual_seed(seed)
    text = random_tokens(rows, LENGTH, seed)
    with torch.no_grad():
        for position in range(4, LENGTH):
            odds = (4.0 * model(text[:, :position]).logits[:, -1]).softmax(-1)
            text[:, position] = torch.multinomial(odds, 1, generator=generator)[:, 0]
    return text


def texts(model: Any, seed: int, rows: int) -> dict[str, Tensor]:
    """Return texts of three kinds, two of which are unlike what ghosts are calibrated on."""
    few = random_tokens(rows, LENGTH, seed) % 5 + VOCABULARY_SIZE // 2
    return {
        "random": random_tokens(rows, LENGTH, seed),
        "written": written_by(model, rows, seed),
        "of five words": few,
    }


def divergences(smaller: Any, dense: Any, text: Tensor) -> list[float]:
    """Return KL(dense || smaller) of each row, nats per token."""
    with torch.no_grad():
        p, q = (model(text).logits.double().log_softmax(-1) for model in (dense, smaller))
    return (p.exp() * (p - q)).sum(-1).mean(-1).tolist()


def gains(dense: Any, rows: int, corrections: Any) -> dict[str, Difference]:
    """Return, by text, the divergence with corrections less that without."""
    calibration = [random_tokens(rows, LENGTH)]
    smaller, _ = ghost_model(dense, calibration, removed=[2, 3], run=RunOptions(corrections=0))
    fresh = texts(dense, 90, 48)
    before = {name: divergences(smaller, dense, text) for name, text in fresh.items()}
    correct_ghosts(smaller, dense, list(iterate_batches(calibration)), corrections)
    after = {name: divergences(smaller, dense, text) for name, text in fresh.items()}
    return {name: paired_difference([after[name]], [before[name]]) for name in fresh}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize(
    ("rows", "corrections"),
    [
        (24, 1),  # 576 tokens, for ghosts of 32 inputs: as few per input as 10k for SmolLM2
        (48, 3),
        (344, "auto"),  # 8256 tokens, of which just enough are held out
    ],
)
def test_no_text_loses_more_than_its_interval(family: str, rows: int, corrections: Any) -> None:
    found = gains(tiny_model(family), rows, corrections)
    for name, difference in found.items():
        assert difference.low <= 0.0, (name, difference)
    # Of the kind that they learned from there is something to win.
    assert found["random"].value < 0.0


@pytest.mark.slow
def test_steps_that_are_not_judged_lose(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above would see it: without the judge, steps of any length are taken."""
    monkeypatch.setattr(correction, "_combined", lambda amounts, trials: [
        -20.0 * part for part in trials[0]
    ])  # fmt: skip
    monkeypatch.setattr(correction, "_KNOWN_TO", -torch.inf)
    found = gains(tiny_model("llama"), 48, 3)
    assert min(difference.low for difference in found.values()) > 0.0


@pytest.mark.parametrize("rows", [16, 84, 340])
def test_too_little_text_to_judge_by_changes_not_a_bit(rows: int) -> None:
    dense, calibration = tiny_model("llama"), [random_tokens(rows, LENGTH)]
    plain, found = (
        ghost_model(dense, calibration, removed=[2, 3], run=RunOptions(corrections=corrections))
        for corrections in (0, "auto")
    )
    assert found[1].corrections == []
    for mine, theirs in zip(plain[0].parameters(), found[0].parameters(), strict=True):
        assert torch.equal(mine, theirs)
