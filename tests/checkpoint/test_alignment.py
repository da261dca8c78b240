"""Saved weights start at cache lines, and are what they were."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.dense_reference import random_ghost
from transformers import AutoModelForCausalLM

from ghosted_fast.checkpoint.alignment import align_weights
from ghosted_fast.checkpoint.save import save_model
from ghosted_fast.surgery.cut import prune_model, remove_layers
from ghosted_fast.testing import tiny_model


def data_start(path: Path) -> int:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
    return 8 + int(length)


@pytest.mark.parametrize("filler", range(0, 64, 8))
def test_files_of_every_header_length(tmp_path: Path, filler: int) -> None:
    path = tmp_path / "model-00001-of-00002.safetensors"
    tensors = {"a": torch.randn(32, 32), "b": torch.randn(3, 16).bfloat16()}
    save_file(tensors, path, {"format": "pt", "filler": "x" * filler})
    path.chmod(0o640)
    before = data_start(path)
    align_weights(tmp_path)
    assert data_start(path) % 64 == 0 and data_start(path) - before < 64
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "filler": "x" * filler}
    assert path.stat().st_mode & 0o777 == 0o640
    assert [item.name for item in tmp_path.iterdir()] == [path.name]
    untouched = path.stat().st_mtime_ns, path.stat().st_ino
    align_weights(tmp_path)
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == untouched


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.safetensors" for name in ("adapter_model", "model_backup")]
    for path in paths:
        save_file({"a": torch.ones(4)}, path, {"format": "pt"})
        assert data_start(path) % 64
    before = [path.read_bytes() for path in paths]
    align_weights(tmp_path)
    assert [path.read_bytes() for path in paths] == before


def test_failure_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(4)}, path, {"format": "pt"})
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("ghosted_fast.checkpoint.alignment.shutil.copyfileobj", full)
    with pytest.raises(OSError, match="no space left"):
        align_weights(tmp_path)
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("way", ["save_model", "save_pretrained"])
def test_saved_models_are_aligned(tmp_path: Path, way: str) -> None:
    starts = set()
    for count in range(1, 5):  # headers of several lengths
        folder, removed = tmp_path / str(count), list(range(1, 1 + count))
        if way == "save_model":
            save_model(prune_model(tiny_model("llama"), removed), folder)
        else:
            remove_layers(tiny_model("llama"), removed, [random_ghost(count)]).save_pretrained(
                folder
            )
        starts.add(data_start(folder / "model.safetensors"))
        AutoModelForCausalLM.from_pretrained(folder)
    assert len(starts) > 1 and not any(start % 64 for start in starts)
