"""The benchmark of the sweep: its checkpoints, its gate, and a limit that is too low."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from support.benchmark_module import BENCHMARKS, load_benchmark
from transformers import AutoModelForCausalLM

from ghosted_fast.errors import GateError
from ghosted_fast.fit.sweep.plan import PROGRAM_BYTES
from ghosted_fast.models.unloaded.opening import open_unloaded
from ghosted_fast.options import Count, GhostOptions, RunOptions
from ghosted_fast.pipeline import ghost_model
from ghosted_fast.swept.asked import Asked
from ghosted_fast.testing import random_tokens, tiny_model
from ghosted_fast.text.batches import iterate_batches
from ghosted_fast.timing.estimates import Estimate


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_benchmark("bench_sweep", monkeypatch)


def choose_others_in_memory(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the way in memory remove a layer more than the sweep."""
    original = bench.ghost_model

    def other(model: object, batches: object, remove: int, **asked: object) -> object:
        return original(model, batches, remove + hasattr(model, "config"), **asked)

    monkeypatch.setattr(bench, "ghost_model", other)


def test_checkpoints_are_whole_and_of_their_shape(bench: ModuleType, tmp_path: Path) -> None:
    bench.make_checkpoint(tmp_path / "tiny", "tiny", 3)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny", dtype="auto")
    assert model.config.num_hidden_layers == 3
    assert model.model.norm.weight.float().eq(1).all()
    assert 0.05 < model.model.layers[2].mlp.up_proj.weight.float().std() < 0.12
    before = (tmp_path / "tiny" / "config.json").stat().st_mtime_ns
    bench.make_checkpoint(tmp_path / "tiny", "tiny", 3)
    assert (tmp_path / "tiny" / "config.json").stat().st_mtime_ns == before, "it was there"


def test_the_gate_stops_at_other_layers(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.check()
    choose_others_in_memory(bench, monkeypatch)
    with pytest.raises(GateError, match="the way in memory"):
        bench.check()


def test_a_limit_that_is_too_low_is_reported(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--shape", "tiny", "--tokens", "512", "--length", "32", "--works", "fit"]
    arguments += ["--memory", "1MB", "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / "bench_sweep.py"), *arguments])
    monkeypatch.setattr(bench, "check", lambda: None)
    with pytest.raises(GateError, match="fit under 1MB failed"):
        bench.main()


def test_a_row_is_written_as_soon_as_its_work_is_done(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "rows.jsonl"
    arguments = ["--shape", "tiny", "--works", "bare", "fit", "--folder", str(tmp_path)]
    arguments += ["--output", str(output), "--corrections", "3"]
    monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / "bench_sweep.py"), *arguments])
    monkeypatch.setattr(bench, "check", lambda: None)

    def worked(_: object, what: str, limit: str) -> dict[str, float]:
        if what == "fit":
            raise GateError(f"no memory in {limit}")
        return {"seconds": 2.0, "peak_bytes": 3e9, "limit_bytes": 7e9}

    monkeypatch.setattr(bench, "in_new_process", worked)
    with pytest.raises(GateError, match="no memory in 7GB"):
        bench.main()
    (row,) = map(json.loads, output.read_text().splitlines())
    assert (row["work"], row["seconds"], row["shape"]) == ("bare", 2.0, "tiny")
    assert row["corrections"] == 3 and row["layers"] == 8


def test_a_sweep_is_compared_with_the_way_in_memory(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = tiny_model("llama"), []
    monkeypatch.setattr(bench, "load_model", lambda *_, **__: (model, None))
    monkeypatch.setattr(
        bench, "fetch_demo_assets", lambda: SimpleNamespace(model="", calibration="")
    )
    monkeypatch.setattr(bench, "load_texts", lambda _: [])
    batches = [random_tokens(4, 48, seed=seed) for seed in range(5)]
    monkeypatch.setattr(bench, "token_batches", lambda *_: batches)
    monkeypatch.setattr(bench, "_COMPARED_REMOVED", 2)

    def timed(works: dict[str, Callable[[], object]], *_: object) -> SimpleNamespace:
        seen.extend(works)
        return SimpleNamespace(
            speedup=lambda name, over: Estimate(
                *((2.0, 1.9, 2.1) if over == "swept" else (0,) * 3), 9
            ),
            seconds=lambda name: Estimate(3.0, 2.9, 3.1, 9),
        )

    monkeypatch.setattr(bench, "in_rounds", timed)
    output = tmp_path / "rows.jsonl"
    arguments = ["--works", "compare", "--output", str(output), "--score-tokens", "64"]
    monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / "bench_sweep.py"), *arguments])
    bench.main()
    (row,) = map(json.loads, output.read_text().splitlines())
    assert seen == ["loaded", "swept"]
    assert (row["work"], row["ratio"]["value"], row["seconds"]) == ("compare", 2.0, 3.0)
    assert bench.described(row).startswith(
        "SmolLM2-135M: 3.0 s swept, over the time in memory: 2.0x ± 0.1"
    )

    choose_others_in_memory(bench, monkeypatch)
    monkeypatch.setattr(bench, "check", lambda: None)
    with pytest.raises(GateError, match="chose other layers"):
        bench.main()
    assert len(output.read_text().splitlines()) == 1


def rows_of(bench: ModuleType, folder: Path, *asked: str) -> list[dict[str, Any]]:
    output = folder / "rows.jsonl"
    places = ["--folder", str(folder / "work"), "--output", str(output)]
    command = [sys.executable, str(BENCHMARKS / "bench_sweep.py"), *asked, *places]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in output.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts memory as Linux does")
def test_layers_are_chosen_fitted_and_cut_in_less_than_the_weights(
    bench: ModuleType, tmp_path: Path
) -> None:
    asked = ("--shape", "ci", "--layers", "20", "--tokens", "2048", "--length", "128")
    limits = ("--memory", "+100MB", "--cut-memory", "+30MB", "--works", "fit", "cut")
    fit, cut = rows_of(bench, tmp_path, *asked, *limits, "--score-tokens", "32")
    assert len(fit["removed"]) == 2 and fit["weight_bytes"] > 165e6
    assert fit["planned_bytes"] <= 100e6 + PROGRAM_BYTES
    assert 0.0 < fit["candidate_seconds"] < fit["seconds"]
    for work in (fit, cut):
        config = json.loads((tmp_path / "work" / work["work"] / "config.json").read_text())
        assert config["num_hidden_layers"] == 18


@pytest.mark.slow
def test_two_layers_of_the_width_of_a_70b_are_swept(bench: ModuleType, tmp_path: Path) -> None:
    """Their states are compared; to fit a ghost of that width is for the benchmark."""
    bench.make_checkpoint(tmp_path / "wide", "wide")
    unloaded = open_unloaded(tmp_path / "wide")
    text = bench.text_of(512, 128, 4, 256)
    run = RunOptions(corrections=0, memory=10**10)
    asked = Asked(Count(1), "streamline", "none", GhostOptions(), run)
    plan = asked.plan(unloaded, list(iterate_batches(text)))
    assert 300e6 < unloaded.nbytes / 2 < plan.memory_bytes <= 10**10
    cut, report = ghost_model(unloaded, text, 1, criterion="streamline", recovery="none", run=run)
    assert cut.config.num_hidden_layers == 1 and report.removed in ([0], [1])
    assert all(0.0 < item.score < 2.0 for item in report.scores)
