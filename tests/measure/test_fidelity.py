"""Likeness to the dense model against values that are known, and against greedy decoding itself."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch

from ghosted_fast.errors import ArgumentError, NonFiniteError
from ghosted_fast.measure.fidelity import compare_with_dense
from ghosted_fast.measure.greedy import greedy_answers, padded
from ghosted_fast.surgery.cut import prune_model
from ghosted_fast.testing import random_tokens, tiny_model

NEW = 12
LENGTHS = (5, 9, 2, 7, 1, 12, 3)
TOKEN, PLANTED = 17, 3.0


def prompts() -> list[list[int]]:
    return [random_tokens(1, length, seed)[0].tolist() for seed, length in enumerate(LENGTHS)]


def biased(model: Any, token: int = TOKEN, added: float = PLANTED) -> Any:
    """Return a model that adds a number to one token's logit, wherever that is predicted."""
    planted = copy.deepcopy(model)

    def add(_: object, __: object, logits: torch.Tensor) -> torch.Tensor:
        logits = logits.clone()
        logits[..., token] += added
        return logits

    planted.lm_head.register_forward_hook(add)
    return planted


def one_by_one(dense: Any) -> list[tuple[list[int], np.ndarray]]:
    """Return the dense model's answers and the logits that led to them, without cache or batch."""
    found = []
    for prompt in prompts():
        tokens, rows = list(prompt), []
        for _ in range(NEW):
            with torch.no_grad():
                rows.append(dense(torch.tensor([tokens])).logits[0, -1].double().numpy())
            tokens.append(int(rows[-1].argmax()))
        found.append((tokens[len(prompt) :], np.stack(rows)))
    return found


def test_a_model_follows_itself() -> None:
    model = tiny_model("llama")
    found = compare_with_dense({"dense": model, "same": copy.deepcopy(model)}, prompts(), NEW)
    for item in found.values():
        assert (item.agreement, item.never_parts, item.parts_after) == (1.0, 1.0, None)
        assert item.divergence == 0.0
        assert (item.num_prompts, item.num_tokens) == (len(LENGTHS), NEW * len(LENGTHS))


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_a_planted_bias_gives_what_it_must(batch_size: int) -> None:
    dense = tiny_model("llama")
    found = compare_with_dense(
        {"dense": dense, "biased": biased(dense)}, prompts(), NEW, batch_size
    )
    logits = np.stack([rows for _, rows in one_by_one(dense)])
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p = (p / p.sum(-1, keepdims=True))[..., TOKEN]
    # log q = log p + c [token] - log(1 + p (e^c - 1)), and so KL = log(1 + p (e^c - 1)) - c p.
    divergence = np.log1p(p * math.expm1(PLANTED)) - PLANTED * p
    others = np.delete(logits, TOKEN, axis=-1).max(-1)
    same = (logits[..., TOKEN] > others) | (logits[..., TOKEN] + PLANTED <= others)
    assert 0.3 < same.mean() < 1.0  # the bias flips some, not all
    alike = [NEW if row.all() else int((~row).argmax()) for row in same]
    item = found["biased"]
    assert item.divergence == pytest.approx(divergence.mean(), rel=1e-4)
    assert item.agreement == pytest.approx(same.mean(), abs=1e-12)
    assert item.never_parts == pytest.approx(np.mean([count == NEW for count in alike]))
    median = float(np.median([count if count < NEW else math.inf for count in alike]))
    assert item.parts_after == (None if math.isinf(median) else median)


def test_they_part_where_greedy_decoding_parts() -> None:
    dense = tiny_model("llama")
    smaller = prune_model(dense, [2, 3])
    for prompt in prompts():
        item = compare_with_dense({"dense": dense, "smaller": smaller}, [prompt], NEW)["smaller"]
        written = [greedy_answers(model, [prompt], NEW)[0] for model in (dense, smaller)]
        places = [i for i, (one, other) in enumerate(zip(*written, strict=True)) if one != other]
        assert item.parts_after == (places[0] if places else None)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_batches_and_padding_change_nothing(family: str) -> None:
    dense = tiny_model(family)
    models = {"dense": dense, "smaller": prune_model(dense, [2])}
    alone, *others = (compare_with_dense(models, prompts(), NEW, size) for size in (1, 2, 7))
    for found in others:
        for name, item in found.items():
            assert item.divergence == pytest.approx(alone[name].divergence, rel=1e-4, abs=1e-9)
            assert item.agreement == alone[name].agreement
            assert item.parts_after == alone[name].parts_after
            assert item.never_parts == alone[name].never_parts


def test_answers_are_those_of_a_plain_loop() -> None:
    dense = tiny_model("llama").train()
    answers = greedy_answers(dense, prompts(), NEW, batch_size=3)
    assert dense.training
    assert answers == [answer for answer, _ in one_by_one(dense.eval())]


def test_an_end_of_text_ends_an_answer() -> None:
    dense = tiny_model("llama")
    free = greedy_answers(dense, prompts(), NEW)
    end = free[0][3]
    dense.generation_config.eos_token_id = [end]
    ended = greedy_answers(dense, prompts(), NEW)
    for answer, whole in zip(ended, free, strict=True):
        stop = whole.index(end) + 1 if end in whole else NEW
        assert answer == whole[:stop]
    assert len(ended[0]) <= 4
    found = compare_with_dense({"dense": dense}, prompts(), NEW)["dense"]
    assert found.num_tokens == sum(map(len, ended)) and found.agreement == 1.0


def test_generation_settings_change_nothing() -> None:
    dense = tiny_model("llama")
    plain = greedy_answers(dense, prompts(), NEW)
    dense.generation_config.update(do_sample=True, temperature=2.0, repetition_penalty=1.9)
    assert greedy_answers(dense, prompts(), NEW) == plain


def test_models_of_two_dtypes_are_compared_in_the_wider_one() -> None:
    dense = tiny_model("llama")
    narrow = copy.deepcopy(dense).bfloat16()
    rounded = copy.deepcopy(narrow).float()
    models = {"dense": dense, "narrow": narrow, "rounded": rounded}
    models["double"] = copy.deepcopy(dense).double()
    found = compare_with_dense(models, prompts(), NEW)
    assert 0.0 < found["narrow"].divergence < 1e-2
    assert 0.0 < found["rounded"].divergence < found["narrow"].divergence
    assert found["double"].divergence < 1e-6  # what the operator promises
    backwards = compare_with_dense({"narrow": narrow, "dense": dense}, prompts(), NEW)
    assert 0.0 < backwards["dense"].divergence < 1e-2


def test_padded_rows() -> None:
    before, behind = padded([[5, 6], [7]], before=True), padded([[5, 6], [7]], before=False)
    assert before.input_ids.tolist() == [[5, 6], [0, 7]]
    assert before.attention_mask.tolist() == [[1, 1], [0, 1]]
    assert behind.input_ids.tolist() == [[5, 6], [7, 0]]
    assert behind.attention_mask.tolist() == [[1, 1], [1, 0]]


def test_refusals() -> None:
    dense = tiny_model("llama", 2)
    with pytest.raises(ArgumentError, match="got 1 and 0"):
        compare_with_dense({"dense": dense}, [])
    with pytest.raises(ArgumentError, match="one token at least"):
        compare_with_dense({"dense": dense}, [[1], []])
    with pytest.raises(ArgumentError, match="new_tokens >= 1, got 0"):
        compare_with_dense({"dense": dense}, [[1]], 0)
    other = tiny_model("llama", 2)
    other.resize_token_embeddings(101)
    with pytest.raises(ArgumentError, match="dense: 97, other: 101"):
        compare_with_dense({"dense": dense, "other": other}, [[1]])
    with pytest.raises(NonFiniteError, match="predictions of 'broken'"):
        broken = {"dense": dense, "broken": biased(dense, added=math.nan)}
        compare_with_dense(broken, [[1, 2]], 2)
