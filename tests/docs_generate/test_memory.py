"""The table of what sweeps took."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from docs.generate import memory, results


def row(work: str, shape: str = "8b", **changes: Any) -> dict[str, Any]:
    sizes = {"peak_bytes": 4.56e9, "limit_bytes": 7e9, "weight_bytes": 16.06e9}
    asked = {"layers": 32, "tokens": 32768, "remove": 8, "corrections": 0, "threads": 2}
    about = {"machine": {"processor": "Some Xeon"}, "date": "2026-01-02T03:04:05+00:00"}
    return {"work": work, "shape": shape, "seconds": 600.0, **sizes, **asked, **about, **changes}


def measured(folder: Path, monkeypatch: pytest.MonkeyPatch, *rows: dict[str, Any]) -> str:
    (folder / "some").mkdir()
    lines = "".join(json.dumps(item) + "\n" for item in rows)
    (folder / "some" / "sweep.jsonl").write_text(lines, encoding="utf-8")
    monkeypatch.setattr(results, "RESULTS", folder)
    return memory.measured()


def test_a_fit_is_compared_with_the_bare_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = row("fit", seconds=900.0, candidate_seconds=150.0)
    text = measured(tmp_path, monkeypatch, row("bare"), fit, row("cut", limit_bytes=1.5e9))
    assert text.startswith("**Some Xeon.** Llama of the 8b shape, 32 layers,")
    assert "16.1 GB of files; 32,768 tokens, 8 layers removed, 0 corrections; 2 threads," in text
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    cells = {line[0].strip("| "): [cell.strip("| ") for cell in line[1:]] for line in lines}
    assert cells["the text through all layers"] == ["4.6", "7.0", "10.0", "", ""]
    assert cells["choosing the layers, fitting the ghost, writing the folder"] == [
        "4.6", "7.0", "15.0", "1.50x", "1.25x",
    ]  # fmt: skip
    assert cells["cutting the folder, no ghost"][1] == "1.5"


def test_the_newest_run_of_each_shape_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = row("bare", seconds=60.0, date="2025-01-01T00:00:00+00:00")
    text = measured(tmp_path, monkeypatch, old, row("fit"), row("fit", "70b", layers=2))
    deep, shallow = row("bare"), row("bare", layers=8, date="2027-01-01T00:00:00+00:00")
    (tmp_path / "again").mkdir()
    both = measured(tmp_path / "again", monkeypatch, deep, shallow)
    assert "8b shape, 32 layers" in both and "8b shape, 8 layers" in both
    assert text.count("Llama of the 8b shape") == text.count("Llama of the 70b shape") == 1
    assert "the text through all layers" not in text and "x |" not in text


def test_a_sweep_beside_the_way_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ratio = {"value": 0.9, "low": 0.88, "high": 0.92, "samples": 12}
    compared = row("compare", "SmolLM2-135M", ratio=ratio, seconds=61.0, remove=5)
    text = measured(tmp_path, monkeypatch, row("bare"), compared)
    assert "SmolLM2-135M in bf16, 32,768 tokens, 5 layers" in text
    assert "61 s swept, over the time in memory: 0.90x ± 0.02; 2 threads, 2026-01-02." in text
    assert text.count("Llama of the") == 1
