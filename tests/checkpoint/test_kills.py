"""A process that is killed while it saves leaves the old folder or the new one, whole."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch
from support.kills import clear_leftovers, logits_of, need_exchange, run_in_child, which
from support.tiny_text import tiny_tokenizer

from ghosted_fast import _atomic_files
from ghosted_fast.checkpoint import save
from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.surgery.cut import remove_layers
from ghosted_fast.testing import tiny_model


def ghosted(removed: list[int]) -> torch.nn.Module:
    ghost = GhostLinear(32, norm_eps=1e-6)
    torch.nn.init.constant_(ghost.weight, 0.01)
    model: torch.nn.Module = remove_layers(tiny_model("llama"), removed, [ghost])
    return model


def test_an_old_folder_is_there_until_the_new_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = save.save_model(ghosted([2]), tmp_path / "model")
    need_exchange(target)

    def rename(*_: object) -> None:
        raise AssertionError("for a moment there was no folder")

    monkeypatch.setattr(Path, "rename", rename)
    save.save_model(ghosted([2, 3]), target, overwrite=True)
    assert load_model_layers(target) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def load_model_layers(folder: Path) -> int:
    from transformers import AutoModelForCausalLM

    return len(AutoModelForCausalLM.from_pretrained(folder).model.layers)


def test_systems_that_cannot_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_atomic_files, "exchange", lambda *_: False)
    target = save.save_model(ghosted([2]), tmp_path / "model")
    save.save_model(ghosted([2, 3]), target, overwrite=True)
    assert load_model_layers(target) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_is_not_there_cannot_be_exchanged(tmp_path: Path) -> None:
    assert not _atomic_files.exchange(tmp_path / "nowhere", tmp_path)


@pytest.mark.slow
def test_kills_while_a_folder_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GHOSTED_FAST_VERIFY", "1")
    models, tokenizer = [ghosted([2]), ghosted([2, 3])], tiny_tokenizer()
    known = [logits_of(save.save_model(model, tmp_path / "known", tokenizer, overwrite=True))
             for model in models]  # fmt: skip
    shutil.rmtree(tmp_path / "known")
    target = save.save_model(models[0], tmp_path / "model", tokenizer)
    need_exchange(target)

    def work() -> None:
        while True:
            for model in models:
                save.save_model(model, target, tokenizer, overwrite=True)

    chance = random.Random(0)
    for _ in range(25):
        run_in_child(work, after=chance.uniform(0.0, 0.2))
        which(target, known)
        clear_leftovers(target, known)
