"""Tokens per second: what is run and in which order, not how fast this machine is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ghosted_fast.errors import ArgumentError
from ghosted_fast.measure import speed
from ghosted_fast.measure.speed import compare_throughput, throughput
from ghosted_fast.testing import tiny_model


def test_throughput_is_the_tokens_over_the_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    timings = iter([(9.0, 9.0), (1.0, 2.0), (2.0, 4.0), (4.0, 8.0)])
    monkeypatch.setattr(speed, "_measure", lambda *_: next(timings))
    result = throughput(tiny_model("llama", 2), 16, 8, batch_size=3, repeats=3)
    assert result.prefill_tokens_per_s == pytest.approx(3 * 16 / 2.0)
    assert result.decode_tokens_per_s == pytest.approx(3 * 8 / 4.0)
    assert result.prefill_p20 < result.prefill_tokens_per_s < result.prefill_p80
    assert result.decode_p20 < result.decode_tokens_per_s < result.decode_p80
    assert result.to_dict()["repeats"] == 3


def test_models_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    models = {name: tiny_model("llama", 2) for name in "abc"}
    order: list[str] = []

    def measure(model: Any, *_: Any) -> tuple[float, float]:
        order.append(next(name for name, other in models.items() if other is model))
        return 1.0, 1.0

    monkeypatch.setattr(speed, "_measure", measure)
    assert list(compare_throughput(models, 4, 4, repeats=3)) == ["a", "b", "c"]
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_decoding_is_greedy_with_a_cache(family: str) -> None:
    """The calls: the whole prompt at once, then one token at a time, each the likeliest."""
    model = tiny_model(family, 2)
    calls: list[torch.Tensor] = []

    def record(_: Any, __: Any, keywords: dict[str, Any]) -> None:
        calls.append(keywords["input_ids"])

    model.register_forward_pre_hook(record, with_kwargs=True)
    model.train()
    result = throughput(model, 10, 6, batch_size=2, repeats=1)
    assert model.training
    assert result.decode_tokens_per_s > 0
    prompt, *steps = calls[-7:]
    assert list(prompt.shape) == [2, 10]
    assert [list(step.shape) for step in steps] == [[2, 1]] * 6
    model.eval()
    generated = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False
    )
    assert torch.equal(torch.cat(steps, 1), generated[:, 10:])


@pytest.mark.parametrize("name", ["prompt_length", "new_tokens", "batch_size", "repeats"])
def test_numbers_below_one(name: str) -> None:
    with pytest.raises(ArgumentError, match=f"expected {name} >= 1, got 0"):
        throughput(tiny_model("llama", 2), **{name: 0})


def test_too_many_positions() -> None:
    with pytest.raises(ArgumentError, match=r"<= 128, the positions of model, got 100 \+ 40"):
        throughput(tiny_model("llama", 2), 100, 40)


def test_no_model() -> None:
    with pytest.raises(ArgumentError, match="expected a model to measure, got none"):
        compare_throughput({})
