"""The real model, ghosted, for the engines that are installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ghosted_fast.assets.downloads import fetch_demo_assets
from ghosted_fast.checkpoint.save import save_model
from ghosted_fast.models.loading import load_model
from ghosted_fast.options import GhostOptions, RunOptions
from ghosted_fast.pipeline import ghost_model
from ghosted_fast.text.loading import load_texts, token_batches

torch.set_num_threads(1)
REMOVED = range(14, 19)


@pytest.fixture(scope="session")
def smollm2() -> Callable[..., tuple[Any, Path, Any]]:
    """Return a function that gives the ghosted model, its dense GGUF file and its tokenizer."""
    path = fetch_demo_assets().model
    dense, tokenizer = load_model(path, torch.float32)
    made: dict[str, Any] = {}

    def ghosted(**options: Any) -> tuple[Any, Path, Any]:
        key = repr(options)
        if key not in made:
            texts = load_texts(fetch_demo_assets().calibration)
            batches = token_batches(tokenizer, texts, 4096)
            # Corrections are not what is tested, and take most of the time.
            made[key], _ = ghost_model(
                dense,
                batches,
                removed=REMOVED,
                options=GhostOptions(**options),
                run=RunOptions(corrections=0),
            )
        return made[key], path, tokenizer

    def text(num_tokens: int, length: int = 512) -> list[list[int]]:
        texts = load_texts(fetch_demo_assets().evaluation)
        batches = token_batches(tokenizer, texts, num_tokens, length)
        return [row.tolist() for batch in batches for row in batch]

    ghosted.text = text  # type: ignore[attr-defined]
    return ghosted


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Save a model and run it in vLLM, until the test ends."""
    pytest.importorskip("vllm")
    from support.tiny_engines import byte_tokenizer
    from support.vllm_engine import Vllm

    engines: list[Vllm] = []

    def run(model: Any, tokenizer: Any = None, **options: Any) -> Vllm:
        folder = tmp_path / f"model{len(engines)}"
        save_model(model, folder, tokenizer or byte_tokenizer())
        engines.append(Vllm(folder, **options))
        return engines[-1]

    yield run
    for engine in engines:
        engine.close()
