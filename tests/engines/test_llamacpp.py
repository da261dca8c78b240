"""Exported files in stock llama.cpp give what transformers gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.tiny_engines import (
    VOCABULARY_SIZE,
    byte_tokenizer,
    engine_model,
    ghosted,
    greedy_tokens,
    mean_loss,
    random_text,
)

from ghosted_fast._env import cache_folder
from ghosted_fast.export.gguf import FAMILIES, export_gguf

pytest.importorskip("xllamacpp")
from support.llamacpp_engine import LlamaCpp

EPS = 1e-6
GRANITE = {
    "rms_norm_eps": EPS,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.2,
    "logits_scaling": 2.0,
}
PROMPT = [1, 50, 90, 177, 30, 44]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


CASES: list[tuple[str, tuple[int, ...], dict[str, Any]]] = [
    ("llama", (3,), {}),
    ("llama", (0, 2, 5), {"tie_word_embeddings": True}),
    ("llama", (3,), {"attention_bias": True, "rope_parameters": LLAMA3}),
    ("mistral", (1, 4), {"sliding_window": None}),
    ("qwen2", (2,), {}),
    ("phi3", (3,), {"head_dim": ..., "rms_norm_eps": EPS, "sliding_window": None}),
    ("granite", (3,), {"head_dim": ..., "tie_word_embeddings": True, **GRANITE}),
    ("seed_oss", (3,), {"attention_bias": True, "seed": 1}),
    ("ernie4_5", (3,), {"use_bias": True, "seed": 3, "rms_norm_eps": EPS}),
]


def test_every_family_is_tried() -> None:
    assert {family for family, *_ in CASES} == set(FAMILIES)


@pytest.mark.parametrize(
    ("family", "removed", "sizes"),
    CASES,
    ids=[
        *("inside", "both ends", "biases and llama3's rope", "mistral", "qwen2"),
        *("phi3", "granite", "seed_oss", "ernie4_5"),
    ],
)
def test_tokens_and_loss(
    tmp_path: Path, family: str, removed: tuple[int, ...], sizes: dict[str, Any]
) -> None:
    model = ghosted(engine_model(family, **sizes), removed, norm_eps=EPS)
    engine = LlamaCpp(export_gguf(model, tmp_path / "model.gguf", byte_tokenizer()))
    tokens = greedy_tokens(model, PROMPT)
    assert len(set(tokens)) > 10  # tokens that tell models apart
    assert engine.greedy_tokens(PROMPT, 64) == tokens
    text = PROMPT + random_text(24)
    assert engine.loss(text, VOCABULARY_SIZE) == pytest.approx(mean_loss(model, text), rel=1e-4)


def test_the_ghost_matters_and_q8_is_near(tmp_path: Path) -> None:
    dense = engine_model()
    model = ghosted(dense, (3,), norm_eps=EPS)
    text = PROMPT + random_text(24)
    exact, other = mean_loss(model, text), mean_loss(dense, text)
    path = export_gguf(model, tmp_path / "model.gguf", byte_tokenizer(), "q8_0")
    found = LlamaCpp(path).loss(text, VOCABULARY_SIZE)
    assert 0 < abs(found - exact) < 0.02 * exact
    assert abs(other - exact) > 5 * abs(found - exact)


@pytest.mark.real_model
@pytest.mark.skipif(not (cache_folder() / "demo").is_dir(), reason="no demo model: `make setup`")
def test_smollm2(tmp_path: Path, smollm2: Any) -> None:
    model, base, tokenizer = smollm2(features="normed", first_state="off")
    vocabulary = model.config.vocab_size
    engine = LlamaCpp(export_gguf(model, tmp_path / "f32.gguf", base))
    prompt = tokenizer("The history of the city begins")["input_ids"]
    assert engine.greedy_tokens(prompt, 64) == greedy_tokens(model, prompt)
    words = "The river flows through the old town, past the mill and 2 churches, to the sea."
    text = tokenizer(words)["input_ids"]
    assert engine.tokenize(words) == text
    exact = mean_loss(model, text)
    assert engine.loss(text, vocabulary) == pytest.approx(exact, abs=1e-3)
    for precision, bound in (("f16", 5e-3), ("q8_0", 0.05)):
        path = export_gguf(model, tmp_path / f"{precision}.gguf", base, precision)
        assert LlamaCpp(path).loss(text, vocabulary) == pytest.approx(exact, abs=bound)
