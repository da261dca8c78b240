"""The demo on a tiny model: its table, its checkpoint, its page, and whose folder it rewrites."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.tiny_text import TEXT, save_tiny_model, tiny_tokenizer

from ghosted_fast import demo
from ghosted_fast.assets.downloads import DemoAssets
from ghosted_fast.checkpoint.save import save_model
from ghosted_fast.demo import DemoOptions, check_reload, run_demo
from ghosted_fast.errors import ArgumentError, CheckpointError
from ghosted_fast.models.loading import load_model
from ghosted_fast.testing import random_tokens, tiny_model

pytestmark = pytest.mark.slow


@pytest.fixture
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DemoAssets:
    monkeypatch.setattr(demo, "_SEQUENCE_LENGTH", 32)
    monkeypatch.setattr(demo, "_HEALING_TOKENS", 8192)
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"0": TEXT}) + "\n" for _ in range(200)))
    return DemoAssets(save_tiny_model(tmp_path / "tiny"), texts, texts)


def test_demo(assets: DemoAssets, tmp_path: Path) -> None:
    output = tmp_path / "out"
    dtypes = ("float32", "bfloat16")
    result = run_demo(assets, output, DemoOptions(2, dtypes, 1024, 3, quick=True))
    assert [(row.name, row.dtype, row.layers) for row in result.rows] == [
        (name, dtype, layers)
        for dtype in dtypes
        for name, layers in (
            ("dense", 6),
            ("pruned", 4),
            ("ghosted, not corrected", 4),
            ("ghosted", 4),
            ("healed", 4),
        )
    ]
    assert all(row.perplexity and row.throughput for row in result.rows)
    assert result.identical
    assert result.healing.curve[0].divergence > 0 and result.healing.tokens > 0
    assert result.to_dict()["healing"]["tokens"] == result.healing.tokens
    page = result.page.read_text(encoding="utf-8")
    assert f"trained on {result.healing.tokens:,} tokens" in page
    assert len(result.report.removed) == 2
    model, _ = load_model(result.checkpoint)
    assert model.dtype == torch.bfloat16
    assert "loaded in a new process" in page
    json.dumps(result.to_dict())


def test_own_folder_is_rewritten(
    assets: DemoAssets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "check_reload", lambda *_: ("a sentence", False))
    for num_layers in (1, 2):
        result = run_demo(
            assets, tmp_path / "out", DemoOptions(num_layers, ("float32",), 512, 1, quick=True)
        )
        assert load_model(result.checkpoint)[0].config.num_hidden_layers == 6 - num_layers
        assert "gives other logits" in result.page.read_text(encoding="utf-8")


def test_folder_of_somebody_else_is_refused(assets: DemoAssets, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ArgumentError, match="was not made by the demo"):
        run_demo(assets, tmp_path)
    with pytest.raises(ArgumentError, match="was not made by the demo"):
        run_demo(assets, tmp_path / "notes.txt", overwrite=True)
    with pytest.raises(ArgumentError, match="expected at least one dtype"):
        run_demo(assets, tmp_path / "out", DemoOptions(dtypes=()))


def test_reload_notices_another_model(tmp_path: Path) -> None:
    folder = save_model(tiny_model("llama", 2, seed=1), tmp_path / "saved")
    sample, identical = check_reload(
        tiny_model("llama", 2, seed=2), folder, tiny_tokenizer(), random_tokens(1, 16)
    )
    assert sample
    assert not identical


def test_reload_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_RELOAD", "raise SystemExit('no such folder')")
    with pytest.raises(CheckpointError, match="does not load in a new process: no such folder"):
        check_reload(tiny_model("llama", 2), tmp_path, tiny_tokenizer(), random_tokens(1, 16))
