"""The whole way on a GPU, by tests that also run on the processor."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_text import TEXT, save_tiny_model
from typer.testing import CliRunner

from ghosted_fast.cli.app import app
from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.options import RunOptions
from ghosted_fast.pipeline import ghost_model
from ghosted_fast.testing import random_tokens, relative_rms, tiny_model

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("device", DEVICES)]


def tokens(count: int = 12) -> list[torch.Tensor]:
    return [random_tokens(8, 24, seed) for seed in range(count)]


def ghost_of(model: Any) -> GhostLinear:
    (ghost,) = (module for module in model.modules() if isinstance(module, GhostLinear))
    return ghost


def test_a_ghost_is_that_of_the_processor(device: str) -> None:
    """In fp32, whose rounding the solve amplifies; the text is given on the processor."""
    model, run = tiny_model("llama"), RunOptions(corrections=0)
    usual, _ = ghost_model(model, tokens(), removed=[2, 3], run=run)
    there, report = ghost_model(copy.deepcopy(model).to(device), tokens(), removed=[2, 3], run=run)
    ghost = ghost_of(there)
    assert ghost.weight.device.type == device and 0.0 < report.ghosts[0].fit_error < 1.0
    assert relative_rms(ghost.weight.cpu(), ghost_of(usual).weight) <= 1e-2
    ids = random_tokens(2, 24, 99)
    with torch.no_grad():
        logits = there(ids.to(device)).logits.cpu()
        assert relative_rms(logits, usual(ids).logits) <= 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_are_chosen_and_a_ghost_is_corrected(device: str, dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype=dtype).to(device)
    smaller, report = ghost_model(model, tokens(40), 2, run=RunOptions(corrections=1))
    assert len(report.removed) == 2
    (correction,) = report.corrections
    assert correction.accepted and correction.after < correction.before
    assert ghost_of(smaller).weight.dtype == dtype
    assert bool(smaller(random_tokens(2, 24, 99).to(device)).logits.isfinite().all())


def test_generation_with_a_cache_gives_what_the_whole_text_gives(device: str) -> None:
    model = tiny_model("llama").to(device)
    run = RunOptions(corrections=0)
    smaller, _ = ghost_model(model, tokens(), removed=[2, 3], run=run)
    ids = random_tokens(2, 9, 99).to(device)
    written = smaller.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    for length in range(ids.shape[1], written.shape[1]):
        with torch.no_grad():
            logits = smaller(written[:, :length], use_cache=False).logits
        assert torch.equal(logits[:, -1].argmax(-1), written[:, length])


def test_the_command_line_fits_there(device: str, tmp_path: Path) -> None:
    model, text = save_tiny_model(tmp_path / "model"), tmp_path / "text.txt"
    text.write_text("\n".join([TEXT] * 60))
    arguments = ["fit", "--model", model, "--calibration", text, "--removed", "2-3", "--json"]
    arguments += ["--output", tmp_path / "ghosted", "--device", device, "--tokens", "512"]
    words = [str(word) for word in (*arguments, "--sequence-length", 32)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["removed"] == [2, 3]
