"""The benchmark of engines: what it writes, and the dtype that it insists on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.benchmark_module import load_benchmark

from ghosted_fast.measure.speed import Throughput


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = load_benchmark("bench_engines", monkeypatch)
    monkeypatch.setattr(module, "make_models", lambda folder: folder.mkdir(parents=True))
    monkeypatch.setattr(module, "version_of", lambda engine, folder: "1.0")
    return module


def speed(decode: float) -> Throughput:
    return Throughput(decode * 10, 0, 0, decode, 0, 0, 64, 32, 1, 3)


def run(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, output: Path, *engines: str) -> None:
    command = ["bench_engines.py", "--output", str(output), "--engines", *engines]
    monkeypatch.setattr(sys, "argv", command)
    bench.main()


def test_table_and_what_stays(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def measure(engine: str, kind: str, *_: Any) -> list[Throughput]:
        if kind == "int4":
            raise RuntimeError("the engine failed")
        return [speed(100.0), speed(120.0), speed(119.0)]

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
    assert rows[0]["ghosted"]["decode_tokens_per_s"] == 119.0
    table = (tmp_path / "a" / "engines.md").read_text()
    assert "Medians of 3, 32 tokens after 64, 1 thread," in table
    line = "| llama.cpp 1.0 | f32 | 100.0 | 120.0 | 119.0 | 0.992 | 1.19 | 1000 | 1200 | 1190 |"
    lines = table.splitlines()
    assert line in lines
    assert {row.count("|") for row in lines if row.startswith("|")} == {11}


def test_another_dtype_is_refused(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows = [{"dtype": "bfloat16", "throughput": speed(1.0).to_dict()}] * 3
    monkeypatch.setattr(bench, "_run", lambda *_: json.dumps({"models": rows}))
    with pytest.raises(RuntimeError, match="expected float32 in vllm"):
        run(bench, monkeypatch, tmp_path, "vllm")
