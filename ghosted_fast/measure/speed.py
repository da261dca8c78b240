"""Tokens per second of prefill and of decoding, measured apart and interleaved between models."""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ghosted_fast.errors import ArgumentError
from ghosted_fast.models.decoder import evaluating


@dataclass(frozen=True)
class Throughput:
    """Speed of one model: medians over the repeats, with the 20th and 80th percentile.

    Attributes:
        prefill_tokens_per_s: Prompt tokens of the whole batch per second of the first call.
        prefill_p20: 20th percentile of it.
        prefill_p80: 80th percentile of it.
        decode_tokens_per_s: New tokens of the whole batch per second, with a dynamic cache.
        decode_p20: 20th percentile of it.
        decode_p80: 80th percentile of it.
        prompt_length: Tokens of each prompt.
        new_tokens: Tokens decoded after each prompt.
        batch_size: Prompts at a time.
        repeats: Measurements.
    """

    prefill_tokens_per_s: float
    prefill_p20: float
    prefill_p80: float
    decode_tokens_per_s: float
    decode_p20: float
    decode_p80: float
    prompt_length: int
    new_tokens: int
    batch_size: int
    repeats: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        return asdict(self)


def throughput(
    model: Any,
    prompt_length: int = 512,
    new_tokens: int = 64,
    batch_size: int = 1,
    repeats: int = 5,
) -> Throughput:
    """Measure one model's prefill and decoding speed.

    Decoding is a plain greedy loop, one token at a time, so the figures hold the cost of the model
    and of its cache and nothing else. To compare models use `compare_throughput`.

    Args:
        model: A causal language model.
        prompt_length: Tokens of the prompt.
        new_tokens: Tokens to decode after it.
        batch_size: Prompts at a time.
        repeats: Measurements, after one that does not count.

    Returns:
        The medians, in tokens per second.

    Raises:
        ArgumentError: A number is below 1, or the model's positions do not suffice.
    """
    return compare_throughput({"model": model}, prompt_length, new_tokens, batch_size, repeats)[
        "model"
    ]


@torch.inference_mode()
def compare_throughput(
    models: Mapping[str, Any],
    prompt_length: int = 512,
    new_tokens: int = 64,
    batch_size: int = 1,
    repeats: int = 5,
) -> dict[str, Throughput]:
    """Measure several models in turn, so that a slow moment of the machine meets all of them.

    Args:
        models: The models by name. Each repeat measures every one, beginning with another.
        prompt_length: Tokens of the prompt.
        new_tokens: Tokens to decode after it.
        batch_size: Prompts at a time.
        repeats: Measurements of each model, after one that does not count.

    Returns:
        The speed of each model, by name.

    Raises:
        ArgumentError: A number is below 1, or the positions of a model do not suffice.
    """
    _check(models, prompt_length, new_tokens, batch_size, repeats)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    names = list(models)
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(evaluating(model))
            _measure(model, prompt_length, min(new_tokens, 4), batch_size)
        for repeat in range(repeats):
            first = repeat % len(names)
            for name in names[first:] + names[:first]:
                timing = _measure(models[name], prompt_length, new_tokens, batch_size)
                seconds[name].append(timing)
    return {
        name: throughput_of(timings, prompt_length, new_tokens, batch_size)
        for name, timings in seconds.items()
    }


def _check(
    models: Mapping[str, Any], prompt_length: int, new_tokens: int, batch_size: int, repeats: int
) -> None:
    if not models:
        raise ArgumentError("expected a model to measure, got none")
    numbers = {
        "prompt_length": prompt_length,
        "new_tokens": new_tokens,
        "batch_size": batch_size,
        "repeats": repeats,
    }
    for name, number in numbers.items():
        if number < 1:
            raise ArgumentError(f"expected {name} >= 1, got {number}")
    for name, model in models.items():
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and prompt_length + new_tokens > limit:
            raise ArgumentError(
                f"expected prompt_length + new_tokens <= {limit}, the positions of {name}, "
                f"got {prompt_length} + {new_tokens}"
            )


def _measure(
    model: Any, prompt_length: int, new_tokens: int, batch_size: int
) -> tuple[float, float]:
    """Return the seconds of one prefill and of `new_tokens` decoding steps after it."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    prompt = torch.randint(vocabulary, (batch_size, prompt_length), generator=generator)
    prompt = prompt.to(model.device)
    # As `generate` does: the head is applied to the last position alone.
    last = inspect.signature(model.forward).parameters
    options = {"logits_to_keep": 1} if "logits_to_keep" in last else {}
    start = _now(prompt)
    output = model(input_ids=prompt, use_cache=True, **options)
    token = output.logits[:, -1:].argmax(-1)
    after_prefill = _now(prompt)
    for _ in range(new_tokens):
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        token = output.logits[:, -1:].argmax(-1)
    return after_prefill - start, _now(prompt) - after_prefill


def _now(tensor: Tensor) -> float:
    """Return the time once the tensor's device has finished what it was given."""
    if tensor.device.type != "cpu":
        torch.accelerator.synchronize(tensor.device)
    return time.perf_counter()


def throughput_of(
    seconds: Sequence[tuple[float, float]], prompt_length: int, new_tokens: int, batch_size: int
) -> Throughput:
    """Return the speed that measurements mean.

    Args:
        seconds: Of prefill and of decoding, for each measurement.
        prompt_length: Tokens of each prompt.
        new_tokens: Tokens decoded after it.
        batch_size: Prompts at a time.
    """
    tokens = np.array([prompt_length, new_tokens]) * batch_size
    low, middle, high = np.quantile(tokens / np.array(seconds), (0.2, 0.5, 0.8), axis=0)
    return Throughput(
        prefill_tokens_per_s=float(middle[0]),
        prefill_p20=float(low[0]),
        prefill_p80=float(high[0]),
        decode_tokens_per_s=float(middle[1]),
        decode_p20=float(low[1]),
        decode_p80=float(high[1]),
        prompt_length=prompt_length,
        new_tokens=new_tokens,
        batch_size=batch_size,
        repeats=len(seconds),
    )
