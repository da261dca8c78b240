"""run_grid: what its cells hold, what is shared, and that it goes on after it was killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ghosted_fast.errors import ArgumentError, CalibrationError
from ghosted_fast.grid import After, GridPlan, Variant, cells, corrected, healed, run_grid
from ghosted_fast.grid import judge as judge_module
from ghosted_fast.grid import run as grid_run
from ghosted_fast.grid.state import STATE_FILE
from ghosted_fast.measure.perplexity import perplexity, perplexity_from
from ghosted_fast.options import GhostOptions, HealOptions, RunOptions
from ghosted_fast.pipeline import ghost_model
from ghosted_fast.recovery import RECOVERIES
from ghosted_fast.surgery.cut import prune_model
from ghosted_fast.testing import random_tokens, tiny_model
from ghosted_fast.text.batches import Batch

TEXTS = {"first": [random_tokens(6, 24, 90)], "second": [random_tokens(6, 24, 91)]}


def calibration() -> list[torch.Tensor]:
    return [random_tokens(8, 24, seed) for seed in range(4)]


def run(output: Path, model: Any = None, **options: Any) -> Any:
    asked = {
        "remove": [1, 2],
        "criteria": ["ghost", "shortgpt"],
        "recoveries": list(RECOVERIES),
        **options,
    }
    direct = {name: asked.pop(name) for name in ("remove", "options", "run") if name in asked}
    model = model or tiny_model("llama")
    return run_grid(model, calibration(), TEXTS, output=output, plan=GridPlan(**asked), **direct)


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Count the models whose perplexity is measured."""
    seen: list[Any] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        seen.append(args)
        return perplexity_from(*args, **kwargs)

    monkeypatch.setattr(judge_module, "perplexity_from", counted)
    yield seen


@pytest.mark.slow
def test_rows_hold_what_the_single_calls_give(tmp_path: Path) -> None:
    model = tiny_model("llama")
    found = run(tmp_path / "grid", model)
    assert len(found.rows) == 2 * 2 * len(RECOVERIES)
    for row in found.rows:
        kwargs = {"removed": row["removed"], "recovery": row["recovery"]}
        if row["recovery"].startswith("replaceme") and 0 in row["removed"]:
            assert "keep layer 0" in row["refused"]
            continue
        smaller, _ = ghost_model(model, calibration(), **kwargs, run=RunOptions(corrections=0))
        for text, batches in TEXTS.items():
            exact = perplexity(smaller, batches)
            assert row["perplexity"][text]["value"] == pytest.approx(exact.value, rel=1e-6)
            assert row["perplexity"][text]["low"] == pytest.approx(exact.low, rel=1e-6)
        assert row["parameters"] == sum(p.numel() for p in smaller.parameters())
        assert row["corrections"] == 0 and row["peak_memory"] > 0
        assert row["seconds"]["select"] > 0 and row["seconds"]["recover"] > 0
        dense = perplexity(model, TEXTS["first"]).value
        excess = row["perplexity"]["first"]["value"] / dense - 1
        assert row["excess"]["first"] == pytest.approx(excess, abs=1e-5)


@pytest.mark.slow
def test_marks(tmp_path: Path) -> None:
    found = run(tmp_path, criteria=["ghost", "streamline", "shortgpt"])
    for count in (1, 2):
        rows = [row for row in found.rows if row["remove"] == count]
        (ours,) = [row for row in rows if "default" in row["marks"]]
        assert (ours["criterion"], ours["recovery"]) == ("ghost", "ghost")
        rivals = [
            row["perplexity"]["first"]["value"]
            for row in rows
            if row["criterion"] != "ghost" and row["recovery"] != "ghost" and row["perplexity"]
        ]
        best = [row for row in rows if "best published" in row["marks"]]
        assert best and all(row["perplexity"]["first"]["value"] == min(rivals) for row in best)


@pytest.mark.slow
def test_a_variant_may_have_criteria_of_its_own(tmp_path: Path) -> None:
    variant = Variant("mine", "ghost-paper", criteria=("ghost",))
    found = run(tmp_path, recoveries=["none", variant], remove=[2])
    pairs = {(row["criterion"], row["recovery"]) for row in found.rows}
    assert pairs == {("ghost", "none"), ("shortgpt", "none"), ("ghost", "mine")}


@pytest.mark.slow
def test_equal_sets_are_judged_once(tmp_path: Path, evaluated: list[Any]) -> None:
    found = run(tmp_path, criteria=["streamline", "angular", "shortgpt"])
    sets = {tuple(row["removed"]) for row in found.rows}
    refused = {(*row["removed"], row["recovery"]) for row in found.rows if row["refused"]}
    assert len(evaluated) == len(TEXTS) * (1 + len(sets) * len(RECOVERIES) - len(refused))


def test_the_dense_part_below_a_gap_is_computed_once() -> None:
    model = tiny_model("llama")
    ids = random_tokens(6, 24, 90)
    judge = judge_module.Judge(model, {"text": [Batch(ids, torch.ones_like(ids))]}, None, 0)
    ran = []

    def note(_: object, __: object, output: torch.Tensor) -> None:
        if output.shape[1] == ids.shape[1]:
            ran.append(1)

    model.model.layers[1].register_forward_hook(note)
    for removed in ([4], [4, 5], [5]):
        smaller = prune_model(model, removed)
        exact = perplexity(smaller, [ids])
        ran.clear()
        found = judge(smaller, removed[0])["perplexity"]["text"]
        assert found["value"] == exact.value and found["high"] == exact.high
        assert len(ran) == (removed != [4, 5])
    assert judge(model)["perplexity"]["text"]["value"] == perplexity(model, [ids]).value


@pytest.mark.slow
def test_one_pass_serves_all_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    run(tmp_path / "a", model, recoveries=["none"])
    calls = []
    fit = cells.fit_patches

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[2])
        return fit(*args, **kwargs)

    monkeypatch.setattr(cells, "fit_patches", counted)
    once = run(tmp_path / "b", model, recoveries=["ghost-paper", "replaceme"])
    assert len(calls) == 1
    calls.clear()
    often = run(
        tmp_path / "c",
        model,
        recoveries=["ghost-paper", "replaceme"],
        run=RunOptions(memory_budget=16 * 32 * 32),
        criteria=["streamline", "shortgpt"],
    )
    assert len(calls) > 1
    assert [r["perplexity"] for r in once.rows if r["criterion"] == "shortgpt"] == [
        r["perplexity"] for r in often.rows if r["criterion"] == "shortgpt"
    ]


@pytest.mark.slow
def test_variants_change_models_of_their_own(tmp_path: Path) -> None:
    def spoil(smaller: Any, dense: Any, batches: Any) -> int:
        assert len(dense.model.layers) == 6 and len(batches) == 4
        for layer in smaller.model.layers:
            if getattr(layer, "ghost", None) is not None:
                layer.ghost.weight.data.add_(0.3)
        return After(corrections=2)

    variants = ["ghost", Variant("ghost + 2 corrections", "ghost", spoil), "ghost-paper"]
    found = run(tmp_path, criteria=["streamline"], recoveries=variants)
    plain = run(tmp_path / "plain", criteria=["streamline"], recoveries=["ghost"])
    for count in (1, 2):
        rows = {r["recovery"]: r for r in found.rows if r["remove"] == count}
        spoiled = rows["ghost + 2 corrections"]
        assert (spoiled["corrections"], rows["ghost"]["corrections"]) == (2, 0)
        assert not spoiled["published"] and rows["ghost-paper"]["published"]
        assert spoiled["perplexity"] != rows["ghost"]["perplexity"]
        same = next(r for r in plain.rows if r["remove"] == count)
        assert same["perplexity"] == rows["ghost"]["perplexity"]


@pytest.mark.slow
def test_corrections_are_those_of_ghost_model(tmp_path: Path) -> None:
    model = tiny_model("llama")
    variants = ["ghost", corrected(), corrected(1)]
    found = run(tmp_path, model, criteria=["ghost"], recoveries=variants, remove=[2])
    rows = {row["recovery"]: row for row in found.rows}
    for name, kwargs in (
        ("ghost + corrections", {}),
        ("ghost + 1 corrections", {"corrections": 1}),
    ):
        removed = rows[name]["removed"]
        smaller, report = ghost_model(
            model, calibration(), removed=removed, run=RunOptions(**kwargs)
        )
        assert rows[name]["corrections"] == sum(item.accepted for item in report.corrections)
        exact = perplexity(smaller, TEXTS["first"]).value
        assert rows[name]["perplexity"]["first"]["value"] == pytest.approx(exact, rel=1e-5)
    assert rows["ghost"]["marks"] == [] and "default" in rows["ghost + corrections"]["marks"]
    assert found.default_pair == ("ghost", "ghost + corrections")
    assert not any(row["published"] for row in found.rows)
    with pytest.raises(ArgumentError, match=r"an operator of its own.* got 'replaceme'"):
        corrected(1, "replaceme")
    with pytest.raises(ArgumentError, match="corrections"):
        corrected(-1)


@pytest.mark.slow
def test_healing_is_that_of_ghost_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = HealOptions.__init__
    monkeypatch.setattr(  # the text is short
        HealOptions,
        "__init__",
        lambda self, **more: real(self, **{"tokens_per_step": 96, "held_out_tokens": 192, **more}),
    )
    model = tiny_model("llama")
    names = ["ghost", "none", "replaceme"]
    names += [healed(500, recovery) for recovery in names]
    found = run(tmp_path, model, criteria=["streamline"], recoveries=names, remove=[2])
    rows = {row["recovery"]: row for row in found.rows}
    for recovery in ("none", "replaceme", "ghost"):
        row = rows[f"{recovery} healed, 500 tokens"]
        options = RunOptions(heal=HealOptions(tokens=500))
        smaller, report = ghost_model(
            model, calibration(), removed=row["removed"], recovery=recovery, run=options
        )
        assert report.healing is not None and row["removed"][0] > 0
        assert row["healing"]["after"] == report.healing.after
        assert recovery == "ghost" or report.healing.after < report.healing.before
        # Layers below the gap were trained too: the dense states there do not serve.
        exact = perplexity(smaller, TEXTS["first"]).value
        assert row["perplexity"]["first"]["value"] == pytest.approx(exact, rel=1e-5)
        assert not row["published"] and rows[recovery]["healing"] is None
    table = (tmp_path / "results.md").read_text()
    assert "| trained |" in table and "rank 32, 5" in table and "| nothing |" in table
    with pytest.raises(ArgumentError, match="tokens >= 1"):
        healed(0)
    with pytest.raises(ArgumentError, match="expected a recovery out of"):
        healed(5, "magic")


def test_what_is_done_afterwards_says_what_it_did(tmp_path: Path) -> None:
    old = Variant("ghost + 1", "ghost", lambda *_: 1)  # type: ignore[arg-type, return-value]
    with pytest.raises(TypeError, match=r"to return an After\(corrections=.*, got 1"):
        run(tmp_path, criteria=["streamline"], recoveries=[old], remove=[1])


@pytest.mark.slow
def test_accuracy_and_speed(tmp_path: Path) -> None:
    speed = {"prompt_length": 4, "new_tokens": 2, "seconds": 0.2}
    found = run(
        tmp_path,
        criteria=["streamline"],
        accuracy=lambda model: {"quiz": len(model.model.layers) / 10},
        speed=speed,
    )
    for row in found.rows:
        if row["refused"] is None:
            assert row["accuracy"] == {"quiz": (6 - row["remove"]) / 10}
            assert row["decode_ratio"]["low"] > 0 and row["decode_tokens_per_s"]["low"] > 0
    keys = (json.loads(line).get("key", [""]) for line in (tmp_path / STATE_FILE).open())
    shapes = sorted(key[2:] for key in keys if key[0] == "speed")
    more = {"raw": 32 * 32, "normed": 32 * 32, "raw with bias": 32 * 32 + 32}
    bare = {count: prune_model(tiny_model("llama"), range(6 - count)) for count in (4, 5)}
    sizes = {count: sum(p.numel() for p in model.parameters()) for count, model in bare.items()}
    assert shapes == sorted(
        [count, size + more.get(kind, 0), [kind] * bool(kind)]
        for count, size in sizes.items()
        for kind in ("", *more)
    )
    assert "quiz" in (tmp_path / "results.md").read_text()
    with pytest.raises(ArgumentError, match=r"other settings.*accuracy"):
        run(tmp_path, criteria=["streamline"])


@pytest.mark.slow
def test_a_stopped_run_goes_on(
    tmp_path: Path, evaluated: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    whole = run(tmp_path / "whole", model)
    total = len(evaluated)
    evaluated.clear()
    judge = judge_module.Judge.__call__

    def interrupted(*args: Any) -> Any:
        if len(evaluated) >= 8:
            raise KeyboardInterrupt
        return judge(*args)

    monkeypatch.setattr(judge_module.Judge, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", model)
    assert not (tmp_path / "cut" / "results.json").exists()
    monkeypatch.setattr(judge_module.Judge, "__call__", judge)
    state = tmp_path / "cut" / STATE_FILE
    before = state.read_text()
    state.write_text(before + '{"key": ["cell", [2], "no')  # a line that was cut off
    monkeypatch.setattr(grid_run, "select_layers", None)  # all selections are known
    again = run(tmp_path / "cut", model)
    assert len(evaluated) == total and state.read_text().startswith(before)
    for one, other in zip(whole.rows, again.rows, strict=True):
        for key in ("removed", "recovery", "perplexity", "marks", "parameters"):
            assert one[key] == other[key]


@pytest.mark.slow
def test_a_killed_process_goes_on(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from ghosted_fast.grid.judge import Judge\n"
        "judge, turns = Judge.__call__, iter(range(5))\n"
        "def stopping(*args):\n"
        "    if next(turns) == 4:\n"
        "        print('stopped', flush=True); sys.stdin.read()\n"
        "    return judge(*args)\n"
        "Judge.__call__ = stopping\n"
        "from grid.test_grid import run; run(Path(sys.argv[1]))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    state = tmp_path / STATE_FILE
    assert process.stdout is not None and process.stdout.readline() == b"stopped\n"
    assert state.read_text().count('"cell"') >= 3
    with pytest.raises(ArgumentError, match="another run is writing"):
        run(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = state.read_text()
    before = before[: before.rfind("\n") + 1]
    run(tmp_path)
    assert state.read_text().startswith(before)
    keys = [json.loads(line).get("key") for line in state.read_text().splitlines()]
    assert len({json.dumps(key) for key in keys}) == len(keys)


@pytest.mark.slow
def test_a_later_run_asks_for_more(tmp_path: Path, evaluated: list[Any]) -> None:
    run(tmp_path, recoveries=["none"], remove=[1])
    evaluated.clear()
    found = run(tmp_path, recoveries=["none", "linearpatch-d"], remove=[1])
    sets = {tuple(row["removed"]) for row in found.rows}
    assert len(evaluated) == len(TEXTS) * len(sets)


@pytest.mark.slow
def test_results_of_other_settings_are_kept(tmp_path: Path) -> None:
    run(tmp_path, recoveries=["none"])
    for change, what in (
        ({"options": GhostOptions(features="raw")}, "ghosts"),
        ({"model": tiny_model("llama", seed=1)}, "weights"),
        ({"model": tiny_model("llama", dtype=torch.bfloat16)}, "dtype: there float32, now bfloat"),
    ):
        with pytest.raises(ArgumentError, match=f"other settings.*{what}.*overwrite"):
            run(tmp_path, recoveries=["none"], **change)
    with pytest.raises(ArgumentError, match=r"other settings.*calibration"):
        run_grid(tiny_model("llama"), calibration()[:3], TEXTS, [1], tmp_path)
    found = run(tmp_path, recoveries=["none"], model=tiny_model("llama", seed=1), overwrite=True)
    assert found.about["weights"] in (tmp_path / STATE_FILE).read_text()
    (tmp_path / STATE_FILE).write_text("not ours\n")
    with pytest.raises(ArgumentError, match="is damaged"):
        run(tmp_path, recoveries=["none"])
    run(tmp_path, recoveries=["none"], overwrite=True)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"criterion out of ghost, .* got 'luck'"):
        run(tmp_path, criteria=["luck"])
    with pytest.raises(ArgumentError, match=r"recovery out of none, .* got 'magic'"):
        run(tmp_path, recoveries=["magic"])
    with pytest.raises(ArgumentError, match=r"remove in 1\.\.5"):
        run(tmp_path, remove=[1, 6])
    with pytest.raises(ArgumentError, match="at least one number of layers, and each once"):
        run(tmp_path, remove=[2, 2])
    with pytest.raises(ArgumentError, match="at least one recovery, and each once"):
        run(tmp_path, recoveries=["none", Variant("none", "ghost")])
    model = tiny_model("llama")
    with pytest.raises(ArgumentError, match="at least one evaluation text"):
        run_grid(model, calibration(), {}, [1], tmp_path)
    with pytest.raises(ArgumentError, match="tokens to predict in the text 'short'"):
        run_grid(model, calibration(), {"short": [random_tokens(1, 1)]}, [1], tmp_path)
    with pytest.raises(CalibrationError, match="at least 64 calibration tokens"):
        run_grid(model, [random_tokens(1, 20)], TEXTS, [1], tmp_path)
    assert not list(tmp_path.iterdir())
