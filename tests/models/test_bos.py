"""One warning for rows without the BOS token that a model's tokenizer begins every text with."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_text import TEXT, tiny_tokenizer
from torch import Tensor

import ghosted_fast as gf
from ghosted_fast.models.checked import bos
from ghosted_fast.models.checked.bos import tell_missing_bos
from ghosted_fast.testing import random_tokens, tiny_model
from ghosted_fast.text.batches import Batch, iterate_batches
from ghosted_fast.text.calibration_text import CalibrationText

BOS = 1
UNWANTED = "expected rows that begin with the BOS token 1"


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What was said of models of other tests is forgotten."""
    bos._added_bos.cache_clear()
    bos._warn.cache_clear()
    yield


@pytest.fixture(params=[True], ids=["adds_bos"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    model = tiny_model("llama", 4)
    model.config.bos_token_id = BOS
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer(request.param).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def rows(first: int, count: int = 2) -> list[Tensor]:
    """Return batches of which every row begins with a token."""
    found = [random_tokens(8, 32, seed).clamp_min(2) for seed in range(count)]
    for batch in found:
        batch[:, 0] = first
    return found


def said(work: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        work()
    return [str(item.message) for item in caught if UNWANTED in str(item.message)]


def test_rows_without_it_are_told_once(folder: Path) -> None:
    model, _ = gf.load_model(folder)
    with pytest.warns(UserWarning, match=UNWANTED) as caught:
        smaller, _ = gf.ghost_model(model, rows(5), removed=[2])
    (found,) = [item for item in caught if UNWANTED in str(item.message)]
    assert f"the tokenizer of {str(folder)!r}" in str(found.message)
    assert "token_batches(tokenizer, texts, num_tokens)" in str(found.message)
    assert not said(lambda: gf.perplexity(smaller, rows(5))), "it was said of this model already"


@pytest.mark.parametrize(
    "work",
    [
        lambda model, text: gf.perplexity(model, text),
        lambda model, text: gf.select_layers(model, text, 1, "streamline"),
        lambda model, text: gf.ghost_model(model, text, 1, run=gf.RunOptions(corrections=0)),
        lambda model, text: gf.heal(
            gf.prune_model(model, [2]),
            model,
            text,
            gf.HealOptions(tokens=256, tokens_per_step=128, held_out_tokens=128),
        ),
    ],
    ids=["perplexity", "select_layers", "ghost_model", "heal"],
)
def test_it_is_told_wherever_a_text_comes_in(folder: Path, work: Any) -> None:
    model, _ = gf.load_model(folder)
    assert not said(lambda: work(model, rows(BOS)))
    assert len(said(lambda: work(model, rows(5)))) == 1


def test_a_model_that_stays_in_its_files(folder: Path) -> None:
    from ghosted_fast.models.unloaded.opening import open_unloaded

    options = {"removed": [2], "run": gf.RunOptions(corrections=0)}
    assert len(said(lambda: gf.ghost_model(open_unloaded(folder), rows(5), **options))) == 1


def test_the_rows_of_the_loader_are_right(folder: Path) -> None:
    model, tokenizer = gf.load_model(folder)
    text = gf.token_batches(tokenizer, [TEXT] * 30, 256, 32)
    assert text[0][0, 0] == BOS
    assert not said(lambda: gf.perplexity(model, text))


@pytest.mark.parametrize("folder", [False], indirect=True, ids=["adds_none"])
def test_a_tokenizer_that_adds_none_asks_for_none(folder: Path) -> None:
    model, tokenizer = gf.load_model(folder)
    assert model.config.bos_token_id == tokenizer.bos_token_id == BOS
    text = gf.token_batches(tokenizer, [TEXT] * 30, 256, 32)
    assert not said(lambda: gf.perplexity(model, text))
    assert not said(lambda: gf.perplexity(model, rows(5)))


def test_padding_on_the_left_is_not_the_beginning(folder: Path) -> None:
    model, _ = gf.load_model(folder)
    ids = rows(0)[0]
    mask = torch.ones_like(ids)
    ids[:, 3], mask[:, :3] = BOS, 0
    padded = [{"input_ids": ids, "attention_mask": mask}]
    assert not said(lambda: gf.perplexity(model, padded))
    ids[:, 3] = 7
    assert len(said(lambda: gf.perplexity(model, padded))) == 1


def test_where_nothing_is_known_nothing_is_said(folder: Path, tmp_path: Path) -> None:
    (batch,) = iterate_batches(rows(5, 1))
    model, _ = gf.load_model(folder)
    assert len(said(lambda: tell_missing_bos(model, batch))) == 1
    for name in ("", str(tmp_path / "nowhere"), "someone/not-here", None):
        model.config._name_or_path = name
        assert not said(lambda: tell_missing_bos(model, batch)), name
    assert not said(lambda: tell_missing_bos(model, None))
    assert not said(lambda: tell_missing_bos(object(), batch))


def test_a_text_that_is_read_once_is_not_read_for_it() -> None:
    text = CalibrationText(iter(rows(5)))
    assert text.beginning is None
    assert len(list(text)) == 2
    held = CalibrationText(iter(rows(5)))
    held.hold()
    given = CalibrationText(rows(5))
    for known in (held, given):
        assert isinstance(known.beginning, Batch)
        assert torch.equal(known.beginning.input_ids, rows(5)[0])
        assert len(list(known)) == 2
    assert CalibrationText([]).beginning is None
