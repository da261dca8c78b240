"""The file `recipe.yaml`: what is read out of it, what is refused, and where it goes along."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ghosted_fast.checkpoint.model_card import attach_healing
from ghosted_fast.checkpoint.recipe import (
    RECIPE,
    attach_recipe,
    check_names,
    read_recipe,
    write_recipe,
)
from ghosted_fast.checkpoint.save import save_model
from ghosted_fast.errors import SourceError
from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.surgery.cut import prune_model, remove_layers
from ghosted_fast.surgery.folder import prune_folder
from ghosted_fast.testing import tiny_model

KEPT = {"recipe": 1, "fit": {"model": "m", "bias": True, "damping": 1e-05}, "made": {"text": "a1"}}
READ = {"fit": {"model": "m", "bias": "true", "damping": "1.0e-05"}, "made": {"text": "a1"}}


def ghosted() -> Any:
    ghost = GhostLinear(32, norm_eps=1e-6)
    torch.nn.init.constant_(ghost.weight, 0.01)
    return remove_layers(tiny_model("llama"), [2], [ghost])


def test_what_is_written_is_read_as_texts(tmp_path: Path) -> None:
    write_recipe(tmp_path, KEPT)
    assert read_recipe(tmp_path) == read_recipe(tmp_path / RECIPE) == READ
    assert (tmp_path / RECIPE).read_text().startswith("# How this model was fitted")


@pytest.mark.parametrize(
    "value", ["14-18", "on", "none", "null", "1e-3", "a: b # c", "é\udc80", ""]
)
def test_texts_come_back_as_they_were(tmp_path: Path, value: str) -> None:
    write_recipe(tmp_path, {"fit": {"name": value}})
    assert read_recipe(tmp_path)["fit"] == {"name": value}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no options under 'fit:'"),
        ("fit: 3", "no options under 'fit:'"),
        ("- fit", "no options under 'fit:'"),
        ("fit: {a: [", "while parsing"),
        ("fit: {}\nmade: x", "'x' as 'made'"),
        ("fit: {}\nmad: {}", "got 'mad': write made, or leave it out"),
        ("recipe: 2\nfit: {}", "expected a recipe of format 1"),
        ("fit: !!python/object/apply:os.system ['touch x']", "no options under 'fit:'"),
        ("[" * 1500, "got"),
        ("fit: \x07", "unacceptable character"),
    ],
)
def test_what_is_no_recipe_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / RECIPE).write_text(text)
    with pytest.raises(SourceError) as refused:
        read_recipe(tmp_path)
    assert message in str(refused.value) and RECIPE in str(refused.value)


def test_a_recipe_must_be_there_and_be_text(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="No such file"):
        read_recipe(tmp_path)
    (tmp_path / RECIPE).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SourceError, match="expected a recipe"):
        read_recipe(tmp_path)


def test_names_that_are_near_are_told() -> None:
    known = ["remove", "removed", "seed"]
    check_names(["seed"], known, "here")
    with pytest.raises(SourceError, match="got 'removd': write removed or remove, or leave"):
        check_names(["removd"], known, "here")
    with pytest.raises(SourceError, match="write remove or removed or seed"):
        check_names(["xyz"], known, "here")


def test_a_ghosted_model_takes_its_recipe_along(tmp_path: Path) -> None:
    first = save_model(ghosted(), tmp_path / "first", recipe=KEPT)
    assert read_recipe(first) == READ
    AutoModelForCausalLM.from_pretrained(first).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / RECIPE).read_bytes() == (first / RECIPE).read_bytes()
    save_model(ghosted(), first, overwrite=True)
    assert not (first / RECIPE).exists(), "the recipe of another model"


def test_a_model_without_ghosts_has_it_in_its_folder_alone(tmp_path: Path) -> None:
    model = prune_model(tiny_model("llama"), [2])
    assert not attach_recipe(model.config, KEPT)
    folder = save_model(model, tmp_path / "pruned", recipe=KEPT)
    assert read_recipe(folder) == READ
    assert "recipe" not in (folder / "config.json").read_text()


def test_a_cut_of_the_folder_is_another_model(tmp_path: Path) -> None:
    for name, model in {
        "ghosted": ghosted(),
        "plain": prune_model(tiny_model("llama"), [2]),
    }.items():
        folder = save_model(model, tmp_path / name, recipe=KEPT)
        cut = prune_folder(folder, [0], tmp_path / f"{name}-cut")
        assert not (cut / RECIPE).exists()
        assert '"recipe"' not in (cut / "config.json").read_text()


@pytest.mark.parametrize("changed", [True, False])
def test_a_healed_model_is_another_model(changed: bool) -> None:
    config = ghosted().config
    attach_recipe(config, KEPT)
    attach_healing(config, {"best_tokens": 100 if changed else 0})
    assert ("recipe" in config.ghost) is not changed
