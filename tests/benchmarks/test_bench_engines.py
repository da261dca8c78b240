"""The benchmark of engines: what it writes, and the dtype that it insists on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.benchmark_module import load_benchmark
from support.speeds import speed_of

from ghosted_fast.measure.throughput import Throughput


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = load_benchmark("bench_engines", monkeypatch)
    monkeypatch.setattr(module, "make_models", lambda folder: folder.mkdir(parents=True))
    monkeypatch.setattr(module, "version_of", lambda engine, folder: "1.0")
    return module


def run(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, output: Path, *engines: str) -> None:
    command = ["bench_engines.py", "--output", str(output / "engines.json")]
    command += ["--models", str(output / "models"), "--engines", *engines]
    monkeypatch.setattr(sys, "argv", command)
    bench.main()


def test_table_and_what_stays(
    bench: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def measure(engine: str, kind: str, *_: Any) -> dict[str, Throughput]:
        if kind == "int4":
            raise RuntimeError("the engine failed")
        ghosted = speed_of(119.0, dense=100.0, pruned=120.0)
        return {"dense": speed_of(100.0), "pruned": speed_of(120.0), "ghosted": ghosted}

    monkeypatch.setattr(bench, "measure", measure)
    with pytest.raises(RuntimeError, match="failed"):
        run(bench, monkeypatch, tmp_path / "a", "ort-genai")
    monkeypatch.setattr(bench, "make_models", lambda folder: None)
    run(bench, monkeypatch, tmp_path / "a", "llama.cpp")
    rows = json.loads((tmp_path / "a" / "engines.json").read_text())
    found = [(row["engine"], row["precision"]) for row in rows]
    assert found == [("llama.cpp", kind) for kind in ("f32", "f16", "q8_0")] + [
        ("ort-genai", "fp32"),
        ("ort-genai", "int8"),
    ]
    assert rows[0]["ghosted"]["decode_tokens_per_s"]["value"] == 119.0
    table = capsys.readouterr().out
    assert "± half of the 95 % interval, 32 tokens after 64, 1 thread," in table
    line = (
        "| llama.cpp 1.0 | f32 | 100 | 120 | 119 | not told apart (± 0.02) | 1.19x ± 0.01 "
        "| 1,000 | 1,200 | 1,190 |"
    )
    lines = table.splitlines()
    assert line in lines
    assert {row.count("|") for row in lines if row.startswith("|")} == {11}


def test_another_dtype_is_refused(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows = [{"dtype": "bfloat16", "throughput": speed_of(1.0).to_dict()}] * 3
    monkeypatch.setattr(bench, "_run", lambda *_: json.dumps({"models": rows}))
    with pytest.raises(RuntimeError, match="expected float32 in vllm"):
        run(bench, monkeypatch, tmp_path, "vllm")


def test_speeds_go_by_what_the_files_are_called(bench: ModuleType) -> None:
    records = {
        "dense-fp32": speed_of(1.0).to_dict(),
        "ghosted-f16.gguf": {
            **speed_of(2.0).to_dict(),
            "relative": {"dense-fp32": speed_of(2.0, dense=1.0).to_dict()["relative"]["dense"]},
        },
    }
    found = bench._by_kind(records)
    assert found["ghosted"] == speed_of(2.0, dense=1.0)
    assert found["dense"] == speed_of(1.0)
