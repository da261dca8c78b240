"""Surgery on folders: the same model as in memory, file by file, whole or not at all."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from families.tiny_models import tiny_causal
from safetensors.torch import load_file
from support.dense_reference import INTERVALS, NUM_LAYERS, REMOVED, random_ghost, random_ghosts
from support.flipped_bits import flip, stored_tensors
from support.swept_models import as_pickles, ask_for_a_tied_head
from support.tiny_text import tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from ghosted_fast.checkpoint.digests import DIGESTS
from ghosted_fast.checkpoint.save import save_model
from ghosted_fast.errors import (
    ArgumentError,
    CheckpointError,
    OutputError,
    UnsupportedModelError,
)
from ghosted_fast.models.unloaded import files
from ghosted_fast.models.unloaded.files import StoredTensor
from ghosted_fast.surgery import folder_files
from ghosted_fast.surgery.cut import prune_model, remove_layers
from ghosted_fast.surgery.folder import cut_folder, prune_folder
from ghosted_fast.testing import FAMILY_NAMES, random_tokens, tiny_model

TOKENS = random_tokens(2, 20)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(TOKENS, use_cache=False).logits


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    tiny_model("llama", NUM_LAYERS).save_pretrained(tmp_path / "dense", max_shard_size="60KB")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def cut_as_in_memory(folder: Path, model: Any) -> list[tuple[str, Any]]:
    """Cut folder/"dense" without and with ghosts; return the folders' names and the cut models."""
    prune_folder(folder / "dense", REMOVED, folder / "pruned")
    pruned, ghosts = prune_model(model, REMOVED), random_ghosts()
    cut_folder(folder / "dense", REMOVED, ghosts).save(folder / "ghosted")
    found = [("pruned", pruned), ("ghosted", remove_layers(model, REMOVED, copy.deepcopy(ghosts)))]
    for name, expected in found:
        assert torch.equal(logits(loaded(folder / name)), logits(expected))
    return found


@pytest.mark.parametrize(
    ("family", "shards"), [*((family, "50KB") for family in FAMILY_NAMES), ("llama", "1GB")]
)
def test_a_cut_folder_is_what_the_cut_model_saves(tmp_path: Path, family: str, shards: str) -> None:
    model = tiny_model(family, NUM_LAYERS, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "dense", max_shard_size=shards)
    for name, expected in cut_as_in_memory(tmp_path, model):
        save_model(expected, tmp_path / "saved", overwrite=True)
        for file in ("config.json", "generation_config.json"):
            mine, theirs = ((tmp_path / at / file).read_text() for at in (name, "saved"))
            assert json.loads(mine) == json.loads(theirs)
        left = {n for n in names(tmp_path / "saved") if not n.startswith("model")}
        assert left == {n for n in names(tmp_path / name) if not n.startswith("model")}


def test_ghosts_are_left_as_they_are_and_nothing_is_read_whole(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Any) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(StoredTensor, "read", refuse)
    monkeypatch.setattr(files, "_CHUNK", 1000)
    ghosts = random_ghosts()
    before = copy.deepcopy([ghost.state_dict() for ghost in ghosts])
    cut_folder(dense, REMOVED, ghosts).save(tmp_path / "out")
    for ghost, state in zip(ghosts, before, strict=True):
        assert all(torch.equal(ghost.state_dict()[name], value) for name, value in state.items())


def test_every_shard_keeps_its_tensors_and_the_index_names_them(
    dense: Path, tmp_path: Path
) -> None:
    prune_folder(dense, [1, 2, 3], tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    held = {
        name: path.name
        for path in (tmp_path / "out").glob("*.safetensors")
        for name in load_file(path)
    }
    assert index["weight_map"] == held
    total = sum(t.nbytes for p in (tmp_path / "out").glob("*.safetensors")
                for t in load_file(p).values())  # fmt: skip
    assert index["metadata"]["total_size"] == total
    assert len(set(held.values())) < len(list(dense.glob("*.safetensors"))), "none is empty"


def test_what_lies_beside_the_weights_comes_along(dense: Path, tmp_path: Path) -> None:
    (dense / "LICENSE").write_text("free")
    (dense / "README.md").write_text("of the dense model")
    (dense / "pytorch_model.bin").write_bytes(b"weights")
    (dense / "original").mkdir()
    (dense / "original" / "consolidated.00.pth").write_bytes(b"weights")
    (dense / "templates").mkdir()
    (dense / "templates" / "chat.jinja").write_text("{{ x }}")
    settings = json.loads((dense / "generation_config.json").read_text())
    (dense / "generation_config.json").write_text(json.dumps({**settings, "max_length": 77}))
    out = prune_folder(dense, [3], tmp_path / "out")
    assert (out / "LICENSE").read_text() == "free"
    assert (out / "templates" / "chat.jinja").read_text() == "{{ x }}"
    assert json.loads((out / "generation_config.json").read_text())["max_length"] == 77
    assert not {"README.md", "pytorch_model.bin", "original"} & names(out)
    text = "the cat sat on the mat"
    expected = AutoTokenizer.from_pretrained(dense)(text)["input_ids"]
    assert AutoTokenizer.from_pretrained(out)(text)["input_ids"] == expected


def test_a_tokenizer_that_is_given_takes_the_place_of_the_copy(dense: Path, tmp_path: Path) -> None:
    cut_folder(dense, [3]).save(tmp_path / "out", tiny_tokenizer(adds_bos=True))
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("cat")["input_ids"][0] == 1


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failure_leaves_what_was_there(
    dense: Path, tmp_path: Path, overwrite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    if overwrite:
        out.mkdir()
        (out / "config.json").write_text("as it was")
    done = []

    def fails(path: Path, pieces: dict[str, Any]) -> None:
        if done:
            raise OSError("the disk is gone")
        done.append(path)
        files.write_tensors(path, pieces)

    monkeypatch.setattr(folder_files, "write_tensors", fails)
    with pytest.raises(OutputError, match="the disk is gone"):
        prune_folder(dense, [3], out, overwrite=overwrite)
    assert out.exists() == overwrite
    assert names(tmp_path) == {"dense", *(["out"] if overwrite else [])}
    if overwrite:
        assert (out / "config.json").read_text() == "as it was"


def test_folders_that_cannot_be_written_are_refused_before_any_work(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = cut_folder(dense, [3])
    with pytest.raises(ArgumentError, match="exists: choose another"):
        cut.save(dense)
    with pytest.raises(ArgumentError, match="which the model is read from"):
        cut.save(dense, overwrite=True)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=cut.num_bytes))
    with pytest.raises(OutputError, match="MiB of room to write"):
        cut.save(tmp_path / "deep" / "out")
    assert names(tmp_path) == {"dense"}


def test_the_bytes_are_known_beforehand(dense: Path, tmp_path: Path) -> None:
    cut = cut_folder(dense, [1, 2], [random_ghost(0)])
    out = cut.save(tmp_path / "out")
    held = (tensor for path in out.glob("*.safetensors") for tensor in load_file(path).values())
    assert cut.num_bytes == sum(tensor.nbytes for tensor in held)


def test_a_ghosted_folder_is_cut_again(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = random_ghosts()[:2]
    cut_folder(dense, [1, 2], [first]).save(tmp_path / "once")
    cut_folder(tmp_path / "once", [3], [second]).save(tmp_path / "twice")
    model = remove_layers(loaded(dense), [1, 2], [copy.deepcopy(first)])
    model = remove_layers(model, [3], [copy.deepcopy(second)])
    monkeypatch.setenv("GHOSTED_FAST_VERIFY", "1")
    again = loaded(tmp_path / "twice")
    assert torch.equal(logits(again), logits(model))
    assert again.config.ghost["removed"] == model.config.ghost["removed"] == [1, 2, 5]


def test_a_cut_folder_holds_the_digests_of_its_weights(
    dense: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = cut_folder(dense, [1, 2], random_ghosts()[:1]).save(tmp_path / "cut")
    assert "shards" not in capfd.readouterr().err
    digests = json.loads((folder / DIGESTS).read_text())
    stored = stored_tensors(folder)
    (weight,) = (name for name in stored if name.endswith("ghost.weight"))
    assert digests.keys() == stored.keys()
    flip(folder, weight)
    with pytest.raises(CheckpointError, match=r"the bytes of .*ghost\.weight"):
        loaded(folder)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gemma2"])
def test_files_of_torch_save_are_cut_into_safetensors(tmp_path: Path, family: str) -> None:
    model = tiny_model(family, NUM_LAYERS, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "dense", max_shard_size="50KB")
    as_pickles(tmp_path / "dense")
    assert len(list((tmp_path / "dense").glob("pytorch_model-*.bin"))) > 1
    for name, _ in cut_as_in_memory(tmp_path, model):
        assert not [n for n in names(tmp_path / name) if ".bin" in n]


def test_weights_of_two_names_and_of_other_strides_are_written_once_and_in_order(
    tmp_path: Path,
) -> None:
    model = tiny_model("llama", NUM_LAYERS)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "model.safetensors").unlink()
    tensors = dict(model.state_dict())
    turned = "model.layers.3.mlp.up_proj.weight"
    tensors[turned] = tensors[turned].t().contiguous().t()
    torch.save(tensors, tmp_path / "dense" / "pytorch_model.bin")
    prune_folder(tmp_path / "dense", [1, 2], tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert "lm_head.weight" in tensors
    assert "lm_head.weight" not in written
    assert torch.equal(written["model.layers.1.mlp.up_proj.weight"], tensors[turned])
    assert torch.equal(logits(loaded(tmp_path / "out")), logits(prune_model(model, [1, 2])))


def test_a_head_of_another_value_than_the_embedding_is_written_too(tmp_path: Path) -> None:
    tiny_model("llama", NUM_LAYERS).save_pretrained(tmp_path / "dense")
    ask_for_a_tied_head(tmp_path / "dense")
    prune_folder(tmp_path / "dense", [1, 2], tmp_path / "out")
    expected = prune_model(loaded(tmp_path / "dense"), [1, 2])
    assert torch.equal(logits(loaded(tmp_path / "out")), logits(expected))


def test_tables_of_all_layers_lose_the_parts_of_removed_ones(tmp_path: Path) -> None:
    model = tiny_causal("gemma4_text", "")
    model.save_pretrained(tmp_path / "dense")
    prune_folder(tmp_path / "dense", [1], tmp_path / "pruned")
    assert torch.equal(logits(loaded(tmp_path / "pruned")), logits(prune_model(model, [1])))


def test_names_that_say_nothing_of_layers_are_refused(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = folder_files._renumbered

    def wrong(name: str, layer: int, new: int, path: str) -> str:
        return known(name, layer, new if "up_proj" not in name else new + 90, path)

    monkeypatch.setattr(folder_files, "_renumbered", wrong)
    with pytest.raises(UnsupportedModelError, match="cannot be removed file by file") as caught:
        cut_folder(dense, [3])
    for word in ("lack", "hold without a place", "up_proj", "cut it in memory"):
        assert word in str(caught.value)
    with pytest.raises(UnsupportedModelError, match="expected the number of layer 7 in the name"):
        known("model.blocks.x", 7, 3, "model.layers")


@pytest.mark.parametrize(
    ("removed", "ghosts", "error", "message"),
    [
        ([], None, ArgumentError, "at least one layer"),
        ([NUM_LAYERS], None, ArgumentError, "layers in 0"),
        ([1], [None, None], ArgumentError, "expected 1 ghosts"),
        ([1], ["ghost"], TypeError, "GhostLinear"),
    ],
)
def test_wrong_arguments(
    dense: Path, removed: Iterable[int], ghosts: Any, error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        cut_folder(dense, removed, ghosts)


def test_gaps_may_be_left_without_a_ghost(dense: Path, tmp_path: Path) -> None:
    ghosts = [None, random_ghost(0), None]
    cut_folder(dense, REMOVED, ghosts).save(tmp_path / "out")
    expected = remove_layers(loaded(dense), REMOVED, copy.deepcopy(ghosts))
    assert len(INTERVALS) == 3
    assert torch.equal(logits(loaded(tmp_path / "out")), logits(expected))
