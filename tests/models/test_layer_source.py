"""Layers one at a time: what they give, that no other is in memory, and what is refused."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from families.tiny_models import tiny_causal
from support.dense_reference import random_ghost
from support.swept_models import as_pickles, ask_for_a_tied_head, saved, text
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ghosted_fast.errors import UnsupportedModelError
from ghosted_fast.models.boundaries import visit_boundaries
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.models.unloaded import source
from ghosted_fast.models.unloaded.files import StoredTensor
from ghosted_fast.models.unloaded.opening import open_unloaded
from ghosted_fast.models.unloaded.source import (
    Call,
    FolderSource,
    LayerSource,
    LoadedSource,
    check_sweepable,
)
from ghosted_fast.surgery.folder import cut_folder
from ghosted_fast.testing import FAMILY_NAMES, tiny_model
from ghosted_fast.text.batches import Batch, iterate_batches

BATCH = list(iterate_batches(text()))[2]
ATTENDED = BATCH.attention_mask.bool()


def run_through(source: LayerSource) -> tuple[list[Tensor], Tensor]:
    """Return the states at all boundaries, and the logits."""
    count = source.decoder.num_layers
    with torch.inference_mode():
        with source.embedding():
            hidden, calls = source.embed(BATCH)
        states = [hidden]
        for index in range(count):
            then = index + 1 if index + 1 < count else None
            with source.layer(index, then) as layer:
                call = calls[index]
                assert call is not None
                states.append(call.run(layer, states[-1]))
        with source.head():
            return states, source.logits(BATCH, states[-1])


def passed_through(model: Any) -> tuple[list[Tensor], Tensor]:
    states: dict[int, Tensor] = {}
    boundaries = list(range(Decoder.of(model).num_layers + 1))
    visit_boundaries(model, BATCH, boundaries, lambda i, x: states.__setitem__(i, x.clone()))
    with torch.inference_mode():
        logits = model(BATCH.input_ids, attention_mask=BATCH.attention_mask, use_cache=False).logits
    return [states[boundary] for boundary in boundaries], logits


@pytest.mark.parametrize("where", ["memory", "folder", "pickles"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_layers_one_by_one_give_what_the_model_gives(
    tmp_path: Path, family: str, where: str
) -> None:
    model = saved(tmp_path, family)
    expected, logits = passed_through(model)
    source: LayerSource = LoadedSource(Decoder.of(model))
    if where == "pickles":
        as_pickles(tmp_path)
    if where != "memory":
        source = FolderSource(open_unloaded(tmp_path))
    states, found = run_through(source)
    for mine, theirs in zip(states, expected, strict=True):
        assert torch.equal(mine[ATTENDED], theirs[ATTENDED])
    assert torch.equal(found[ATTENDED], logits[ATTENDED])


@pytest.mark.parametrize(("prefetch", "pickles"), [(False, False), (True, False), (True, True)])
def test_no_more_is_in_memory_than_is_asked_for(
    tmp_path: Path, prefetch: bool, pickles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, "llama")
    if pickles:
        as_pickles(tmp_path)
    unloaded = open_unloaded(tmp_path)
    source = FolderSource(unloaded, prefetch)
    read: list[tuple[str, bool]] = []
    original = StoredTensor.read
    by_place = {(item.path, item.offset): name for name, item in unloaded.tensors.items()}

    def noted(tensor: StoredTensor) -> Tensor:
        in_thread = threading.current_thread() is not threading.main_thread()
        read.append((by_place[tensor.path, tensor.offset], in_thread))
        return original(tensor)

    monkeypatch.setattr(StoredTensor, "read", noted)

    def with_memory(module: nn.Module) -> bool:
        return any(not parameter.is_meta for parameter in module.parameters())

    model, layers = unloaded.model, source.decoder.layers
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    with source.embedding():
        assert with_memory(embedding)
        assert not with_memory(head)
    for index in range(6):
        with source.layer(index, index + 1 if index < 5 else None):
            assert [with_memory(layer) for layer in layers] == [i == index for i in range(6)]
            assert not with_memory(head)
    with source.head():
        assert with_memory(head)
        assert embedding.weight.untyped_storage().nbytes() <= 32 * 4, "one row of zeros"
        assert not any(with_memory(layer) for layer in layers)
    assert not with_memory(model)
    of_layers = [(name, thread) for name, thread in read if ".layers." in name]
    assert len(of_layers) == len({name for name, _ in of_layers}), "each is read once"
    in_threads = {name.split(".")[2] for name, thread in of_layers if thread}
    assert in_threads == (set("12345") if prefetch else set())


@pytest.mark.parametrize("named_twice", [False, True])
def test_tied_heads_are_there_where_they_are_needed(tmp_path: Path, named_twice: bool) -> None:
    model = tiny_model("llama")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path)
    if named_twice:  # as torch.save keeps them: two names of one storage
        (tmp_path / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    unloaded = open_unloaded(tmp_path)
    assert unloaded.nbytes - sum(p.nbytes for p in model.parameters()) == (
        model.lm_head.weight.nbytes if named_twice else 0
    )
    states, logits = run_through(FolderSource(unloaded))
    expected, theirs = passed_through(model)
    assert torch.equal(states[-1][ATTENDED], expected[-1][ATTENDED])
    assert torch.equal(logits[ATTENDED], theirs[ATTENDED])


@pytest.mark.parametrize("pickles", [False, True])
def test_heads_of_which_the_files_hold_another_value_are_not_tied(
    tmp_path: Path, pickles: bool
) -> None:
    saved(tmp_path, "llama")
    ask_for_a_tied_head(tmp_path)
    if pickles:
        as_pickles(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    states, logits = run_through(FolderSource(open_unloaded(tmp_path)))
    expected, theirs = passed_through(model)
    assert torch.equal(states[-1][ATTENDED], expected[-1][ATTENDED])
    assert torch.equal(logits[ATTENDED], theirs[ATTENDED])


def test_weights_are_gone_after_a_failure(tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    source = FolderSource(open_unloaded(tmp_path))
    with pytest.raises(RuntimeError, match="stop"), source.layer(2):
        raise RuntimeError("stop")
    assert all(parameter.is_meta for parameter in source.decoder.model.parameters())


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gemma4_text", "use more of earlier ones than the hidden state"),
        ("zamba", "share weights, such as"),
    ],
)
def test_layers_that_need_one_another_are_refused_by_name(
    tmp_path: Path, family: str, reason: str
) -> None:
    tiny_causal(family, "").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=f"{family} model cannot be run one by one"):
        FolderSource(open_unloaded(tmp_path))
    with pytest.raises(UnsupportedModelError, match=reason):
        FolderSource(open_unloaded(tmp_path))


def test_a_changed_state_between_layers_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = source.as_returned

    def changed(hidden: Tensor, *others: Any) -> Any:
        return real(hidden + 1.0, *others)

    monkeypatch.setattr(source, "as_returned", changed)
    with pytest.raises(UnsupportedModelError, match="is changed before layer 1, outside of them"):
        check_sweepable(Decoder.of(tiny_model("llama")))


def test_layers_that_give_something_else_alone_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = Call.run
    monkeypatch.setattr(Call, "run", lambda *args: 1.5 * real(*args))
    with pytest.raises(UnsupportedModelError, match="the logits differ by"):
        check_sweepable(Decoder.of(tiny_model("llama")))


def test_ghosted_models_and_missing_weights_are_refused(tmp_path: Path) -> None:
    saved(tmp_path / "dense", "llama")
    cut_folder(tmp_path / "dense", [2]).save(tmp_path / "pruned")
    FolderSource(open_unloaded(tmp_path / "pruned"))
    cut_folder(tmp_path / "dense", [2], [random_ghost(0)]).save(tmp_path / "ghosted")
    with pytest.raises(UnsupportedModelError, match="got one with ghosts"):
        FolderSource(open_unloaded(tmp_path / "ghosted"))
    without = open_unloaded(tmp_path / "dense")
    object.__setattr__(without, "missing", frozenset(["lm_head.weight"]))
    with pytest.raises(UnsupportedModelError, match=r"lack lm_head\.weight"):
        FolderSource(without)


def test_batches_of_a_row_are_called_like_the_row(tmp_path: Path) -> None:
    model = saved(tmp_path, "gemma2")
    from_memory = LoadedSource(Decoder.of(model))
    row = Batch(BATCH.input_ids[2:3], BATCH.attention_mask[2:3])
    hidden, calls = from_memory.embed(row)
    whole, whole_calls = from_memory.embed(BATCH)
    with torch.inference_mode():
        layer = model.model.layers[0]
        alone, among = calls[0], whole_calls[0]
        assert alone is not None
        assert among is not None
        mine, theirs = alone.run(layer, hidden), among.run(layer, whole)[2:3]
    attended = row.attention_mask.bool()
    assert torch.allclose(mine[attended], theirs[attended], rtol=1e-5, atol=1e-5)
