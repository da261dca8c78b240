"""Ghosted folders in vLLM give what transformers gives, through the installed plug-in alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from support.tiny_engines import engine_model, ghosted, greedy_tokens, mean_loss, random_text

from ghosted_fast._env import cache_folder

pytest.importorskip("vllm")
from support.vllm_engine import PROMPT, Vllm, check
from support.vllm_families import DEEPSEEK, GPT, HEADS, LLAMA4, LOCAL_EXPERTS


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
    model, _, tokenizer = smollm2(features="normed", first_state="on")
    engine = serve(model, tokenizer, max_model_len=1024)
    prompt = tokenizer("The history of the city begins")["input_ids"]
    assert engine.greedy_tokens([prompt], 64) == [greedy_tokens(model, prompt)]
    (text,) = smollm2.text(256, 256)
    assert engine.loss(text) == pytest.approx(mean_loss(model, text), abs=1e-4)


def test_families_without_a_place_are_refused(serve: Callable[..., Vllm]) -> None:
    model = ghosted(engine_model("stablelm", **HEADS), (3,))
    with pytest.raises(Exception, match=r"StableLm\w+ cannot be served by vLLM: .*not tried"):
        serve(model, max_model_len=64)


def test_a_state_for_first_tokens_needs_positions(serve: Callable[..., Vllm]) -> None:
    model = ghosted(engine_model("gpt2", **GPT), (3,), first_state=True)
    with pytest.raises(Exception, match=r"not told the positions.*--first-state off"):
        serve(model)


@pytest.mark.parametrize(
    ("family", "removed", "sizes", "said"),
    [
        (
            "gpt_oss",
            (3,),
            {**LOCAL_EXPERTS, "sliding_window": 16},
            "layer 3 to be of the kind sliding_attention",
        ),
        (
            "llama4_text",
            (3,),
            {**LLAMA4, "intermediate_size_mlp": 64, "interleave_moe_layer_step": 2},
            "builds other layers than those that are left",
        ),
        ("deepseek_v3", (0,), DEEPSEEK, "from their places in the dense model"),
    ],
)
def test_layers_that_vllm_builds_otherwise_are_refused(
    serve: Callable[..., Vllm], family: str, removed: tuple[int, ...], sizes: Any, said: str
) -> None:
    model = ghosted(engine_model(family, **sizes), removed)
    with pytest.raises(Exception, match=f"cannot be served by vLLM.*{said}"):
        serve(model)


def test_an_old_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from ghosted_fast.errors import UnsupportedModelError
    from ghosted_fast.serving.vllm import configuration

    configuration.check_version()
    monkeypatch.setattr(configuration, "version", lambda _: "0.9.1")
    with pytest.raises(UnsupportedModelError, match=r"0\.32 or later.*got 0\.9\.1: pip install"):
        configuration.check_version()
