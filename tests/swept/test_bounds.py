"""A bound on perplexity where a model is swept through: what the way in memory finds."""

from __future__ import annotations

import contextlib
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.spoken_text import spoken_with_gaps
from support.swept_models import Killed, killed_at_write, read_by_layer, saved
from transformers import AutoModelForCausalLM

import ghosted_fast as gf
from ghosted_fast.errors import BudgetError, CalibrationError, UnsupportedModelError
from ghosted_fast.fit.sweep.plan import SweepPlan
from ghosted_fast.fit.sweep.riders import Riders
from ghosted_fast.fit.sweep.shape import Shape
from ghosted_fast.fit.sweep.shelf import FolderShelf
from ghosted_fast.models.unloaded.opening import open_unloaded
from ghosted_fast.selection import swept_how_many
from ghosted_fast.selection.how_many import most_layers_within, numbers_tried
from ghosted_fast.surgery.cut import removed_intervals
from ghosted_fast.surgery.folder import FolderCut
from ghosted_fast.swept.asked import Asked
from ghosted_fast.testing import FAMILY_NAMES, relative_rms
from ghosted_fast.text.batches import iterate_batches

_QUICK = ("llama", "gpt2", "gemma2", "qwen3_moe")
RUN = gf.RunOptions(corrections=0, score_tokens=32)


def increases(model: Any, text: list[Any], criterion: str = "ghost") -> dict[int, float]:
    """Return by how much the perplexity rises without 1, 2, 4 and 5 layers, in memory."""
    _, budget = most_layers_within(model, text, gf.PerplexityBound(1e9), criterion, run=RUN)
    return {trial.remove: trial.value for trial in budget.tried}


def bound_of(model: Any, text: list[Any], criterion: str = "ghost") -> gf.PerplexityBound:
    """Return a bound that 4 layers break and 1 and 2 do not, or not both."""
    if criterion == "lorp":  # 3 layers of llama, in two pieces; it cannot choose 5 of 6
        return gf.PerplexityBound(2.5)
    found = increases(model, text, criterion)
    low = max(found[1], found[2], 0.0)
    assert found[4] > low + 1e-4, found
    return gf.PerplexityBound((low + found[4]) / 2)


def assert_same_choice(found: gf.GhostReport, expected: gf.GhostReport) -> None:
    assert found.removed == expected.removed
    assert (found.criterion, len(found.scores)) == (expected.criterion, len(expected.scores))
    for one, other in zip(found.scores, expected.scores, strict=True):
        assert (one.start, one.stop) == (other.start, other.stop)
        assert one.score == pytest.approx(other.score, rel=1e-5, abs=1e-7)
    mine, theirs = found.budget, expected.budget
    assert mine is not None and theirs is not None
    assert (mine.kind, mine.asked, mine.remove) == (theirs.kind, theirs.asked, theirs.remove)
    assert [trial.remove for trial in mine.tried] == [trial.remove for trial in theirs.tried]
    for trial, other_trial in zip(mine.tried, theirs.tried, strict=True):
        # A difference of losses that are known to 1e-6 of some 2 to 4 nats.
        assert trial.value == pytest.approx(other_trial.value, rel=1e-5, abs=1e-5)
    assert mine.reached == pytest.approx(theirs.reached, rel=1e-5, abs=1e-5)


def assert_same_as_in_memory(folder: Path, family: str, **asked: Any) -> gf.GhostReport:
    model = saved(folder / "dense", family)
    text = spoken_with_gaps(model)
    asked = {"run": RUN, **asked}
    asked["remove"] = bound_of(model, text, asked.get("criterion", "ghost"))
    mine, report = gf.ghost_model(open_unloaded(folder / "dense"), text, **asked)
    theirs, expected = gf.ghost_model(model, text, **asked)
    assert_same_choice(report, expected)
    assert isinstance(mine, FolderCut)
    mine.save(folder / "out")
    states = AutoModelForCausalLM.from_pretrained(folder / "out").state_dict()
    others = theirs.state_dict()
    assert states.keys() == others.keys()
    for name, tensor in states.items():
        assert relative_rms(tensor, others[name]) <= 1e-5, name
    return report


@pytest.mark.parametrize(
    "family",
    [
        name if name in _QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in FAMILY_NAMES
    ],
)
def test_layers_and_ghosts_are_those_of_the_way_in_memory(tmp_path: Path, family: str) -> None:
    report = assert_same_as_in_memory(tmp_path, family)
    assert len(report.removed) in (2, 3)


@pytest.mark.parametrize(
    "asked",
    [
        {"criterion": "shortgpt"},
        {"criterion": "streamline"},
        {"criterion": "angular"},
        {"criterion": "shortgpt", "options": gf.GhostOptions(sequential=False, folds=3)},
        {"options": gf.GhostOptions(bias=True, features="raw", token_weight="inverse_energy")},
        {"criterion": "lorp", "options": gf.GhostOptions(first_state="on", bias=True)},
    ],
    ids=lambda asked: "-".join(str(value) for value in asked.values())[:40],
)
def test_with_other_criteria_and_ghosts(tmp_path: Path, asked: dict[str, Any]) -> None:
    assert_same_as_in_memory(tmp_path, "llama", **asked)


def test_several_gaps_are_tried_with_all_their_ghosts(tmp_path: Path) -> None:
    report = assert_same_as_in_memory(tmp_path, "llama", criterion="lorp")
    assert report.removed == [1, 3, 4]
    assert report.budget is not None and [t.remove for t in report.budget.tried] == [1, 2, 3, 4]


def test_a_bound_that_no_layer_keeps(tmp_path: Path) -> None:
    model = saved(tmp_path, "llama")
    text = spoken_with_gaps(model)
    errors = []
    for given in (model, open_unloaded(tmp_path)):
        with pytest.raises(BudgetError, match=r"within a perplexity 0\.1% above") as caught:
            gf.ghost_model(given, text, gf.PerplexityBound(0.001), run=RUN)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


def test_ghosts_are_corrected_behind_a_bound(tmp_path: Path) -> None:
    model = saved(tmp_path, "llama")
    text = spoken_with_gaps(model)
    bound, run = bound_of(model, text), replace(RUN, corrections=1)
    _, report = gf.ghost_model(open_unloaded(tmp_path), text, bound, run=run)
    _, expected = gf.ghost_model(model, text, bound, run=run)
    assert_same_choice(report, expected)
    (mine,), (theirs,) = report.corrections, expected.corrections
    assert mine.accepted == theirs.accepted
    assert (mine.before, mine.after) == pytest.approx((theirs.before, theirs.after), rel=1e-5)


def plan_of(
    folder: Path, text: list[Any], wanted: gf.PerplexityBound, criterion: str, run: gf.RunOptions
) -> SweepPlan:
    asked = Asked(wanted, criterion, "ghost", gf.GhostOptions(), run)
    return asked.plan(open_unloaded(folder), list(iterate_batches(text)))


def test_each_number_reads_the_layers_above_its_candidates_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = saved(tmp_path, "llama")
    text = spoken_with_gaps(model)
    bound = bound_of(model, text)
    plan = plan_of(tmp_path, text, bound, "ghost", RUN)
    layers, sizes = read_by_layer(monkeypatch)
    _, report = gf.ghost_model(open_unloaded(tmp_path), text, bound, run=RUN)
    tried = numbers_tried(6, len(report.removed))
    assert tried == [1, 2, 4, 3] and plan.numbers_tried == 4
    for index in range(6):
        assert layers.count(index) == 1 + sum(count <= index for count in tried), index
    # No way reads more than this one; the head of 12 kB beside 40 kB layers is counted twice.
    assert 0.9 * plan.read_bytes < sum(sizes) <= plan.read_bytes


@pytest.mark.parametrize("criterion", ["lorp", "streamline"])
def test_no_more_is_read_than_is_planned(
    tmp_path: Path, criterion: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = saved(tmp_path, "llama")
    text = spoken_with_gaps(model)
    bound = bound_of(model, text, criterion)
    plan = plan_of(tmp_path, text, bound, criterion, RUN)
    _, sizes = read_by_layer(monkeypatch)
    gf.ghost_model(open_unloaded(tmp_path), text, bound, criterion=criterion, run=RUN)
    # What "streamline" chooses is at the top, where little is left to read.
    assert (0.4 if criterion == "lorp" else 0.0) * plan.read_bytes < sum(sizes) <= plan.read_bytes


@pytest.mark.parametrize("criterion", ["ghost", "lorp"])
def test_the_disk_holds_no_more_than_is_planned(
    tmp_path: Path, criterion: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = saved(tmp_path / "dense", "llama")
    text = spoken_with_gaps(model)
    bound, run = bound_of(model, text, criterion), replace(RUN, state=tmp_path / "state")
    plan = plan_of(tmp_path / "dense", text, bound, criterion, run)
    most = 0
    add = FolderShelf.add

    def weighed(shelf: FolderShelf, name: str, states: torch.Tensor) -> None:
        nonlocal most
        add(shelf, name, states)
        held = (tmp_path / "state").glob("*.states")
        most = max(most, sum(path.stat().st_size for path in held))

    monkeypatch.setattr(FolderShelf, "add", weighed)
    gf.ghost_model(open_unloaded(tmp_path / "dense"), text, bound, criterion=criterion, run=run)
    assert 0.6 * plan.disk_bytes < most <= plan.disk_bytes


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any], dict[str, Any]]:
    """A model in a folder, a text, and a bound for each of two criteria."""
    folder = tmp_path_factory.mktemp("bounds") / "dense"
    model = saved(folder, "llama")
    text = spoken_with_gaps(model)
    return folder, text, {name: bound_of(model, text, name) for name in ("ghost", "lorp")}


def weights(cut: FolderCut, folder: Path) -> dict[str, torch.Tensor]:
    cut.save(folder, overwrite=True)
    return {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


@pytest.mark.parametrize("criterion", ["ghost", "lorp"])
def test_a_run_that_is_stopped_many_times_ends_with_the_same_bits(
    tmp_path: Path, given: tuple[Path, list[Any], dict[str, Any]], criterion: str
) -> None:
    """Each time at another write of states or of the record, which is left half done."""
    folder, text, bounds = given
    asked = {"remove": bounds[criterion], "criterion": criterion}
    run = replace(RUN, state=tmp_path / "state")
    stops = random.Random(0)
    killed = 0
    for _ in range(16):
        with killed_at_write(stops.randrange(1, 60)) as met:
            gf.ghost_model(open_unloaded(folder), text, run=run, **asked)
        killed += len(met)
    assert killed > 6
    mine, report = gf.ghost_model(open_unloaded(folder), text, run=run, **asked)
    assert not (tmp_path / "state").exists()
    plain, expected = gf.ghost_model(open_unloaded(folder), text, run=RUN, **asked)
    assert report.budget == expected.budget
    assert (report.removed, report.scores) == (expected.removed, expected.scores)
    found, others = weights(mine, tmp_path / "mine"), weights(plain, tmp_path / "plain")
    assert found.keys() == others.keys()
    assert all(torch.equal(tensor, others[name]) for name, tensor in found.items())


@pytest.mark.parametrize(("criterion", "read"), [("ghost", [5, 3, 4, 5]), ("lorp", None)])
def test_what_was_found_out_is_not_found_out_again(
    tmp_path: Path,
    given: tuple[Path, list[Any], dict[str, Any]],
    criterion: str,
    read: list[int] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped in the last layer while 4 layers are tried, after 1 and 2."""
    folder, text, bounds = given
    asked = {"remove": bounds[criterion], "criterion": criterion}
    run = replace(RUN, state=tmp_path / "state")
    advance, losses = Riders.advance, swept_how_many.race_to_the_top
    judged: list[int] = []

    def stopped(riders: Riders, layer: Any, index: int) -> None:
        if len(judged) == 3 and index == 5:
            raise Killed
        advance(riders, layer, index)

    def noted(*given: Any) -> list[float]:
        judged.append(len(given[2]))
        return losses(*given)

    monkeypatch.setattr(swept_how_many, "race_to_the_top", noted)
    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(Riders, "advance", stopped)
        gf.ghost_model(open_unloaded(folder), text, run=run, **asked)
    assert len(judged) == 3, "the dense model, 1 and 2 layers"
    layers, _ = read_by_layer(monkeypatch)
    _, report = gf.ghost_model(open_unloaded(folder), text, run=run, **asked)
    assert report.budget is not None
    assert [trial.remove for trial in report.budget.tried] == [1, 2, 3, 4]
    assert len(judged) == 5, "4 and 3"
    if read is not None:
        assert layers == read


def test_too_little_text_to_learn_from(tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    text = [torch.ones(1, 20, dtype=torch.int64)] * 4  # 60 of 80 tokens are not held out
    for given in (gf.load_model(tmp_path)[0], open_unloaded(tmp_path)):
        with pytest.raises(CalibrationError, match="expected at least 64 calibration tokens"):
            gf.ghost_model(given, text, gf.PerplexityBound(0.1), criterion="shortgpt", run=RUN)


def test_numbers_that_a_criterion_cannot_choose_are_refused_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is read for a model of which no layer can go."""
    saved(tmp_path, "llama")
    unloaded = open_unloaded(tmp_path)

    def refuses(*_: Any) -> Any:
        raise UnsupportedModelError("no run of 1 layers can go")

    monkeypatch.setattr(swept_how_many, "intervals_of", refuses)
    layers, _ = read_by_layer(monkeypatch)
    with pytest.raises(UnsupportedModelError, match="no run of 1 layers"):
        gf.ghost_model(unloaded, [torch.ones(8, 40, dtype=torch.int64)], gf.PerplexityBound(1.0))
    assert layers == []


def test_gaps_that_may_come_are_planned_for(tmp_path: Path) -> None:
    model = saved(tmp_path, "llama")
    text, bound = list(iterate_batches(spoken_with_gaps(model))), gf.PerplexityBound(0.1)
    found = {}
    for criterion in ("ghost", "streamline", "shortgpt"):
        asked = Asked(bound, criterion, "ghost", gf.GhostOptions(), replace(RUN, corrections=1))
        work = asked.work(text, Shape.of(open_unloaded(tmp_path)))
        assert work.trying is not None and work.correcting is not None
        found[criterion] = work.in_sequence, work.trying.in_pieces, work.correcting.ghosts
    assert found == {
        "ghost": (1, False, 1),
        "streamline": (1, False, 1),
        "shortgpt": (3, True, 3),
    }
    assert max(len(removed_intervals(list(r), 6)) for r in ([0, 2, 4], [1, 3, 5])) == 3
