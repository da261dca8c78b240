"""Models that stay in their files: what is read of them, what is refused, and the stand-ins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ghosted_fast.errors import CheckpointError, SourceError, UnsupportedModelError
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.models.unloaded.files import (
    HeldTensor,
    StoredTensor,
    tensors_in,
    write_tensors,
)
from ghosted_fast.models.unloaded.opening import open_unloaded
from ghosted_fast.models.unloaded.stand_in import stand_ins
from ghosted_fast.testing import FAMILY_NAMES, random_tokens, tiny_model

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def test_tensors_are_read_as_safetensors_reads_them(folder: Path) -> None:
    expected = load_file(folder / WEIGHTS)
    found = tensors_in(folder / WEIGHTS)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name].read(), tensor)
        assert b"".join(map(bytes, found[name].chunks())) == tensor.numpy().tobytes()


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.int64, torch.int8, torch.bool]
)
def test_tensors_are_written_as_safetensors_reads_them(tmp_path: Path, dtype: Any) -> None:
    tensors = {
        "a": torch.arange(6).view(2, 3).to(dtype),
        "none": torch.zeros(0, 4, dtype=dtype),
        "one": torch.ones((), dtype=dtype),
    }
    write_tensors(tmp_path / "x.safetensors", {n: HeldTensor(t) for n, t in tensors.items()})
    found = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    first = next(iter(tensors_in(tmp_path / "x.safetensors").values()))
    assert first.offset % 64 == 0, "tensors begin at cache lines"


def test_damaged_files_are_refused(folder: Path) -> None:
    path = folder / WEIGHTS
    whole = path.read_bytes()
    for damaged, message in ((whole[:-8], "incomplete"), (b"\xff" * 64, "cannot be read")):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=message):
            open_unloaded(folder)


def test_a_file_that_shrinks_meanwhile_is_noticed(folder: Path) -> None:
    tensor = list(tensors_in(folder / WEIGHTS).values())[-1]
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="the file ends before"):
        tensor.read()
    with pytest.raises(CheckpointError, match="the file ends before"):
        list(tensor.chunks())


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_opened_models_are_those_that_transformers_loads(tmp_path: Path, family: str) -> None:
    tiny_model(family, dtype=torch.bfloat16).save_pretrained(tmp_path, max_shard_size="40KB")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    opened = open_unloaded(tmp_path)
    assert type(opened.model) is type(loaded)
    assert opened.model.config.to_dict() == loaded.config.to_dict()
    mine, theirs = opened.model.state_dict(), loaded.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert (tensor.is_meta, tensor.shape) == (True, theirs[name].shape), name
        assert tensor.dtype == theirs[name].dtype, name
    for (name, buffer), (_, expected) in zip(
        opened.model.named_buffers(), loaded.named_buffers(), strict=True
    ):
        assert buffer.is_meta or torch.equal(buffer, expected), name
    assert sorted(opened.by_layer, key=str) == [0, 1, 2, 3, 4, 5, None]
    assert opened.nbytes == sum(item.nbytes for item in opened.tensors.values())


def test_what_cannot_be_opened_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no folder or file"):
        open_unloaded(tmp_path / "nowhere")
    tensors = load_file(folder / WEIGHTS)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"which lack model\.layers\.2\.mlp\.up_proj\.weight"):
        open_unloaded(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(SourceError, match=r"no file named model\.safetensors, or pytorch_model"):
        open_unloaded(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="expected unquantized weights"):
        open_unloaded(folder)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"got one whose beginning is damaged"):
        open_unloaded(tmp_path / "m.gguf")


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_stand_ins_are_the_same_each_time_and_are_taken_back(tmp_path: Path, family: str) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    model, tokens = open_unloaded(tmp_path).model, random_tokens(2, 8)
    most = 0

    def count(*_: Any) -> None:
        nonlocal most
        with_weights = [
            layer for layer in Decoder.of(model).layers if not next(layer.parameters()).is_meta
        ]
        most = max(most, len(with_weights))

    with torch.inference_mode(), stand_ins(model):
        for layer in Decoder.of(model).layers:
            layer.register_forward_hook(count)
        first, second = (model(tokens, use_cache=False).logits for _ in range(2))
    assert torch.equal(first, second)
    assert first.std() > 0.1
    assert most == 1, "one layer has weights at a time"
    assert all(parameter.is_meta for parameter in model.parameters())


def test_stand_ins_read_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_unloaded(folder)

    def refuse(_: Any) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(StoredTensor, "read", refuse)
    with torch.inference_mode(), stand_ins(opened.model):
        opened.model(random_tokens(1, 4), use_cache=False)
