"""Models as people have them: wrapped, offloaded, cast, pruned by hand, ghosted before."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import ghosted_fast as gf
from ghosted_fast.errors import (
    CheckpointError,
    ForeignError,
    GhostedFastError,
    NonFiniteError,
    SourceError,
    UnsupportedModelError,
)
from ghosted_fast.testing import random_tokens, tiny_config, tiny_model

TEXT = [random_tokens(4, 32, seed=i) for i in range(8)]
PLAIN = gf.RunOptions(corrections=0)


def on_meta() -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config("llama"))


def offloaded() -> Any:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.cpu_offload(tiny_model("llama"), execution_device=torch.device("cpu"))


def adapted() -> Any:
    model = tiny_model("llama")
    model._hf_peft_config_loaded = True
    return model


def wrapped_by_peft() -> Any:
    kind = type("PeftModelForCausalLM", (nn.Module,), {"__module__": "peft.peft_model"})
    return kind()


def shortened() -> Any:
    model = tiny_model("llama")
    del model.model.layers[2]
    return model


def overflowing() -> Any:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e6)
    return model.half()


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (on_meta, UnsupportedModelError, "on the meta device: load the model with from_pretr"),
        (offloaded, UnsupportedModelError, "by accelerate, and nothing says which files .*: load"),
        (adapted, UnsupportedModelError, "with some: merge them first .*merge_and_unload"),
        (wrapped_by_peft, UnsupportedModelError, "got PeftModelForCausalLM .*merge_and_unload"),
        (lambda: torch.compile(tiny_model("llama")), UnsupportedModelError, "_orig_mod"),
        (lambda: nn.DataParallel(tiny_model("llama")), TypeError, "pass model.module"),
        (shortened, UnsupportedModelError, r"expected config.num_hidden_layers = 5, .* got 6"),
        (overflowing, NonFiniteError, "infinity in float16: load it in bfloat16"),
    ],
)
def test_what_cannot_be_worked_on_says_how_it_can(
    make: Callable[[], Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        gf.ghost_model(make(), TEXT, removed=[2, 3], run=PLAIN)


def test_a_ghosted_model_gets_another_gap(tmp_path: Path) -> None:
    first, _ = gf.ghost_model(tiny_model("llama"), TEXT, removed=[4], run=PLAIN)
    second, _ = gf.ghost_model(first, TEXT, removed=[1], run=PLAIN)
    assert second.config.ghost["removed"] == [1, 4]
    gf.save_model(second, tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokens = random_tokens(1, 8)
    assert torch.equal(again(tokens).logits, second(tokens).logits)


def test_generation_settings_that_cannot_be_saved_are_repaired(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("llama", 2)
    model.generation_config.temperature, model.generation_config.do_sample = 0.5, False
    model.generation_config.eos_token_id = 3
    with caplog.at_level(logging.WARNING, "ghosted_fast"):
        gf.save_model(model, tmp_path / "model")
    assert "only its special tokens are kept" in caplog.text
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert again.generation_config.eos_token_id == 3


def test_ghosts_that_a_configuration_hides_are_not_left_out(tmp_path: Path) -> None:
    smaller, _ = gf.ghost_model(tiny_model("llama"), TEXT, removed=[4], run=PLAIN)
    path = gf.save_model(smaller, tmp_path / "model") / "config.json"
    path.write_text(path.read_text().replace('"ghosted_llama"', '"llama"'))
    with pytest.raises(CheckpointError, match=r"begins with ghosted_ .* got 'llama'"):
        gf.load_model(tmp_path / "model")


def test_foreign_errors_become_ours() -> None:
    with pytest.raises(
        ForeignError, match=r"got IndexError: .*cut the text into shorter"
    ) as caught:
        gf.perplexity(tiny_model("opt"), [random_tokens(1, 400)])
    assert isinstance(caught.value.__cause__, IndexError)
    assert isinstance(caught.value, GhostedFastError) and isinstance(caught.value, RuntimeError)
    with pytest.raises(TypeError, match=r"unexpected keyword"):
        gf.perplexity(tiny_model("opt"), [], nonsense=1)
    with pytest.raises(TypeError, match=r"expected a transformers model"):
        gf.ghost_model(7, TEXT, remove=1)
    with pytest.raises(SourceError, match=r"there is no folder or file 'a name'"):
        gf.ghost_model("a name", TEXT, remove=1)
