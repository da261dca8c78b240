"""The programs in `examples` run, on tiny random models."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
from support.tiny_text import TEXT, save_tiny_model

import ghosted_fast as gf
from ghosted_fast.assets import downloads
from ghosted_fast.models import families

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": TEXT}) + "\n" for _ in range(1000)))
    return path


def run(name: str, monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: object) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.mark.slow
def test_fit(
    tmp_path: Path,
    texts: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = save_tiny_model(tmp_path / "tiny", num_layers=8)
    assets = downloads.DemoAssets(model, texts, texts)
    monkeypatch.setattr(gf, "fetch_demo_assets", lambda: assets)
    run("fit.py", monkeypatch, tmp_path)
    shown = capsys.readouterr().out
    assert shown.startswith("removed layers ")
    assert [line.split()[0] for line in shown.splitlines()[1:4]] == ["dense", "pruned", "ghosted"]
    assert (tmp_path / "smaller" / "model.safetensors").is_file()


@pytest.mark.slow
def test_own_pruning_code(
    tmp_path: Path,
    texts: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = save_tiny_model(tmp_path / "tiny", num_layers=6)
    given = ["--model", model, "--text", texts, "--removed", "2-3"]
    given += ["--tokens", 4096, "--length", 64]
    run("own_pruning_code.py", monkeypatch, tmp_path, *given)
    shown = capsys.readouterr().out.splitlines()
    pruned, ghosted = (float(line.split()[-1]) for line in shown[-2:])
    assert ghosted < pruned
    assert (tmp_path / "own" / "model.safetensors").is_file()


def test_add_a_family(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The program adds to the table, which other tests look at.
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))
    run("add_a_family.py", monkeypatch, tmp_path)
    assert capsys.readouterr().out.splitlines() == [
        "stablelm: 8 layers became 6",
        "loaded again: logits the same",
    ]


def test_serve_vllm(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    pytest.importorskip("support.vllm_engine")  # sets what vLLM needs on a processor
    from support.tiny_engines import byte_tokenizer, engine_model, ghosted

    from ghosted_fast.checkpoint.save import save_model

    folder = save_model(ghosted(engine_model("llama"), (3,)), tmp_path / "model", byte_tokenizer())
    example = runpy.run_path(str(EXAMPLES / "serve_vllm.py"))
    options = {"kv_cache_memory_bytes": 1 << 28, "max_model_len": 256, "enforce_eager": True}
    assert isinstance(example["answer"](folder, "the", max_tokens=4, **options), str)
