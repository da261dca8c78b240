"""Verbs that are killed at random moments: the old output is whole, or the new one is.

Half of the moments are drawn from the changes to files that a verb makes, the others by time.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.kills import Work, clear_leftovers, logits_of, need_exchange, run_in_child, which
from support.tiny_engines import byte_tokenizer, engine_model, ghosted

from ghosted_fast.checkpoint.recipe import read_recipe
from ghosted_fast.checkpoint.save import save_model
from ghosted_fast.cli.app import app

pytestmark = pytest.mark.slow
SMALL = ("--tokens", 256, "--sequence-length", 32)


@pytest.fixture(autouse=True)
def verified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check every weight of a folder whenever it is loaded."""
    monkeypatch.setenv("GHOSTED_FAST_VERIFY", "1")


def verb(*arguments: object) -> Work:
    """Return the work of a command line, which must end well."""
    words = [str(argument) for argument in arguments]

    def work() -> None:
        status = app(words, standalone_mode=False)
        assert not status, words

    return work


def kill_often(work: Work, count: int, check: Callable[[], None], share: float = 0.6) -> None:
    """Kill a work so often, at changes to files and by time, and check what is there each time.

    How long the work takes only says between which moments to draw one: whatever it is, and
    whichever moment is met, the checks must hold.
    """
    begun = time.perf_counter()
    changes = run_in_child(work)
    seconds = time.perf_counter() - begun
    assert changes is not None and changes > 3
    check()
    chance, killed = random.Random(0), 0
    for number in range(count):
        if number < share * count:
            ended = run_in_child(work, at=chance.randint(1, changes))
        else:
            ended = run_in_child(work, after=chance.uniform(0.0, seconds))
        assert ended is None or ended <= 2 * changes
        killed += ended is None
        check()
    assert killed >= share * count / 2


@pytest.mark.parametrize("is_there", [True, False], ids=["over_an_old_one", "a_new_one"])
def test_fit(model_folder: Path, texts: Path, tmp_path: Path, is_there: bool) -> None:
    fit = ("fit", "--model", model_folder, "--calibration", texts, "--corrections", 0, *SMALL)
    old, new, target = tmp_path / "old", tmp_path / "new", tmp_path / "place" / "model"
    verb(*fit, "--removed", 3, "--output", old)()
    verb(*fit, "--removed", "1-2", "--output", new)()
    known, removed = [logits_of(old), logits_of(new)], ["3", "1-2"]
    if is_there:
        shutil.copytree(old, target)
        need_exchange(target)

    def check() -> None:
        assert target.exists() or not is_there, "the old output is gone"
        if target.exists():
            found = which(target, known)
            assert read_recipe(target)["fit"]["removed"] == removed[found]
            shutil.rmtree(target)
        clear_leftovers(target, known)
        if is_there:
            shutil.copytree(old, target)

    target.parent.mkdir(exist_ok=True)
    work = verb(*fit, "--removed", "1-2", "--output", target, "--overwrite")
    kill_often(work, 24 if is_there else 12, check)


def test_import(model_folder: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"{name}.safetensors" for name in ("old", "new")]
    for seed, path in enumerate(files):
        change = torch.randn(32, 32, generator=torch.Generator().manual_seed(seed)) / 20
        save_file({"gap_0.weight": torch.eye(32) + change}, path)
    told = ("--model", model_folder, "--form", "full", "--layout", "in-out")
    old, new, target = tmp_path / "old", tmp_path / "new", tmp_path / "place" / "model"
    verb("import", files[0], *told, "--removed", 3, "--output", old)()
    verb("import", files[1], *told, "--removed", 2, "--output", new)()
    known = [logits_of(old), logits_of(new)]
    shutil.copytree(old, target)
    need_exchange(target)

    def check() -> None:
        if which(target, known):
            shutil.rmtree(target)
            shutil.copytree(old, target)
        clear_leftovers(target, known)

    work = verb("import", files[1], *told, "--removed", 2, "--output", target, "--overwrite")
    kill_often(work, 16, check)


def test_export(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    models = [ghosted(engine_model(seed=seed), (3,), norm_eps=1e-6) for seed in range(2)]
    tokenizer, target = byte_tokenizer(), tmp_path / "place" / "model.gguf"
    target.parent.mkdir()
    known = []
    for seed, model in enumerate(models):
        folder = save_model(model, tmp_path / f"model{seed}", tokenizer)
        verb("export", folder, "--to", "gguf", "--output", target, "--overwrite")()
        known.append(target.read_bytes())
    assert known[0] != known[1]
    target.write_bytes(known[0])

    def check() -> None:
        assert target.read_bytes() in known
        target.write_bytes(known[0])
        clear_leftovers(target)

    work = verb("export", tmp_path / "model1", "--to", "gguf", "--output", target, "--overwrite")
    kill_often(work, 16, check)


def test_grid(model_folder: Path, texts: Path, tmp_path: Path) -> None:
    grid = ("grid", "--model", model_folder, "--calibration", texts, "--evaluation", texts,
            "--evaluation-tokens", 128, "--remove", "1,2", "--criterion", "streamline",
            "--recovery", "none", "--recovery", "ghost", "--corrections", 0, *SMALL)  # fmt: skip
    verb(*grid, "--output", tmp_path / "whole")()
    expected, target = outcome(tmp_path / "whole"), tmp_path / "grid"
    work = verb(*grid, "--output", target)
    changes = run_in_child(work)
    assert changes is not None and outcome(target) == expected
    shutil.rmtree(target)
    chance, kills, gone_on = random.Random(0), 0, 0
    while kills < 16:
        known = (target / "state.jsonl").is_file()
        if run_in_child(work, at=chance.randint(1, changes)) is None:
            kills += 1
            gone_on += known
            continue
        assert outcome(target) == expected, "it went on to other results"
        shutil.rmtree(target)
    run_in_child(work)
    assert outcome(target) == expected
    assert gone_on > 3, "hardly a run went on where another was killed"


def outcome(folder: Path) -> Any:
    """Return what a grid has found, without what differs from run to run."""
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    for record in (*found["rows"], *found["selections"]):
        for name in ("seconds", "peak_memory"):
            record.pop(name, None)
    assert (folder / "results.md").is_file() and (folder / "index.html").is_file()
    return found["rows"], found["selections"], found["dense"]["perplexity"]
