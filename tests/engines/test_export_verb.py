"""`ghosted-fast export` and `bench --engine vllm`: what they write, and what they refuse."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from support.tiny_engines import byte_tokenizer, engine_model, ghosted
from typer.testing import CliRunner

from ghosted_fast.checkpoint.save import save_model
from ghosted_fast.cli.app import app
from ghosted_fast.errors import ArgumentError, MissingExtraError, UnsupportedModelError
from ghosted_fast.export import ort_genai


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = ghosted(engine_model(), (3,), norm_eps=1e-6)
    return save_model(model, tmp_path / "ghosted", byte_tokenizer())


def run(*arguments: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    return " ".join(result.output.split())


def test_gguf_is_written_and_kept(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    output = tmp_path / "model.gguf"
    command = ["export", folder, "--to", "gguf", "--output", output]
    assert run(*command, "--precision", "q8_0").endswith(f"wrote {output}")
    size = output.stat().st_size
    assert "--overwrite" in run(*command, status=1)
    run(*command, "--overwrite", "--tokenizer", output)
    assert output.stat().st_size > 2 * size


def test_options_that_do_not_fit(folder: Path) -> None:
    said = run("export", folder, "--to", "gguf", "--precision", "int4", status=2)
    assert "f32, f16, q8_0" in said
    said = run("export", folder, "--to", "ort-genai", "--tokenizer", "x.gguf", status=2)
    assert "--to gguf alone" in said


def test_a_raw_ghost_names_the_remedy(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    model = ghosted(engine_model(), (3,), first_state=True)
    folder = save_model(model, tmp_path / "raw", byte_tokenizer())
    said = run("export", folder, "--to", "gguf", "--output", tmp_path / "x.gguf", status=1)
    assert "--features normed --no-bias --first-state off" in said
    assert not (tmp_path / "x.gguf").exists()


def test_ort_genai_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = engine_model(num_layers=1), byte_tokenizer()
    with pytest.raises(ArgumentError, match="name another folder"):
        ort_genai.export_ort_genai(model, tmp_path, tokenizer)
    with pytest.raises(ArgumentError, match="fp32, int8 or int4"):
        ort_genai.export_ort_genai(model, tmp_path / "x", tokenizer, "f32")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match=r"got 'phi3'\. Serve it with"):
        ort_genai.export_ort_genai(engine_model("phi3", num_layers=1), tmp_path / "x", tokenizer)
    monkeypatch.setattr(ort_genai.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match="pip install 'onnxruntime-genai"):
        ort_genai.export_ort_genai(model, tmp_path / "x", tokenizer)
    monkeypatch.setattr(ort_genai.importlib.util, "find_spec", lambda _: True)
    monkeypatch.setattr(ort_genai, "version", lambda _: "0.17.2")
    with pytest.raises(MissingExtraError, match=r"expected onnxruntime-genai 0.18.\*.*got 0.17.2"):
        ort_genai.export_ort_genai(model, tmp_path / "x", tokenizer)
    assert not list(tmp_path.iterdir())


def test_bench_in_vllm_refuses(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["bench", "--engine", "vllm", "--model", folder]
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert "pip install vllm ghosted_fast" in run(*command, status=1)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: True)
    assert "different names" in run(*command, "--model", folder, status=1)
    assert "expected a saved folder" in run(*command, "--model", folder.parent, status=1)
