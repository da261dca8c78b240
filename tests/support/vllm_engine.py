"""vLLM on the processor: greedy tokens and the loss on given tokens."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of each rank's process
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # more than one rank has processes
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import pytest
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

from support.tiny_engines import greedy_tokens, mean_loss, random_text

PROMPT = [1, 50, 90, 177, 30, 44]


class Vllm:
    """A saved model in vLLM.

    Args:
        folder: The folder.
        options: Arguments of `vllm.LLM`; by default one process, fp32, nothing compiled.
    """

    def __init__(self, folder: Path, **options: Any) -> None:
        try:
            self.llm = LLM(
                str(folder),
                **{
                    "dtype": "float32",
                    "kv_cache_memory_bytes": 1 << 28,
                    "max_model_len": 256,
                    "max_num_seqs": 4,
                    "enforce_eager": True,
                    "seed": 0,
                    **options,
                },
            )
        except BaseException:
            cleanup_dist_env_and_memory()  # else the next engine finds half of this one
            raise

    def close(self) -> None:
        """End the engine's processes, and leave nothing in this one."""
        self.llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()

    def greedy_tokens(self, prompts: list[list[int]], count: int) -> list[list[int]]:
        params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        answers = self.llm.generate(inputs, params, use_tqdm=False)
        return [list(answer.outputs[0].token_ids) for answer in answers]

    def loss(self, tokens: list[int]) -> float:
        """Return the mean loss of tokens[1:], each given those before it, in nats."""
        return sum(self.losses(tokens)) / (len(tokens) - 1)

    def losses(self, tokens: list[int]) -> list[float]:
        """Return the loss of each of tokens[1:], given those before it, in nats."""
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
        (answer,) = self.llm.generate({"prompt_token_ids": tokens}, params, use_tqdm=False)
        found = zip(answer.prompt_logprobs[1:], tokens[1:], strict=True)
        return [-likely[token].logprob for likely, token in found]


def check(model: Any, engine: Vllm, min_kinds: int = 2) -> None:
    """Check that a saved model in vLLM gives what it gives in transformers, in fp32.

    Args:
        model: The model.
        engine: vLLM with it.
        min_kinds: How many different tokens it must generate, so that they tell models apart.
    """
    text = PROMPT + random_text(24)
    assert engine.loss(text) == pytest.approx(mean_loss(model, text), rel=1e-4)
    tokens = greedy_tokens(model, PROMPT)
    assert len(set(tokens)) >= min_kinds
    assert engine.greedy_tokens([PROMPT], 64) == [tokens]
