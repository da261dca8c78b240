"""Models that accelerate has offloaded: swept from their files, or refused before any work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.swept_models import as_pickles, saved, text
from transformers import AutoModelForCausalLM

import ghosted_fast as gf
from ghosted_fast.errors import ArgumentError, UnsupportedModelError
from ghosted_fast.models.unloaded import offloaded
from ghosted_fast.models.unloaded.opening import Unloaded
from ghosted_fast.surgery.folder import FolderCut
from ghosted_fast.testing import random_tokens, relative_rms, tiny_model

pytest.importorskip("accelerate")

RUN = gf.RunOptions(corrections=0, score_tokens=64)
PLACES = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu"}
PLACES |= {"lm_head": "cpu", **{f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(6)}}


def with_layers_on_disk(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(
        folder, device_map=dict(PLACES), offload_folder=folder.parent / "offload"
    )
    assert model.model.layers[1].self_attn.q_proj.weight.is_meta
    return model


@pytest.mark.parametrize("pickles", [False, True])
def test_what_is_on_disk_is_swept_from_its_files(
    tmp_path: Path, pickles: bool, caplog: pytest.LogCaptureFixture
) -> None:
    dense = saved(tmp_path / "dense", "llama")
    if pickles:
        as_pickles(tmp_path / "dense")
    model = with_layers_on_disk(tmp_path / "dense")
    smaller, report = gf.ghost_model(model, text(), remove=2, run=RUN)
    assert "is offloaded: it stays in its files, and is swept through" in caplog.text
    assert isinstance(smaller, FolderCut)
    expected, theirs = gf.ghost_model(dense, text(), remove=2, run=RUN)
    assert report.removed == theirs.removed
    smaller.save(tmp_path / "out")
    mine = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in expected.state_dict().items():
        assert relative_rms(mine[name], tensor) <= 1e-5, name


def gone(folder: Path, _: Any) -> None:
    shutil.rmtree(folder)


def another(folder: Path, _: Any) -> None:
    model = tiny_model("llama", seed=1)
    model.save_pretrained(folder)
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)


def of_another_shape(folder: Path, _: Any) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    tiny_model("llama", 5).save_pretrained(folder)


def of_another_class(folder: Path, _: Any) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    tiny_model("qwen2").save_pretrained(folder)


def lacking(folder: Path, _: Any) -> None:
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    lost = sorted(set(values["weight_map"].values()))[2]
    values["weight_map"] = {k: v for k, v in values["weight_map"].items() if v != lost}
    index.write_text(json.dumps(values))


def trained(_: Path, model: Any) -> None:
    with torch.no_grad():
        model.model.norm.weight[5] += 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (gone, "by accelerate, and .*there is no folder or file .*: load the model without"),
        (another, "has other numbers in model.embed_tokens.weight: load"),
        (of_another_shape, "has no such model.layers.5"),
        (of_another_class, "holds a Qwen2ForCausalLM: load"),
        (lacking, "which lack model.layers"),
        (trained, "has other numbers in model.norm.weight"),
    ],
)
def test_what_no_files_hold_is_refused_before_any_work(
    tmp_path: Path, change: Callable[[Path, Any], None], message: str
) -> None:
    saved(tmp_path / "dense", "llama")
    model = with_layers_on_disk(tmp_path / "dense")
    change(tmp_path / "dense", model)

    def batches() -> Any:
        raise AssertionError("the text was read")
        yield

    with pytest.raises(UnsupportedModelError, match=message):
        gf.ghost_model(model, batches(), remove=2, run=RUN)


def test_numbers_beside_weights_of_several_tensors_are_compared_too(tmp_path: Path) -> None:
    saved(tmp_path / "dense", "mixtral")
    model = with_layers_on_disk(tmp_path / "dense")
    assert isinstance(offloaded.in_files_if_offloaded(model), Unloaded)
    trained(tmp_path, model)
    with pytest.raises(UnsupportedModelError, match=r"other numbers in model\.norm\.weight"):
        offloaded.in_files_if_offloaded(model)


def test_numbers_of_other_strides_are_compared_too(tmp_path: Path) -> None:
    dense = saved(tmp_path / "dense", "llama")
    for path in (tmp_path / "dense").glob("model*"):
        path.unlink()
    tensors = dense.state_dict()
    tensors["lm_head.weight"] = tensors["lm_head.weight"].t().contiguous().t()
    torch.save(tensors, tmp_path / "dense" / "pytorch_model.bin")
    model = with_layers_on_disk(tmp_path / "dense")
    assert isinstance(offloaded.in_files_if_offloaded(model), Unloaded)
    with torch.no_grad():
        model.lm_head.weight[0, 3] += 1.0
    with pytest.raises(UnsupportedModelError, match=r"other numbers in lm_head\.weight"):
        offloaded.in_files_if_offloaded(model)


def test_what_a_sweep_cannot_do_is_refused_of_offloaded_models_too(tmp_path: Path) -> None:
    saved(tmp_path / "dense", "llama")
    model = with_layers_on_disk(tmp_path / "dense")
    with pytest.raises(ArgumentError, match="got 'taylor', which needs all layers at once"):
        gf.ghost_model(model, text(), remove=2, criterion="taylor", run=RUN)
    with pytest.raises(UnsupportedModelError, match="offloaded by accelerate: load the model"):
        gf.select_layers(model, text(), 1)


def test_layers_of_an_offloaded_model_are_cut_without_being_fetched(tmp_path: Path) -> None:
    dense = saved(tmp_path / "dense", "llama")
    smaller = gf.prune_model(with_layers_on_disk(tmp_path / "dense"), [2])
    assert smaller.model.layers[2].mlp.up_proj.weight.is_meta
    tokens = random_tokens(2, 12)
    with torch.inference_mode():
        expected = gf.prune_model(dense, [2])(tokens).logits
        assert relative_rms(smaller(tokens).logits, expected) < 1e-6


def test_models_in_memory_are_left_alone() -> None:
    model = tiny_model("llama")
    assert offloaded.in_files_if_offloaded(model) is model
    assert offloaded.in_files_if_offloaded("folder") == "folder"
