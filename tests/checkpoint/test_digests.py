"""Flipped bits, other dtypes and impossible values in ghosted folders are found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.flipped_bits import flip
from transformers import AutoModelForCausalLM

from ghosted_fast.checkpoint import digests
from ghosted_fast.checkpoint.save import save_model
from ghosted_fast.errors import CheckpointError
from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.surgery.cut import remove_layers
from ghosted_fast.testing import tiny_model

GHOST = "model.layers.1.ghost"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    ghost = GhostLinear(32, bias=True, norm_eps=1e-6)
    torch.nn.init.constant_(ghost.weight, 0.01)
    model = remove_layers(tiny_model("llama"), [2, 3], [ghost.quantize("int8")])
    return save_model(model, tmp_path / "model")


def change(folder: Path, name: str, how: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Edit a tensor, and the digests with it."""
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = how(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    digests.write_digests(folder)


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def test_a_bit_of_a_ghost_is_always_found(folder: Path) -> None:
    load(folder)
    flip(folder, f"{GHOST}.weight")
    with pytest.raises(CheckpointError, match=rf"expected the bytes of {GHOST}.weight in .*, got"):
        load(folder)


def test_any_bit_is_found_where_it_is_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(folder, "model.layers.0.mlp.up_proj.weight")
    load(folder)
    monkeypatch.setenv("GHOSTED_FAST_VERIFY", "1")
    with pytest.raises(CheckpointError, match=r"expected the bytes of model.layers.0.mlp.up_proj"):
        load(folder)


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_digests_that_are_gone(folder: Path, content: str | None) -> None:
    path = folder / digests.DIGESTS
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(CheckpointError, match=r"expected the digests of the weights in .*, got"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "how", "message"),
    [
        ("scale", lambda x: x.double(), "in F32, got F64"),
        ("scale", lambda x: x * float("nan"), "above 0 in the scale of .*, got nan"),
        ("scale", lambda x: -x, "above 0 in the scale of .*, got -"),
        ("bias", lambda x: x / 0 + float("inf"), "finite numbers in the bias of .*, got"),
        ("bias", lambda x: x.long(), "in F32 or F16 or BF16, got I64"),
        ("weight", lambda x: x.to(torch.uint8), "or I8, got U8"),
    ],
)
def test_values_that_no_ghost_has(
    folder: Path, name: str, how: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    change(folder, f"{GHOST}.{name}", how)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [("norm_eps", 0.0), ("norm_eps", -1e-6), ("norm_eps", 1.0), ("norm_eps", True),
     ("bias", 1), ("first_state", None), ("layer", True), ("layer", 9)],
)  # fmt: skip
def test_records_that_no_ghost_has(folder: Path, key: str, value: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["ghost"]["ghosts"][0][key] = value
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="does not fit a llama model of 4 layers"):
        load(folder)


def test_another_family(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"ghosted_llama"', '"ghosted_mistral"'))
    with pytest.raises(CheckpointError, match="does not fit a mistral model"):
        load(folder)


def test_folders_that_were_saved_before_there_were_digests(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["ghost"]["digests"], config["ghost"]["family"]
    path.write_text(json.dumps(config))
    (folder / digests.DIGESTS).unlink()
    load(folder)
    monkeypatch.setenv("GHOSTED_FAST_VERIFY", "1")
    with pytest.raises(CheckpointError, match=r"got a folder that was saved without: load it and"):
        load(folder)
