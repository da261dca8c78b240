"""Healing kept apart: a PEFT adapter that brings the healed predictions, and is taken off again."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import rank_programs
from support.healed_models import fitted, healed, same, visible, weights
from support.quantized_models import wide_llama
from support.started_ranks import run_ranks
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from ghosted_fast.checkpoint.save import save_model
from ghosted_fast.errors import ArgumentError, MissingExtraError
from ghosted_fast.improve import healing
from ghosted_fast.improve.gradients import kernels_with_gradients
from ghosted_fast.models.structure import share_copy
from ghosted_fast.testing import random_tokens, relative_rms, tiny_model

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.slow


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(random_tokens(2, 12, 77)).logits


def divergence(model: Any, dense: Any, batches: Any) -> float:
    """Return the mean KL(dense || model), nats, from whole logits."""
    total = 0.0
    with torch.no_grad():
        for batch in batches:
            p, q = (m(batch).logits.double().log_softmax(-1) for m in (dense, model))
            total += float((p.exp() * (p - q)).sum(-1).mean()) / len(batches)
    return total


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adapter_brings_what_was_trained_and_leaves_the_model(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = visible(tiny_model(family))
    smaller = fitted(dense, removed=(1, 3))
    before, plain, folder = weights(smaller), share_copy(smaller), tmp_path / "adapter"
    trained: list[Any] = []
    real = healing.save_adapter
    monkeypatch.setattr(
        healing, "save_adapter", lambda m, t, *rest: (trained.append(t), real(m, t, *rest))
    )
    facts = healed(smaller, dense, adapter=folder)
    assert facts.after < 0.98 * facts.before and facts.ghosts == 2
    assert same(before, weights(smaller)) and torch.equal(logits(smaller), logits(plain))
    with trained[0].applied():
        wanted = logits(smaller)
    adapted = peft.PeftModel.from_pretrained(smaller, folder).eval()
    assert relative_rms(logits(adapted), wanted) < 1e-5
    assert relative_rms(wanted, logits(plain)) > 1e-3
    with adapted.disable_adapter():
        assert relative_rms(logits(adapted), logits(plain)) < 1e-6
    assert relative_rms(logits(adapted.merge_and_unload()), wanted) < 1e-5
    said = (folder / "README.md").read_text()
    assert f"trained on {facts.tokens:,} tokens" in said and "held-out divergence" in said
    assert [item.name for item in tmp_path.iterdir()] == ["adapter"]


def test_ghosts_have_factors_of_their_own(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    dense = tiny_model("llama")
    facts = healed(fitted(dense), dense, adapter=tmp_path / "adapter")
    (file,) = (tmp_path / "adapter").glob("*.safetensors")
    tensors = load_file(file)
    assert sum(value.numel() for value in tensors.values()) == facts.trained_parameters
    of_ghosts = [value for name, value in tensors.items() if "ghost" in name]
    assert len(of_ghosts) == 2 and all(bool(value.any()) for value in of_ghosts)


def test_base_in_four_bits(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    save_model(wide_llama(), tmp_path / "dense")
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    dense = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=four, dtype=torch.float32
    ).eval()
    smaller = fitted(dense)
    texts = [random_tokens(8, 24, seed) for seed in range(100, 104)]
    with kernels_with_gradients(smaller, dense):  # the others round more than healing brings here
        before, without = logits(smaller), divergence(smaller, dense, texts)
        facts = healed(smaller, dense, adapter=tmp_path / "adapter", learning_rate=2e-3)
        assert facts.after < 0.99 * facts.before and facts.maps > 0
        assert torch.equal(logits(smaller), before)
        adapted = peft.PeftModel.from_pretrained(smaller, tmp_path / "adapter").eval()
        assert divergence(adapted, dense, texts) < without


def test_what_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*_: Any, **__: Any) -> None:
        raise AssertionError("work was done")

    monkeypatch.setattr(healing.Exit, "states", work)
    dense = tiny_model("llama")
    smaller = fitted(dense)
    with pytest.raises(ArgumentError, match="rank > 0 for an adapter, got 0"):
        healed(smaller, dense, adapter=tmp_path / "adapter", rank=0)
    there = tmp_path / "there"
    there.mkdir()
    (there / "notes.txt").touch()
    with pytest.raises(ArgumentError, match="exists: choose another"):
        healed(smaller, dense, adapter=there)
    with pytest.raises(ArgumentError, match="an adapter's folder to replace"):
        healed(smaller, dense, adapter=there, overwrite=True)
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'ghosted_fast\[peft\]'"):
        healed(smaller, dense, adapter=tmp_path / "adapter")


def test_an_adapter_of_sharded_weights_is_that_of_whole_ones(tmp_path: Path) -> None:
    for shard in (False, True):
        folder = tmp_path / str(shard)
        folder.mkdir()
        program = rank_programs.sharded_healing
        run_ranks(program, 2, folder, "llama", folder, shard, True)
    one, other = (
        load_file(tmp_path / str(shard) / "adapter" / "adapter_model.safetensors")
        for shard in (False, True)
    )
    assert one.keys() == other.keys() and one
    assert all(torch.equal(other[name], value) for name, value in one.items())
