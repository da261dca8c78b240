"""Models in GGUF files that stay there: the numbers that transformers loads, layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_gguf import write_gguf_model
from transformers import AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils

import ghosted_fast as gf
from ghosted_fast.errors import CheckpointError, UnsupportedModelError
from ghosted_fast.fit.sweep.shape import Shape
from ghosted_fast.models.loading import load_model
from ghosted_fast.models.unloaded.files import StoredTensor
from ghosted_fast.models.unloaded.gguf_tensors import GgufTensor
from ghosted_fast.models.unloaded.opening import open_unloaded
from ghosted_fast.surgery.cut import prune_model
from ghosted_fast.surgery.folder import FolderCut, prune_folder
from ghosted_fast.testing import random_tokens, relative_rms

pytest.importorskip("gguf")
pytest.importorskip("accelerate")

RUN = gf.RunOptions(corrections=0, score_tokens=64)
TEXT = [random_tokens(4, 64, seed=seed) for seed in range(6)]


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_tensors_are_those_that_transformers_dequantizes(
    tmp_path: Path, kind: str, dtype: torch.dtype | None
) -> None:
    write_gguf_model(tmp_path / "a.gguf", kind=kind)
    model, _ = load_model(tmp_path / "a.gguf", dtype)
    opened = open_unloaded(tmp_path / "a.gguf", dtype)
    assert type(opened.model) is type(model)
    assert opened.model.config.to_dict() == model.config.to_dict()
    assert not opened.missing
    expected = dict(model.named_parameters())
    assert opened.tensors.keys() == expected.keys()
    for name, tensor in opened.tensors.items():
        assert torch.equal(tensor.read(), expected[name]), name
        assert b"".join(map(bytes, tensor.chunks())) == (
            expected[name].detach().view(-1).view(torch.uint8).numpy().tobytes()
        )


def test_no_number_is_read_to_open_it_and_one_layer_at_a_time_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf_model(tmp_path / "a.gguf", 4, "Q8_0")
    read: list[str] = []
    original = GgufTensor.read

    def noted(tensor: GgufTensor) -> torch.Tensor:
        read.append(tensor.name)
        return original(tensor)

    monkeypatch.setattr(GgufTensor, "read", noted)
    opened = open_unloaded(tmp_path / "a.gguf")
    shape = Shape.of(opened)
    assert not read
    plain = sum(t.nbytes for n, t in opened.tensors.items() if ".layers.0." in n)
    assert shape.layer_bytes == plain + 3 * 4 * 64 * 128, "what dequantizing takes is counted"
    gf.ghost_model(opened, TEXT, removed=[1], run=RUN)
    assert sorted({n for n in read if n.startswith("blk.")}) == sorted(
        n for n in read if n.startswith("blk.")
    ), "each is read once"
    assert not any(n.startswith(("blk.2.", "blk.3.")) for n in read)


def test_it_is_swept_like_the_model_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    write_gguf_model(path, 5, "Q8_0")
    mine, report = gf.ghost_model(open_unloaded(path), TEXT, remove=2, run=RUN)
    assert isinstance(mine, FolderCut)
    theirs, expected = gf.ghost_model(load_model(path)[0], TEXT, remove=2, run=RUN)
    assert report.removed == expected.removed
    folder = mine.save(tmp_path / "out")
    states = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    for name, tensor in theirs.state_dict().items():
        assert relative_rms(states[name], tensor) <= 1e-5, name
    assert (
        AutoTokenizer.from_pretrained(folder)("the")["input_ids"]
        == (load_model(path)[1]("the")["input_ids"])
    )
    assert path.exists()


def test_layers_are_cut_out_into_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    write_gguf_model(path, 4)
    folder = prune_folder(path, [1], tmp_path / "out")
    assert [p.name for p in folder.glob("*.gguf")] == []
    found = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    expected = prune_model(load_model(path)[0], [1])
    tokens = random_tokens(2, 12)
    with torch.inference_mode():
        assert torch.equal(found(tokens).logits, expected(tokens).logits)


def test_weights_of_several_tensors_are_left_to_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf_model(tmp_path / "a.gguf")
    original = modeling_gguf_pytorch_utils.get_gguf_hf_weights_map

    def merged(*args: Any, **kwargs: Any) -> dict[str, str]:
        names = original(*args, **kwargs)
        return names | {"blk.1.ffn_gate.weight": "model.layers.1.mlp.up_proj.weight"}

    monkeypatch.setattr(modeling_gguf_pytorch_utils, "get_gguf_hf_weights_map", merged)
    with pytest.raises(UnsupportedModelError, match=r"puts blk.1.ffn_(up|gate).weight together"):
        open_unloaded(tmp_path / "a.gguf")


def test_files_that_end_too_early_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    write_gguf_model(path)
    opened = open_unloaded(path)
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(CheckpointError, match="the file is incomplete"):
        open_unloaded(path)
    last = list(opened.tensors.values())[-1]
    assert isinstance(last, StoredTensor)
    with pytest.raises(CheckpointError, match="the file ends before"):
        last.read()
