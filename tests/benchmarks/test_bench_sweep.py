"""The benchmark of the sweep: its checkpoints, its gate, and a limit that is too low."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from support.benchmark_module import BENCHMARKS, load_benchmark
from transformers import AutoModelForCausalLM

from ghosted_fast.errors import GateError


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_benchmark("bench_sweep", monkeypatch)


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
    original = bench.ghost_model

    def other(model: object, batches: object, remove: int, **asked: object) -> object:
        return original(model, batches, remove + hasattr(model, "config"), **asked)

    monkeypatch.setattr(bench, "ghost_model", other)
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
