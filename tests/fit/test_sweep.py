"""The sweep gives what the pass in memory gives; what is stored; what a killed run goes on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.swept_models import saved, sweep_of, text
from torch import Tensor

from ghosted_fast.errors import ArgumentError, CalibrationError, NonFiniteError
from ghosted_fast.fit.collect import collect_statistics
from ghosted_fast.fit.sweep.climb import Sweep, SweptText, climb
from ghosted_fast.fit.sweep.shelf import FolderShelf, MemoryShelf, Shelf, boundary_name
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.models.unloaded.source import Call, LoadedSource
from ghosted_fast.options import GhostOptions
from ghosted_fast.selection.swept import statistics_of
from ghosted_fast.testing import FAMILY_NAMES, relative_rms, tiny_model
from ghosted_fast.text.batches import iterate_batches

INTERVALS = [(0, 1), (1, 4), (2, 4), (5, 6)]
KINDS = [
    GhostOptions(),
    GhostOptions(features="raw", token_weight="uniform", first_state="off", folds=3),
    GhostOptions(token_weight="inverse_energy", first_state="on", bias=True),
    GhostOptions(features="auto"),
]


def shelf_of(kind: str, folder: Path) -> Shelf:
    return MemoryShelf() if kind == "memory" else FolderShelf(folder / "shelf")


def assert_same(mine: Any, theirs: Any) -> None:
    assert (mine.start, mine.stop) == (theirs.start, theirs.stop)
    for gram, expected in zip(mine.grams, theirs.grams, strict=True):
        for one, other in zip(gram.sums, expected.sums, strict=True):
            assert relative_rms(one, other) <= 1e-6
    floors = [-1.0 if item.energy_floor is None else item.energy_floor for item in (mine, theirs)]
    assert floors[0] == pytest.approx(floors[1], rel=1e-6)
    assert (mine.first is None) == (theirs.first is None)
    if mine.first is not None:
        for one, other in zip(mine.first.rows(), theirs.first.rows(), strict=True):
            assert relative_rms(one, other) <= 1e-6


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_statistics_are_those_of_the_pass_in_memory(tmp_path: Path, family: str) -> None:
    model = saved(tmp_path, family)
    for options in KINDS if family == "llama" else KINDS[:1]:
        expected = collect_statistics(model, text(), INTERVALS, options)
        swept = statistics_of(sweep_of(tmp_path, text()), INTERVALS, options)
        for mine, theirs in zip(swept, expected, strict=True):
            assert_same(mine.statistics, theirs)


@pytest.mark.parametrize("kind", ["memory", "folder"])
def test_a_model_in_memory_is_a_source_too(tmp_path: Path, kind: str) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    source = LoadedSource(Decoder.of(model))
    swept = SweptText.of(list(iterate_batches(text())), source.decoder.device)
    sweep = Sweep(source, swept, shelf_of(kind, tmp_path))
    expected = collect_statistics(model, text(), INTERVALS)
    for mine, theirs in zip(statistics_of(sweep, INTERVALS, GhostOptions()), expected, strict=True):
        assert_same(mine.statistics, theirs)


def test_each_layer_is_run_once_for_each_batch_and_not_above_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, "llama")
    sweep = sweep_of(tmp_path, text())
    calls: list[Any] = []
    original = Call.run
    monkeypatch.setattr(
        Call, "run", lambda call, layer, x: calls.append(layer) or original(call, layer, x)
    )
    statistics_of(sweep, [(1, 4), (0, 2)], GhostOptions())
    layers = list(sweep.source.decoder.layers)
    assert [layers.index(layer) for layer in calls] == [i for i in range(4) for _ in range(5)]


def test_states_that_nobody_looks_at_are_dropped(tmp_path: Path) -> None:
    saved(tmp_path / "dense", "llama")
    shelf = FolderShelf(tmp_path / "shelf")
    sweep = sweep_of(tmp_path / "dense", text(), shelf)
    climb(sweep, 5, lambda _: None, last_use=lambda b: 5 if b in (1, 5) else b)
    held = sorted(path.stem for path in (tmp_path / "shelf").iterdir())
    assert held == [boundary_name(1), boundary_name(5)]


def test_too_little_text_and_what_is_not_finite(tmp_path: Path) -> None:
    model = saved(tmp_path, "llama")
    with pytest.raises(CalibrationError, match="expected at least 64 calibration tokens"):
        statistics_of(sweep_of(tmp_path, text()[:1][0][:1, :40].split(1)), [(1, 2)], GhostOptions())
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    for file in tmp_path.glob("model-*"):
        file.unlink()
    (tmp_path / "model.safetensors.index.json").unlink()
    statistics_of(sweep_of(tmp_path, text()), [(1, 3)], GhostOptions())
    with pytest.raises(NonFiniteError, match="boundaries 2 and 5"):
        statistics_of(sweep_of(tmp_path, text()), [(2, 5)], GhostOptions())


def test_shelves_keep_what_was_put_there(tmp_path: Path) -> None:
    tensors = [torch.randn(2, 3, 4), torch.randn(1, 5, 4).bfloat16()]
    for shelf in (MemoryShelf(), FolderShelf(tmp_path / "shelf")):
        for _ in range(2):
            for tensor in tensors:
                shelf.add("x", tensor)
            assert all(torch.equal(shelf.get("x", i), t) for i, t in enumerate(tensors))
            shelf.drop("x")
            shelf.drop("never")
            assert not list((tmp_path / "shelf").glob("*.states"))
        assert shelf.kept() is None


def test_a_folder_goes_on_with_what_was_kept_last(tmp_path: Path) -> None:
    first, second = torch.randn(2, 3), torch.randn(2, 3)
    shelf = FolderShelf(tmp_path / "s", "digest")
    shelf.add("a", first)
    shelf.keep({"boundary": 1})
    shelf.drop("a")  # is still there for a run that goes on from what was kept
    shelf.add("b", second)
    again = FolderShelf(tmp_path / "s", "digest")
    assert again.kept() == {"boundary": 1}
    assert torch.equal(again.get("a", 0), first)
    assert [path.name for path in (tmp_path / "s").glob("*.states")] == ["a.states"]
    with pytest.raises(KeyError):
        again.get("b", 0)
    again.clear()
    assert not (tmp_path / "s").exists()


def test_folders_of_something_else_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ArgumentError, match=r"which holds thesis\.tex"):
        FolderShelf(tmp_path, "digest")
    shelf = FolderShelf(tmp_path / "s", "one")
    shelf.keep({"boundary": 0})
    with pytest.raises(ArgumentError, match="another text, other options or another checkpoint"):
        FolderShelf(tmp_path / "s", "other")


@pytest.mark.parametrize("stops", [[0], [0, 1, 2, 3, 4, 5]])
def test_a_stopped_climb_goes_on_at_the_last_boundary(tmp_path: Path, stops: list[int]) -> None:
    saved(tmp_path / "dense", "llama")

    class Killed(BaseException):
        pass

    def climbed(kill_at: int | None) -> tuple[list[int], Tensor]:
        sweep = sweep_of(tmp_path / "dense", text(), FolderShelf(tmp_path / "s", "digest"))
        seen: list[int] = []

        def reached(boundary: int) -> None:
            seen.append(boundary)
            if boundary == kill_at:
                raise Killed

        climb(sweep, 6, reached)
        return seen, torch.cat([sweep.state(6, place).flatten() for place in range(5)])

    for stop in stops:
        with pytest.raises(Killed):
            climbed(stop)
    seen, states = climbed(None)
    assert seen == list(range(stops[-1], 7)), "what was done is not done again"
    plain = sweep_of(tmp_path / "dense", text())
    climb(plain, 6, lambda _: None)
    expected = torch.cat([plain.state(6, place).flatten() for place in range(5)])
    assert torch.equal(states, expected)
