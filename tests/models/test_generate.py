"""Greedy tokens of pruned and ghosted models, however they are generated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.dense_reference import INTERVALS, NUM_LAYERS, REMOVED, expected_tokens, random_ghosts
from torch import Tensor

from ghosted_fast.surgery.cut import prune_model, remove_layers
from ghosted_fast.testing import FAMILY_NAMES, random_tokens, tiny_model

# Prompt and continuation together are longer than the sliding windows of 16 tokens.
PROMPT_LENGTHS = (12, 7)
NEW_TOKENS = 8
CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "none": {"use_cache": False},
}


def left_padded(prompts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return prompts [1, T_i] as a batch [B, max T_i] and its mask."""
    length = max(prompt.shape[1] for prompt in prompts)
    tokens = torch.zeros(len(prompts), length, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, length - prompt.shape[1] :] = prompt[0]
        mask[row, length - prompt.shape[1] :] = 1
    return tokens, mask


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ghosted", "naive"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_greedy_tokens_are_those_of_the_reference(family: str, kind: str) -> None:
    dense = tiny_model(family, NUM_LAYERS)
    ghosts: list[Any] = random_ghosts() if kind == "ghosted" else [None] * len(INTERVALS)
    prompts = [random_tokens(1, length, seed=length) for length in PROMPT_LENGTHS]
    expected = [
        expected_tokens(dense, prompt, INTERVALS, ghosts, NEW_TOKENS)[0, prompt.shape[1] :]
        for prompt in prompts
    ]
    model = (
        remove_layers(dense, REMOVED, ghosts) if kind == "ghosted" else prune_model(dense, REMOVED)
    )
    options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    tokens, mask = left_padded(prompts)
    for name, cache in CACHES.items():
        alone = [
            model.generate(prompt, **options, **cache)[0, prompt.shape[1] :] for prompt in prompts
        ]
        batch = model.generate(tokens, attention_mask=mask, **options, **cache)
        batch = batch[:, tokens.shape[1] :]
        for row, answer in enumerate(expected):
            assert torch.equal(alone[row], answer), f"{name} cache, prompt {row} alone"
            assert torch.equal(batch[row], answer), f"{name} cache, prompt {row} in a batch"
