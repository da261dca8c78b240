"""Models whose layers do more than map a hidden state: what is cut of each, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from families.measures import cached_apart, distance, ghosts_for, logits, passed_by, tokens
from families.shrinking import disturbed
from families.tiny_models import tiny_config
from ghosted_fast.checkpoint.save import save_model
from ghosted_fast.errors import UnsupportedModelError
from ghosted_fast.models.boundaries import resume, visit_boundaries
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.options import RunOptions
from ghosted_fast.selection.select import select_layers
from ghosted_fast.surgery.cut import remove_layers, removed_intervals
from ghosted_fast.surgery.removable import check_removable
from ghosted_fast.text.batches import Batch

pytestmark = pytest.mark.slow
_ALTERNATING = {
    "num_hidden_layers": 8,
    "layers_block_type": ["linear_attention", "hybrid"] * 4,
    "hybrid_layer_ids": [1, 3, 5, 7],
    "num_mem_blocks": 2,  # layers 1 and 5 are one block, 3 and 7 another
}


def _tiny(model_type: str, **changes: Any) -> Any:
    """Return a tiny random model of a type, with changes to its configuration."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config(model_type, changes)).float().eval()
        disturbed(model)
    return model


def _cut(dense: Any, removed: list[int]) -> Any:
    """Cut layers and put ghosts in, and hold the logits to the dense model's with hooks."""
    intervals = removed_intervals(removed, Decoder.of(dense).num_layers)
    ghosts = ghosts_for(intervals, Decoder.of(dense).hidden_size)
    with passed_by(dense, intervals, ghosts):
        expected = logits(dense, tokens())
    check_removable(dense, removed)
    smaller = remove_layers(dense, removed, ghosts)
    assert distance(logits(smaller, tokens()), expected) < 1e-3
    return smaller


def _saved(model: Any, folder: Path) -> Any:
    """Return a model as it comes back from a folder."""
    save_model(model, folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def _size(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("model_type", "changes", "removed"),
    [
        ("zamba", {}, [2]),  # the layer that the shared weights are named by
        ("zamba", {}, [0, 5]),  # one layer is left of those that share
        ("zamba2", _ALTERNATING, [1]),  # of two blocks, one changes its first layer
        ("zamba2", _ALTERNATING, [3, 4, 5]),
        ("zamba2", _ALTERNATING, [1, 5]),  # no layer is left of a block
    ],
)
def test_weights_that_layers_share_stay_shared(
    model_type: str, changes: dict[str, Any], removed: list[int], tmp_path: Path
) -> None:
    smaller = _cut(_tiny(model_type, **changes), removed)
    assert cached_apart(smaller) < 1e-3
    back = _saved(smaller, tmp_path / "model")
    assert torch.equal(logits(back, tokens()), logits(smaller, tokens()))
    assert _size(back) == _size(smaller)
    back.tie_weights()  # by the rules for the layers that are left
    assert _size(back) == _size(smaller)
    assert back.all_tied_weights_keys == smaller.all_tied_weights_keys
    # A cut of what was cut.
    again = remove_layers(back, [0])
    assert torch.equal(logits(_saved(again, tmp_path / "again"), tokens()), logits(again, tokens()))


def test_the_last_attention_of_a_hybrid_model_stays() -> None:
    with pytest.raises(UnsupportedModelError, match=r"one of the layers 2, 5 to be kept"):
        check_removable(_tiny("zamba2"), [2, 5])


def test_a_model_whose_auto_class_has_another_configuration_is_loaded(tmp_path: Path) -> None:
    # Made from the configuration of all of Emu 3, it has that of the text part, which transformers'
    # auto class does not know.
    smaller = _cut(_tiny("emu3"), [2, 3])
    assert torch.equal(logits(_saved(smaller, tmp_path / "m"), tokens()), logits(smaller, tokens()))


@pytest.mark.parametrize(
    ("model_type", "removed", "needed"),
    [
        ("rwkv", [0, 1], "layer 0"),  # it has a norm for the embeddings
        ("inkling2_text", [0, 1, 2], "layer 0"),  # its input is read by all later layers
    ],
)
def test_layers_that_others_need_are_named(
    model_type: str, removed: list[int], needed: str
) -> None:
    dense = _tiny(model_type)
    with pytest.raises(UnsupportedModelError, match=f"expected {needed} to be kept, which others"):
        check_removable(dense, removed)
    check_removable(dense, removed[1:])  # the advice works


def test_weights_that_change_by_their_places_are_refused(tmp_path: Path) -> None:
    dense = _tiny("rwkv", rescale_every=6, num_hidden_layers=14)
    with pytest.raises(UnsupportedModelError, match=r"rescale_every = 0, got 6.*load it with"):
        check_removable(dense, [12])
    dense.save_pretrained(tmp_path / "dense")
    fit = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", rescale_every=0).eval()
    smaller = _cut(fit, [8, 9])
    assert torch.equal(logits(_saved(smaller, tmp_path / "m"), tokens()), logits(smaller, tokens()))


def test_layers_that_share_a_choice_of_tokens_are_cut(tmp_path: Path) -> None:
    dense, text = _tiny("glm_moe_dsa"), tokens(2, 40)  # 16 tokens are chosen of those before each
    with pytest.raises(UnsupportedModelError, match=r"layer 1 to be kept: layers 2-3 .*prev_topk"):
        check_removable(dense, [1])
    smaller = _cut(dense, [2, 4, 5])
    assert smaller.config.indexer_types == ["full", "full", "shared"]
    back = _saved(smaller, tmp_path / "m")
    assert torch.equal(logits(back, text), logits(smaller, text))
    with passed_by(dense, [(2, 3), (4, 6)]):
        expected = logits(dense, text)
    assert distance(logits(remove_layers(dense, [2, 4, 5]), text), expected) < 1e-4


def test_layers_that_read_pictures_stay_and_hold_no_ghost(tmp_path: Path) -> None:
    dense = _tiny("mllama", text_config={"cross_attention_layers": [3]})
    with pytest.raises(UnsupportedModelError, match="expected layer 3 to be kept: on text alone"):
        check_removable(dense, [2, 3])
    smaller = _cut(dense, [4])
    assert smaller.config.cross_attention_layers == [3]
    assert [(g["layer"], g["side"]) for g in smaller.config.ghost["ghosts"]] == [(4, "input")]
    back = _saved(smaller, tmp_path / "m")
    assert torch.equal(logits(back, tokens()), logits(smaller, tokens()))
    assert "| 4 | before layer 4 |" in (tmp_path / "m" / "README.md").read_text()
    states: dict[int, torch.Tensor] = {}
    batch = Batch(tokens(), torch.ones_like(tokens()))
    visit_boundaries(dense, batch, [3, 4], states.__setitem__)
    assert torch.equal(states[3], states[4])
    with torch.inference_mode():
        whole = dense(tokens(), attention_mask=batch.attention_mask, use_cache=False).logits
    assert torch.equal(resume(dense, batch, 4, states[4]), whole)


def test_a_gap_between_layers_that_read_pictures_has_no_place_for_a_ghost() -> None:
    dense = _tiny("mllama", text_config={"cross_attention_layers": [2, 4]})
    with pytest.raises(UnsupportedModelError, match="expected layer 3 to be kept: no layer beside"):
        check_removable(dense, [3])
    with pytest.raises(UnsupportedModelError, match="expected layer 5 to be kept: no layer beside"):
        remove_layers(dense, [5], ghosts_for([(5, 6)], 64))
    check_removable(dense, [1])


@pytest.mark.parametrize("criterion", ["ghost", "shortgpt", "sleb", "taylor"])
def test_layers_that_must_stay_are_not_chosen(criterion: str) -> None:
    dense = _tiny("mllama", text_config={"cross_attention_layers": [3]})
    texts = [tokens(4, 32, seed) for seed in range(12)]
    chosen = select_layers(dense, texts, 2, criterion, run=RunOptions(progress=False))
    assert 3 not in chosen.removed
