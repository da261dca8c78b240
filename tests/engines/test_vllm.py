"""Ghosted folders in vLLM give what transformers gives, through the installed plug-in alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
from ghosted_fast.checkpoint.save import save_model

pytest.importorskip("vllm")
from support.vllm_engine import Vllm

PROMPT = [1, 50, 90, 177, 30, 44]
GEMMA = {"sliding_window": 16, "tie_word_embeddings": True}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Vllm]]:
    """Save a model and run it in vLLM, until the test ends."""
    engines: list[Vllm] = []

    def run(model: Any, tokenizer: Any = None, **options: Any) -> Vllm:
        folder = tmp_path / f"model{len(engines)}"
        save_model(model, folder, tokenizer or byte_tokenizer())
        engines.append(Vllm(folder, **options))
        return engines[-1]

    yield run
    for engine in engines:
        engine.close()


def check(model: Any, engine: Vllm, min_kinds: int = 2) -> None:
    text = PROMPT + random_text(24)
    assert engine.loss(text) == pytest.approx(mean_loss(model, text), rel=1e-4)
    tokens = greedy_tokens(model, PROMPT)
    assert len(set(tokens)) >= min_kinds  # tokens that tell models apart
    assert engine.greedy_tokens([PROMPT], 64) == [tokens]


@pytest.mark.parametrize(
    ("family", "removed", "options", "sizes"),
    [
        ("llama", (0, 3, 5), {"first_state": True}, {"tie_word_embeddings": True}),
        ("llama", (3,), {"norm_eps": 1e-6, "quantized": True, "first_state": True}, {}),
        ("qwen2", (3,), {}, {"num_attention_heads": 2}),
        ("qwen3", (3,), {"first_state": True}, {}),
        ("mistral", (1,), {"norm_eps": 1e-6}, {"sliding_window": None}),
        ("gemma2", (1,), {"first_state": True}, GEMMA),
        ("gemma3_text", (1,), {"norm_eps": 1e-6}, GEMMA),
        ("phi3", (3,), {}, {"num_attention_heads": 2}),
        ("olmo2", (3,), {"first_state": True}, {"num_attention_heads": 2}),
        ("mixtral", (3,), {"first_state": True}, {"num_local_experts": 4, "head_dim": 32}),
        ("qwen3_moe", (3,), {}, {"num_experts": 4, "mlp_only_layers": [1], **MOE}),
    ],
)
def test_families(
    serve: Callable[..., Vllm],
    family: str,
    removed: tuple[int, ...],
    options: dict[str, Any],
    sizes: dict[str, Any],
) -> None:
    model = ghosted(engine_model(family, **sizes), removed, **options)
    check(model, serve(model))


def test_prefixes_and_parts_of_prompts(serve: Callable[..., Vllm]) -> None:
    """A first-token state is not given to the first token of a part, or of what is not cached."""
    model = ghosted(engine_model(), (3,), first_state=True)
    engine = serve(
        model, enable_prefix_caching=True, enable_chunked_prefill=True, max_num_batched_tokens=32
    )
    text = PROMPT + random_text(90)
    prompts = [text, text[:70] + random_text(9, seed=1), PROMPT]
    expected = [greedy_tokens(model, prompt, 16) for prompt in prompts]
    assert engine.greedy_tokens(prompts, 16) == expected
    assert engine.greedy_tokens(prompts[::-1], 16) == expected[::-1]


@pytest.mark.parametrize(
    "options",
    [
        {"enforce_eager": False},
        {"tensor_parallel_size": 2},
        {"pipeline_parallel_size": 2, "enforce_eager": False},
    ],
    ids=["compiled", "tensor parallel", "pipeline parallel"],
)
def test_compiled_and_parallel(serve: Callable[..., Vllm], options: dict[str, Any]) -> None:
    model = ghosted(engine_model(num_layers=8), (1, 4, 7), first_state=True)
    check(model, serve(model, **options))


@pytest.mark.real_model
@pytest.mark.skipif(not (cache_folder() / "demo").is_dir(), reason="no demo model: `make setup`")
def test_smollm2(serve: Callable[..., Vllm], smollm2: Any) -> None:
    model, _, tokenizer = smollm2(input="normed", first_state="on")
    engine = serve(model, tokenizer, max_model_len=1024)
    prompt = tokenizer("The history of the city begins")["input_ids"]
    assert engine.greedy_tokens([prompt], 64) == [greedy_tokens(model, prompt)]
    (text,) = smollm2.text(256, 256)
    assert engine.loss(text) == pytest.approx(mean_loss(model, text), abs=1e-4)


def test_families_without_a_place_are_refused(serve: Callable[..., Vllm]) -> None:
    from ghosted_fast.testing import tiny_model

    model = tiny_model("gpt2")
    with pytest.raises(Exception, match="cannot be served by vLLM"):
        serve(ghosted(model, (3,)), max_model_len=64)


def test_an_old_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from ghosted_fast.errors import UnsupportedModelError
    from ghosted_fast.serving.vllm import models

    models.check_version()
    monkeypatch.setattr(models, "version", lambda _: "0.9.1")
    with pytest.raises(UnsupportedModelError, match=r"0\.32 or later.*got 0\.9\.1: pip install"):
        models.check_version()
