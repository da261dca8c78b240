"""Text that a model writes itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiny_text import tiny_tokenizer
from transformers import LlamaForCausalLM

from ghosted_fast.errors import ArgumentError
from ghosted_fast.testing import tiny_model
from ghosted_fast.text.generation import generate_texts
from ghosted_fast.text.loading import token_batches


def words_of(texts: list[str]) -> list[list[int]]:
    return [tiny_tokenizer()(text)["input_ids"] for text in texts]


def test_texts_suffice_and_repeat() -> None:
    model, tokenizer = tiny_model("llama", 2), tiny_tokenizer()
    before = torch.random.get_rng_state()
    texts = list(generate_texts(model, tokenizer, 200, sequence_length=24, batch_size=3, seed=5))
    assert torch.equal(before, torch.random.get_rng_state())
    assert texts == list(generate_texts(model, tokenizer, 200, 24, 3, seed=5))
    assert texts != list(generate_texts(model, tokenizer, 200, 24, 3, seed=6))
    assert len(token_batches(tokenizer, texts, 200, sequence_length=20)[0]) >= 8


@pytest.mark.slow
@pytest.mark.parametrize("with_bos", [False, True])
def test_tokens_are_drawn_from_the_models_distribution(
    monkeypatch: pytest.MonkeyPatch, with_bos: bool
) -> None:
    """Force known logits for the second of two words; count how often each word follows."""
    model, tokenizer = tiny_model("llama", 2), tiny_tokenizer(adds_bos=with_bos)
    forward = LlamaForCausalLM.forward
    wanted = torch.full((len(tokenizer),), -torch.inf)
    wanted[5], wanted[9] = 0.0, 1.0
    seen = []

    def biased(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["input_ids"])
        output = forward(self, *args, **kwargs)
        output.logits = wanted.expand(len(output.logits), 1, -1)
        return output

    monkeypatch.setattr(type(model), "forward", biased)
    length = 3 if with_bos else 2
    texts = generate_texts(model, tokenizer, 8000, length, 4000, temperatures=(1.0, 0.5))
    rows = words_of(list(texts))[:4000]
    assert seen[0].shape == (4000, length - 1)
    assert (seen[0][:, 0] == 1).all() == with_bos
    assert len({row[0] for row in rows}) > 20
    assert 1 not in {row[0] for row in rows}
    for start, odds in ((0, 1.0), (1, 2.0)):
        share = sum(row[-1] == 9 for row in rows[start::2]) / 2000
        assert share == pytest.approx(1 / (1 + 2.718281828**-odds), abs=0.04)
        assert {row[-1] for row in rows[start::2]} == {5, 9}


def test_bad_numbers() -> None:
    model, tokenizer = tiny_model("llama", 2), tiny_tokenizer()
    for temperatures in ((), (1.0, 0.0)):
        with pytest.raises(ArgumentError, match="expected temperatures above 0, got"):
            list(generate_texts(model, tokenizer, 10, temperatures=temperatures))
    with pytest.raises(ArgumentError, match="sequence_length >= 2, got 1"):
        list(generate_texts(model, tokenizer, 10, sequence_length=1))
