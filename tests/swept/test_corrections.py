"""Corrections of a model that is swept through: the ghosts of the way in memory, and resume."""

from __future__ import annotations

import contextlib
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.swept_models import Killed, killed_at_write, saved, text

import ghosted_fast as gf
from ghosted_fast.errors import CalibrationError
from ghosted_fast.fit.sweep.shelf import FolderShelf
from ghosted_fast.improve import correction
from ghosted_fast.improve.swept import SweptComparison
from ghosted_fast.models.unloaded.files import StoredTensor
from ghosted_fast.models.unloaded.opening import open_unloaded
from ghosted_fast.options import Count, GhostOptions, Layers
from ghosted_fast.surgery.folder import FolderCut
from ghosted_fast.swept import asked as asked_module
from ghosted_fast.swept.asked import Asked
from ghosted_fast.testing import random_tokens, relative_rms
from ghosted_fast.text.batches import iterate_batches

STEPS = 2


def options(**changes: Any) -> gf.RunOptions:
    return gf.RunOptions(**{"corrections": STEPS, "score_tokens": 64, **changes})


def ghosts_in(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of all ghosts in a folder."""
    files = (load_file(path) for path in sorted(folder.glob("*.safetensors")))
    return {name: tensor for held in files for name, tensor in held.items() if "ghost" in name}


def corrected(folder: Path, out: Path, run: gf.RunOptions, **asked: Any) -> tuple[Any, Any]:
    """Return the ghosts of a model that was swept through, and the report."""
    smaller, report = gf.ghost_model(open_unloaded(folder), text(), run=run, **asked)
    assert isinstance(smaller, FolderCut)
    return ghosts_in(smaller.save(out, overwrite=True)), report


def assert_same_corrections(folder: Path, family: str, **asked: Any) -> None:
    model = saved(folder / "dense", family)
    ghosts, report = corrected(folder / "dense", folder / "out", options(), **asked)
    plain, _ = corrected(folder / "dense", folder / "out", options(corrections=0), **asked)
    theirs, expected = gf.ghost_model(model, text(), run=options(), **asked)
    others = theirs.state_dict()
    assert report.removed == expected.removed
    assert len(report.corrections) == STEPS
    assert any(fact.accepted for fact in report.corrections)
    for mine, other in zip(report.corrections, expected.corrections, strict=True):
        assert mine.accepted == other.accepted
        values = (other.before, other.after)
        # A divergence is known to 1e-7 nats; that of the tiny gpt2 is 8e-6.
        assert (mine.before, mine.after) == pytest.approx(values, rel=1e-5, abs=1e-8)
        assert mine.change == pytest.approx(other.change, rel=0.02)  # has three digits
    assert ghosts.keys() == {name for name in others if "ghost" in name}
    for name, tensor in ghosts.items():
        assert relative_rms(tensor, others[name]) <= 1e-5, name
    weights = [name for name in ghosts if name.endswith("weight")]
    assert all(relative_rms(ghosts[name], plain[name]) > 1e-3 for name in weights), "moved"
    assert report.seconds["correct"] > 0.0


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "mixtral"])
def test_ghosts_are_those_of_the_way_in_memory(tmp_path: Path, family: str) -> None:
    assert_same_corrections(tmp_path, family, removed=[1, 3, 4])


@pytest.mark.parametrize(
    "asked",
    [
        {"remove": 2},
        {"remove": 3, "criterion": "shortgpt"},
        {"removed": [5]},
        {"removed": [0, 2, 5], "options": GhostOptions(bias=True, first_state="on")},
        {"removed": [1, 3], "options": GhostOptions(features="raw", sequential=False)},
    ],
    ids=lambda asked: "-".join(str(value) for value in asked.values())[:40],
)
def test_with_other_criteria_gaps_and_ghosts(tmp_path: Path, asked: dict[str, Any]) -> None:
    assert_same_corrections(tmp_path, "llama", **asked)


def test_what_it_costs_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(tmp_path, "llama")
    gf.ghost_model(open_unloaded(tmp_path), text(), removed=[2], run=options())
    (said,) = (r.getMessage() for r in caplog.records if "each correction reads" in r.getMessage())
    assert "the layers above the first gap 4 times, the head 3 times" in said


def test_what_is_planned_is_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of steps whose first trial is the last one, and that are taken whole or not at all."""
    saved(tmp_path, "llama")
    monkeypatch.setattr(correction, "_MOST_TRIALS", 1)
    monkeypatch.setattr(correction, "_SHARES", (1.0,))
    read = 0
    original = StoredTensor.read

    def noted(tensor: StoredTensor) -> torch.Tensor:
        nonlocal read
        read += tensor.nbytes
        return original(tensor)

    monkeypatch.setattr(StoredTensor, "read", noted)
    unloaded, batches = open_unloaded(tmp_path), list(iterate_batches(text()))
    found = {}
    for steps in (1, 5):
        run, read = options(corrections=steps), 0
        gf.ghost_model(unloaded, batches, removed=[1], run=run)
        plan = Asked(Layers((1,)), "ghost", "ghost", GhostOptions(), run).plan(unloaded, batches)
        assert plan.corrections == steps
        found[steps] = read, plan
    one, five = found[1], found[5]
    assert five[0] - one[0] == pytest.approx(4 * one[1].correction_bytes, rel=0.02)
    assert five[1].read_bytes - one[1].read_bytes == 4 * one[1].correction_bytes
    assert five[0] == pytest.approx(five[1].read_bytes, rel=0.05)


def test_a_text_that_is_too_short_is_told_before_any_weight_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path, "llama")
    with monkeypatch.context() as patch:
        patch.delattr(StoredTensor, "read")
        with pytest.raises(CalibrationError, match="at least 128 held-out tokens"):
            gf.ghost_model(open_unloaded(tmp_path), text()[:2], removed=[1], run=options())
    run = options(corrections="auto")
    _, report = gf.ghost_model(open_unloaded(tmp_path), text(), removed=[1], run=run)
    assert report.corrections == []
    assert "144 tokens of the text can be held out" in caplog.text


@pytest.mark.slow
def test_auto_means_what_it_means_in_memory(tmp_path: Path) -> None:
    model = saved(tmp_path, "llama")
    batches = [random_tokens(8, 32, seed) for seed in range(34)]
    run = options(corrections="auto")
    _, report = gf.ghost_model(open_unloaded(tmp_path), batches, removed=[2, 3], run=run)
    _, expected = gf.ghost_model(model, batches, removed=[2, 3], run=run)
    assert [fact.accepted for fact in report.corrections] == [
        fact.accepted for fact in expected.corrections
    ]
    assert 1 < len(report.corrections) <= 8
    assert report.corrections[-1].after == pytest.approx(expected.corrections[-1].after, rel=1e-4)


def test_auto_makes_none_where_memory_is_too_little_for_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, "llama")
    for module in (correction, asked_module):
        monkeypatch.setattr(module, "FEWEST_FOR_AUTO", 100)
    batches = text()
    unloaded = open_unloaded(tmp_path)
    run = options(corrections="auto", state=tmp_path / "s")
    asked = Asked(Layers((2,)), "ghost", "ghost", GhostOptions(), run)
    plan = asked.plan(unloaded, list(iterate_batches(batches)))
    assert plan.corrections == 8
    none = replace(asked, run=replace(run, corrections=0))
    less = none.plan(unloaded, list(iterate_batches(batches)))
    memory = (plan.memory_bytes + less.memory_bytes) // 2
    assert less.memory_bytes < memory < plan.memory_bytes
    run = replace(run, memory=memory)
    _, report = gf.ghost_model(unloaded, batches, removed=[2], run=run)
    assert report.corrections == []
    assert "ghosts are not corrected: 0.6 GB of memory do not suffice" in caplog.text
    with pytest.raises(CalibrationError, match="make no corrections"):
        gf.ghost_model(unloaded, batches, removed=[2], run=replace(run, corrections=1))


def test_a_run_that_is_stopped_goes_on_at_the_last_correction(tmp_path: Path) -> None:
    saved(tmp_path / "dense", "llama")
    run = options(state=tmp_path / "state")
    asked = {"removed": [1, 3, 4]}
    made: list[int] = []
    gradients, value = SweptComparison.gradients, SweptComparison.value

    def counted(comparison: SweptComparison, numbers: Any) -> Any:
        made.append(numbers[0])
        return gradients(comparison, numbers)

    for stop in (1, 2, 4, None):

        def stopped(comparison: SweptComparison, stop: int | None = stop) -> float:
            if len(made) == stop:
                raise Killed
            return value(comparison)

        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
            patch.setattr(SweptComparison, "gradients", counted)
            patch.setattr(SweptComparison, "value", stopped)
            mine, report = corrected(tmp_path / "dense", tmp_path / "mine", run, **asked)
    # Stopped in the first; again in the first; in the second, of which alone is left to do.
    assert len(made) == 5, made
    assert not (tmp_path / "state").exists()
    plain, expected = corrected(tmp_path / "dense", tmp_path / "plain", options(), **asked)
    assert mine.keys() == plain.keys()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in mine.items())
    facts = ([replace(f, seconds=0.0) for f in r.corrections] for r in (report, expected))
    assert next(facts) == next(facts)


@pytest.mark.parametrize(("asked", "times"), [({"removed": [1, 3, 4]}, 12), ({"remove": 2}, 6)])
def test_a_run_that_is_stopped_many_times_ends_with_the_same_bits(
    tmp_path: Path, asked: dict[str, Any], times: int
) -> None:
    """Each time at another write of states or of the record, which is left half done."""
    saved(tmp_path / "dense", "llama")
    run = options(state=tmp_path / "state")
    stops = random.Random(0)
    killed = 0
    for _ in range(times):
        with killed_at_write(stops.randrange(1, 40)) as met:
            corrected(tmp_path / "dense", tmp_path / "mine", run, **asked)
        killed += len(met)
    assert killed > times // 2
    mine, _ = corrected(tmp_path / "dense", tmp_path / "mine", run, **asked)
    plain, _ = corrected(tmp_path / "dense", tmp_path / "plain", options(), **asked)
    assert all(torch.equal(tensor, plain[name]) for name, tensor in mine.items())


@pytest.mark.parametrize("asked", [{"removed": [1, 3, 4]}, {"remove": 2}])
def test_the_disk_holds_no_more_than_is_planned(
    tmp_path: Path, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path / "dense", "llama")
    run = options(state=tmp_path / "state")
    most = 0
    original = FolderShelf.add

    def weighed(shelf: FolderShelf, name: str, states: torch.Tensor) -> None:
        nonlocal most
        original(shelf, name, states)
        most = max(most, sum(path.stat().st_size for path in (tmp_path / "state").iterdir()))

    monkeypatch.setattr(FolderShelf, "add", weighed)
    corrected(tmp_path / "dense", tmp_path / "mine", run, **asked)
    wanted = Count(2) if "remove" in asked else Layers((1, 3, 4))
    made = Asked(wanted, "ghost", "ghost", GhostOptions(), run)
    plan = made.plan(open_unloaded(tmp_path / "dense"), list(iterate_batches(text())))
    uncorrected = replace(made, run=replace(run, corrections=0))
    less = uncorrected.plan(open_unloaded(tmp_path / "dense"), list(iterate_batches(text())))
    assert less.disk_bytes < plan.disk_bytes
    assert 0.5 * plan.disk_bytes < most <= plan.disk_bytes
