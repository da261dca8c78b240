"""Prefill and decoding speed of saved models in vLLM, measured in turn."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ghosted_fast import _env
from ghosted_fast.errors import ArgumentError, MissingExtraError, SourceError
from ghosted_fast.measure.models_table import ModelRow
from ghosted_fast.measure.throughput import SpeedSettings, run_both_phases, throughputs_of
from ghosted_fast.models.loading import resolve_dtype
from ghosted_fast.timing.conditions import Watch

_CACHE_BYTES = 1 << 28
# An engine's worker spins for a second after its last step, on a core that the next one needs.
_QUIET_SECONDS = 1.5


def compare_in_vllm(
    folders: Sequence[str],
    dtype: str = "auto",
    settings: SpeedSettings | None = None,
) -> list[ModelRow]:
    """Measure saved models in vLLM, each in a process of its own, all loaded at once.

    Args:
        folders: Saved models, ghosted or not, under different names.
        dtype: Dtype to serve in; "auto" is the checkpoint's own.
        settings: What is measured, and how precisely.

    Returns:
        A row for each model, in the order given.

    Raises:
        MissingExtraError: vLLM is not installed.
        SourceError: A model is no saved folder.
        ArgumentError: Two folders have the same name.
    """
    settings = settings or SpeedSettings()
    if importlib.util.find_spec("vllm") is None:
        raise MissingExtraError(
            "--engine vllm needs vLLM, in an environment of its own: pip install vllm "
            "ghosted_fast (on a processor without a GPU see docs/vllm.md)"
        )
    for folder in folders:
        if not (Path(folder) / "config.json").is_file():
            raise SourceError(
                f"expected a saved folder for vLLM, got {folder!r}: save the model first, as "
                "`ghosted-fast fit --output` does"
            )
    names = [Path(folder).name for folder in folders]
    if len(set(names)) < len(names):
        raise ArgumentError(f"expected folders of different names, got {names}")
    _env.prepare_vllm()
    from vllm import LLM

    wanted = resolve_dtype(dtype)
    engines = [
        LLM(
            folder,
            dtype=str(wanted or _own_dtype(folder)).removeprefix("torch."),
            kv_cache_memory_bytes=_CACHE_BYTES,
            max_model_len=settings.prompt_length + settings.new_tokens + 1,
            max_num_seqs=settings.batch_size,
            max_num_batched_tokens=max(2048, settings.batch_size * settings.prompt_length),
            enable_prefix_caching=False,
            seed=0,
        )
        for folder in folders
    ]
    by_name = dict(zip(names, engines, strict=True))

    def sample(name: str) -> tuple[float, float]:
        time.sleep(_QUIET_SECONDS)
        return _measure(by_name[name], settings)

    for name in names:
        sample(name)  # compiles
    watch = Watch()
    prefill, decode, ended = run_both_phases(names, sample, settings, time.perf_counter)
    speeds = throughputs_of(prefill, decode, settings, ended, watch.conditions())
    sizes = [_size_of(folder) for folder in folders]
    return [
        ModelRow(
            name=name,
            dtype=str(engine.llm_engine.model_config.dtype).removeprefix("torch."),
            layers=layers,
            parameters=parameters,
            throughput=speeds[name],
        )
        for name, engine, (layers, parameters) in zip(names, engines, sizes, strict=True)
    ]


def _measure(engine: Any, settings: SpeedSettings) -> tuple[float, float]:
    """Return the seconds of a prefill, and of a decoding step after it."""
    from vllm import SamplingParams

    generator = torch.Generator().manual_seed(0)
    vocabulary = engine.llm_engine.model_config.get_vocab_size()
    shape = (settings.batch_size, settings.prompt_length)
    rows = torch.randint(vocabulary, shape, generator=generator).tolist()
    prompts = [{"prompt_token_ids": row} for row in rows]

    def run(count: int) -> float:
        params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
        start = time.perf_counter()
        engine.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - start

    prefill = run(1)
    return prefill, (run(1 + settings.new_tokens) - prefill) / settings.new_tokens


def _own_dtype(folder: str) -> torch.dtype:
    """Return the dtype of a saved model's weights: vLLM's "auto" would make bf16 of fp32."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder).dtype or torch.float32


def _size_of(folder: str) -> tuple[int, int]:
    """Return the numbers of layers and of parameters of a saved model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return config.num_hidden_layers, sum(parameter.numel() for parameter in model.parameters())
