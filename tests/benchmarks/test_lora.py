"""LoRA on the text, the rival of healing: it learns the text, and leaves the dense model alone."""

from __future__ import annotations

import pytest
import torch
from support.benchmark_module import load_benchmark

from ghosted_fast.measure.perplexity import perplexity
from ghosted_fast.models.structure import share_copy
from ghosted_fast.surgery.cut import prune_model
from ghosted_fast.testing import random_tokens, tiny_model


def test_the_text_is_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    lora = load_benchmark("_lora", monkeypatch)
    monkeypatch.setattr(lora, "_PER_STEP", 64)
    dense = tiny_model("llama")
    kept = {name: value.clone() for name, value in dense.state_dict().items()}
    pruned = prune_model(dense, [2, 3])
    # The next token follows from the one before it.
    batches = [(random_tokens(8, 1, seed=seed) + torch.arange(32)) % 97 for seed in range(8)]
    before = perplexity(pruned, batches).value
    found = {}
    for tokens in (1024, 2000):
        model = share_copy(pruned)
        assert lora.train_on_text(model, batches, tokens, 4, 1e-2) == tokens // 32 * 32
        found[tokens] = perplexity(model, batches).value
    assert found[2000] < found[1024] < 0.9 * before
    assert perplexity(pruned, batches).value == before
    assert all(torch.equal(value, kept[name]) for name, value in dense.state_dict().items())
