"""Exported folders in ONNX Runtime GenAI give what transformers gives."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from support.tiny_engines import (
    byte_tokenizer,
    engine_model,
    ghosted,
    greedy_tokens,
    mean_loss,
    random_text,
)

from ghosted_fast._env import cache_folder
from ghosted_fast.export.ort_genai import export_ort_genai

pytest.importorskip("onnxruntime_genai")
from support.ort_engine import OrtGenAI

PROMPT = [1, 50, 90, 177, 30, 44]


@pytest.mark.parametrize(
    ("family", "removed", "options", "sizes"),
    [
        ("llama", (3,), {}, {}),
        ("llama", (0, 2, 5), {"norm_eps": 1e-6}, {"tie_word_embeddings": True}),
        ("llama", (0, 3), {"first_state": True, "bias": True}, {}),
        ("llama", (3,), {"first_state": True, "norm_eps": 1e-6, "quantized": True}, {}),
        ("mistral", (1,), {}, {"sliding_window": None}),
        ("qwen2", (1,), {"first_state": True}, {"head_dim": 16}),
        ("qwen3", (1,), {}, {}),
        ("gemma2", (1,), {"first_state": True}, {"sliding_window": 16}),
    ],
)
def test_tokens_and_loss(
    tmp_path: Path,
    family: str,
    removed: tuple[int, ...],
    options: dict[str, Any],
    sizes: dict[str, Any],
) -> None:
    model = ghosted(engine_model(family, **sizes), removed, **options)
    engine = OrtGenAI(export_ort_genai(model, tmp_path / "m" / "ort", byte_tokenizer()))
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["ort"]
    text = PROMPT + random_text(24)
    assert engine.loss(text) == pytest.approx(mean_loss(model, text), rel=1e-4)
    tokens = greedy_tokens(model, PROMPT)
    assert len(set(tokens)) > 3  # tokens that tell models apart
    assert engine.greedy_tokens(PROMPT, 64) == tokens
    assert engine.greedy_tokens(PROMPT, 64, chunk=3) == tokens


@pytest.mark.real_model
@pytest.mark.skipif(not (cache_folder() / "demo").is_dir(), reason="no demo model: `make setup`")
@pytest.mark.parametrize(
    "options",
    [{"features": "normed", "first_state": "off"}, {"features": "raw", "first_state": "on"}],
)
def test_smollm2(tmp_path: Path, smollm2: Any, options: dict[str, str]) -> None:
    model, _, tokenizer = smollm2(**options)
    engine = OrtGenAI(export_ort_genai(model, tmp_path / "fp32", tokenizer))
    prompt = tokenizer("The history of the city begins")["input_ids"]
    assert engine.greedy_tokens(prompt, 64) == greedy_tokens(model, prompt)
    text = smollm2.text(512)[0]
    assert engine.loss(text) == pytest.approx(mean_loss(model, text), abs=1e-4)
    small = OrtGenAI(export_ort_genai(model, tmp_path / "int8", tokenizer, "int8"))
    # Of a single passage int8 moves the perplexity by up to 0.8%, either way.
    rises = [small.loss(text) - mean_loss(model, text) for text in smollm2.text(2560)]
    assert abs(math.expm1(sum(rises) / len(rises))) < 0.005
