"""`ghost_model` of a folder that is never loaded."""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.swept_models import as_pickles, killed_at_write, saved, text
from transformers import AutoModelForCausalLM

import ghosted_fast as gf
from ghosted_fast.errors import (
    ArgumentError,
    CalibrationError,
    SourceError,
    UnsupportedModelError,
)
from ghosted_fast.fit.sweep.shape import Shape
from ghosted_fast.models.unloaded import opening
from ghosted_fast.models.unloaded.files import StoredTensor
from ghosted_fast.models.unloaded.opening import open_unloaded
from ghosted_fast.models.unloaded.source import FolderSource
from ghosted_fast.options import Count, Layers
from ghosted_fast.selection.select import select_layers
from ghosted_fast.surgery.folder import FolderCut
from ghosted_fast.swept import run
from ghosted_fast.swept.asked import Asked
from ghosted_fast.testing import FAMILY_NAMES, random_tokens, relative_rms
from ghosted_fast.text.batches import iterate_batches
from ghosted_fast.text.calibration_text import CalibrationText

RUN = gf.RunOptions(corrections=0, score_tokens=64)
TOKENS = random_tokens(2, 20)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(TOKENS, use_cache=False).logits


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors in a folder."""
    return {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


def assert_same_weights(mine: FolderCut, other: FolderCut, folder: Path) -> None:
    """Save two checkpoints and compare their bits."""
    found, expected = (
        weights(cut.save(folder / name)) for cut, name in ((mine, "mine"), (other, "plain"))
    )
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def both(
    folder: Path, family: str, pickles: bool = False, **asked: Any
) -> tuple[Any, Any, Any, Any]:
    """Return what comes of a model in memory, and of the same in a folder: model and report."""
    model = saved(folder / "dense", family)
    if pickles:
        as_pickles(folder / "dense")
    batches = asked.pop("batches", None) or text()
    asked = {"run": RUN, **asked}
    mine, report = gf.ghost_model(open_unloaded(folder / "dense"), batches, **asked)
    assert isinstance(mine, FolderCut)
    mine.save(folder / "out")
    loaded = AutoModelForCausalLM.from_pretrained(folder / "out")
    return loaded, report, *gf.ghost_model(model, batches, **asked)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_layers_and_ghosts_are_those_of_the_way_in_memory(tmp_path: Path, family: str) -> None:
    mine, report, theirs, expected = both(tmp_path, family, remove=2)
    assert report.removed == expected.removed
    for one, other in zip(report.scores, expected.scores, strict=True):
        assert (one.start, one.stop) == (other.start, other.stop)
        assert one.score == pytest.approx(other.score, rel=1e-5)
    states, others = mine.state_dict(), theirs.state_dict()
    assert states.keys() == others.keys()
    for name, tensor in states.items():
        assert relative_rms(tensor, others[name]) <= 1e-5, name
    assert mine.config.ghost["report"] == theirs.config.ghost["report"] | {
        "model": mine.config.ghost["report"]["model"]
    }


@pytest.mark.parametrize(
    "asked",
    [
        {"remove": 2, "criterion": "streamline"},
        {"remove": 3, "criterion": "shortgpt"},
        {"remove": 2, "criterion": "angular", "recovery": "none"},
        {"remove": 2, "criterion": "lorp"},
        {"removed": [1, 3], "recovery": "nbl"},
        {"removed": [1, 3, 4]},
        {"removed": [0, 2, 5], "options": gf.GhostOptions(bias=True, features="raw")},
        {"removed": [1, 3, 4], "options": gf.GhostOptions(sequential=False)},
        {"removed": [1, 3, 4], "recovery": "linearpatch-r"},
        {"removed": [1, 3], "recovery": "ghost-paper"},
    ],
    ids=lambda asked: "-".join(str(value) for value in asked.values())[:40],
)
def test_criteria_and_recoveries_are_those_in_memory(tmp_path: Path, asked: dict[str, Any]) -> None:
    mine, report, theirs, expected = both(tmp_path, "llama", **asked)
    assert report.removed == expected.removed
    assert report.criterion == expected.criterion
    for one, other in zip(report.scores, expected.scores, strict=True):
        assert one.score == pytest.approx(other.score, rel=1e-5, abs=1e-7)
    assert relative_rms(logits(mine), logits(theirs)) <= 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_files_of_torch_save_are_swept_as_safetensors_are(tmp_path: Path, family: str) -> None:
    mine, report, theirs, expected = both(tmp_path, family, pickles=True, remove=2)
    assert not list((tmp_path / "dense").glob("*.safetensors"))
    assert not list((tmp_path / "out").glob("*.bin*"))
    assert report.removed == expected.removed
    for one, other in zip(report.scores, expected.scores, strict=True):
        assert one.score == pytest.approx(other.score, rel=1e-5)
    states, others = mine.state_dict(), theirs.state_dict()
    assert states.keys() == others.keys()
    for name, tensor in states.items():
        assert relative_rms(tensor, others[name]) <= 1e-5, name


def test_each_layer_is_read_once_to_choose_and_to_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, "llama")
    read: list[tuple[Path, int]] = []
    original = StoredTensor.read

    def noted(tensor: StoredTensor) -> torch.Tensor:
        read.append((tensor.path, tensor.offset))
        return original(tensor)

    monkeypatch.setattr(StoredTensor, "read", noted)
    unloaded = open_unloaded(tmp_path)
    gf.ghost_model(unloaded, text(), remove=2, run=RUN)
    for name, tensor in unloaded.tensors.items():
        assert read.count((tensor.path, tensor.offset)) == 1 + (name == "model.norm.weight"), name


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"remove": 1, "criterion": "taylor"}, "got 'taylor', which needs all layers at once"),
        ({"remove": 1, "criterion": "sleb"}, "expected a criterion out of ghost, streamline"),
        ({"remove": 1, "criterion": "ghost-search"}, "ghost-search"),
        ({"remove": 1, "criterion": "prunecomp"}, "got 'prunecomp', which needs all layers"),
        ({"removed": [1], "recovery": "replaceme"}, "recovery other than 'replaceme'"),
        ({"removed": [1], "recovery": "prunecomp"}, "recovery other than 'prunecomp'"),
        ({"remove": gf.SpeedBound(1.2)}, "got SpeedBound.* measured with the model in memory"),
        ({"remove": gf.PerplexityBound(0.1), "criterion": "sleb"}, "got 'sleb', which needs all"),
        ({"removed": [1], "run": gf.RunOptions(heal=gf.HealOptions())}, "expected heal=None"),
        ({"remove": 2, "run": gf.RunOptions(corrected_candidates=3)}, "expected corrected_cand"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_any_work(
    tmp_path: Path, asked: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, "llama")
    unloaded = open_unloaded(tmp_path)
    monkeypatch.delattr(StoredTensor, "read")
    with pytest.raises(ArgumentError, match=message):
        gf.ghost_model(unloaded, text(), **{"run": RUN, **asked})


def test_layers_that_cannot_go_are_refused_before_any_weight_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, "llama")
    monkeypatch.delattr(StoredTensor, "read")
    for removed in ([], [9], [1, 1], list(range(6))):
        with pytest.raises(ArgumentError):
            gf.ghost_model(open_unloaded(tmp_path), text(), removed=removed, run=RUN)
    with pytest.raises(ArgumentError, match=r"expected remove in 1\.\.5"):
        gf.ghost_model(open_unloaded(tmp_path), text(), remove=6, run=RUN)


def test_memory_decides_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(tmp_path, "llama")
    caplog.set_level(logging.INFO)
    loaded, _ = gf.ghost_model(str(tmp_path), text(), removed=[2], run=RUN)
    assert not isinstance(loaded, FolderCut)
    assert "it is loaded" in caplog.text
    caplog.clear()
    # The program alone takes more than the tiny model: between the two there is nothing.
    with pytest.raises(CalibrationError, match=r"expected at least 0\.6 GB of memory to sweep"):
        gf.ghost_model(
            tmp_path, text(), removed=[2], run=gf.RunOptions(memory=1 << 20, corrections=0)
        )
    said = [record for record in caplog.records if record.name == "ghosted_fast.swept.run"]
    assert len(said) == 1, "one line"
    assert "of 0.0 GB allowed: it is swept through layer by layer" in said[0].getMessage()


@pytest.mark.parametrize(
    ("criterion", "recovery", "sequential", "expected"),
    [
        ("shortgpt", "ghost", True, 3),
        ("ghost-search", "ghost", True, 3),
        ("shortgpt", "ghost", False, 1),
        ("shortgpt", "none", True, 1),
        ("streamline", "ghost", True, 1),
        ("ghost", "ghost", True, 1),
    ],
)
def test_gaps_in_sequence_are_those_that_may_come(
    tmp_path: Path, criterion: str, recovery: str, sequential: bool, expected: int
) -> None:
    saved(tmp_path, "llama")
    options = gf.GhostOptions(sequential=sequential)
    asked = Asked(Count(3), criterion, recovery, options, RUN)
    shape = Shape.of(open_unloaded(tmp_path))
    assert asked.work(list(iterate_batches(text())), shape).in_sequence == expected
    given = Asked(Layers((1, 3, 4)), criterion, recovery, options, RUN)
    two = 2 if recovery == "ghost" and sequential else 1
    assert given.work(list(iterate_batches(text())), shape).in_sequence == two


def test_what_cannot_be_left_in_its_files_is_loaded(tmp_path: Path) -> None:
    model = saved(tmp_path, "llama")
    for file in tmp_path.glob("model*"):
        file.unlink()
    older = {"_use_new_zipfile_serialization": False}
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin", **older)
    with pytest.raises(UnsupportedModelError, match="in the older format"):
        open_unloaded(tmp_path)
    smaller, _ = gf.ghost_model(tmp_path, text(), removed=[2], run=RUN)
    assert smaller.config.ghost["removed"] == [2]


def test_what_cannot_be_moved_stays_where_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    class Quantized:
        def to(self, _: Any) -> None:
            raise ValueError("`.to` is not supported for 8-bit models")

    model = Quantized()
    monkeypatch.setattr(run, "left_in_files", lambda *_: None)
    monkeypatch.setattr(run, "load_model", lambda _: (model, None))
    asked = Asked(Count(2), "ghost", "ghost", gf.GhostOptions(), gf.RunOptions())
    assert run.loaded_or_unloaded("folder", CalibrationText.of([]), asked) is model


def test_states_are_kept_where_they_are_asked_for_and_gone_in_the_end(tmp_path: Path) -> None:
    saved(tmp_path / "dense", "llama")
    state = tmp_path / "state"
    seen: list[int] = []
    original = FolderSource.layer

    def counted(source: FolderSource, index: int, then: int | None = None) -> Any:
        seen.append(len(list(state.glob("boundary-*"))))
        return original(source, index, then)

    run = gf.RunOptions(corrections=0, score_tokens=64, state=state)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FolderSource, "layer", counted)
        mine, _ = gf.ghost_model(open_unloaded(tmp_path / "dense"), text(), remove=2, run=run)
    assert seen == [1, 2, 3, 4, 5, 6]
    assert not state.exists()
    plain, _ = gf.ghost_model(open_unloaded(tmp_path / "dense"), text(), remove=2, run=RUN)
    assert_same_weights(mine, plain, tmp_path)


def test_a_run_that_is_stopped_20_times_ends_with_the_same_bits(tmp_path: Path) -> None:
    """Each time at another write of states or of the record, which is left half done."""
    saved(tmp_path / "dense", "llama")
    run = gf.RunOptions(corrections=0, score_tokens=64, state=tmp_path / "state")
    stops = random.Random(0)

    def ghosted() -> FolderCut:
        smaller, _ = gf.ghost_model(open_unloaded(tmp_path / "dense"), text(), remove=2, run=run)
        return smaller

    killed = 0
    for _ in range(20):
        with killed_at_write(stops.randrange(1, 60)) as met:
            ghosted()
        killed += len(met)
    assert killed > 10
    mine = ghosted()
    plain, _ = gf.ghost_model(open_unloaded(tmp_path / "dense"), text(), remove=2, run=RUN)
    assert_same_weights(mine, plain, tmp_path)


KILLED = """
import sys, torch
import ghosted_fast as gf
from support.swept_models import text
from ghosted_fast.models.unloaded.opening import open_unloaded
torch.set_num_threads(1)
print("ready", flush=True)
run = gf.RunOptions(corrections=0, score_tokens=64, state=sys.argv[2])
smaller, _ = gf.ghost_model(open_unloaded(sys.argv[1]), text(), remove=2, run=run)
smaller.save(sys.argv[3])
print("done", flush=True)
"""


@pytest.mark.slow
def test_processes_that_are_killed_leave_nothing_half_written(tmp_path: Path) -> None:
    """Each is killed a little later than the last, wherever it is then."""
    saved(tmp_path / "dense", "llama")
    command = [sys.executable, "-c", KILLED, *(str(tmp_path / n) for n in ("dense", "s", "out"))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    for number in range(6):
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=environment, stderr=subprocess.PIPE
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        if number < 5:
            time.sleep(0.15 * number)
            process.send_signal(signal.SIGKILL)
        said, errors = process.communicate()
        if "done" in said:
            break
        assert number < 5, errors
        assert not (tmp_path / "out").exists(), "nothing half-written can be loaded"
    plain, _ = gf.ghost_model(open_unloaded(tmp_path / "dense"), text(), remove=2, run=RUN)
    plain.save(tmp_path / "plain")
    assert weights(tmp_path / "out").keys() == weights(tmp_path / "plain").keys()
    for name, tensor in weights(tmp_path / "plain").items():
        assert torch.equal(weights(tmp_path / "out")[name], tensor), name


def test_states_of_another_run_are_refused(tmp_path: Path) -> None:
    saved(tmp_path / "dense", "llama")
    run = gf.RunOptions(corrections=0, score_tokens=64, state=tmp_path / "state")

    class Killed(BaseException):
        pass

    def stop(*_: Any, **__: Any) -> Any:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FolderSource, "head", stop)
        with pytest.raises(Killed):
            gf.ghost_model(open_unloaded(tmp_path / "dense"), text(), remove=2, run=run)
    for batches, asked in ((text()[:4], {"remove": 2}), (text(), {"remove": 3})):
        with pytest.raises(ArgumentError, match="expected the states of the same sweep"):
            gf.ghost_model(open_unloaded(tmp_path / "dense"), batches, run=run, **asked)
    gf.ghost_model(open_unloaded(tmp_path / "dense"), text(), remove=2, run=run)


def test_scores_are_those_of_select_layers_with_many_folds(tmp_path: Path) -> None:
    model = saved(tmp_path, "qwen2")
    options = gf.GhostOptions(folds=2, first_state="off")
    expected = select_layers(model, text(), 1, options=options, run=RUN)
    _, report = gf.ghost_model(open_unloaded(tmp_path), text(), remove=1, options=options, run=RUN)
    assert report.removed == expected.removed
    assert [item.score for item in report.scores] == pytest.approx(
        [item.score for item in expected.scores], rel=1e-5
    )


@pytest.mark.parametrize("memory", [None, 1 << 40])
def test_what_cannot_stay_in_files_is_loaded(
    tmp_path: Path, memory: int | None, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    saved(tmp_path, "llama")

    def fails(*_: Any) -> None:
        raise KeyError("a class")

    monkeypatch.setattr(opening, "_class_for", fails)
    with pytest.raises(SourceError, match=r"got 'a class' \(KeyError\)"):
        open_unloaded(tmp_path)
    caplog.set_level(logging.INFO)
    run = gf.RunOptions(corrections=0, memory=memory)
    smaller, _ = gf.ghost_model(tmp_path, text(), removed=[2], run=run)
    assert not isinstance(smaller, FolderCut)
    (said,) = (r for r in caplog.records if "whatever memory it takes" in r.getMessage())
    assert said.levelno == (logging.INFO if memory is None else logging.WARNING)
