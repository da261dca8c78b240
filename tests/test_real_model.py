"""The whole way on a real model and real text, small enough for every run of the suite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ghosted_fast._env import cache_folder
from ghosted_fast.assets.downloads import fetch_demo_assets
from ghosted_fast.fit.collect import collect_statistics
from ghosted_fast.fit.ghosts import fit_ghost
from ghosted_fast.improve.correction import correct_ghosts
from ghosted_fast.measure.perplexity import perplexity
from ghosted_fast.models.boundaries import visit_intervals
from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.models.loading import load_model
from ghosted_fast.options import GhostOptions, RunOptions
from ghosted_fast.pipeline import ghost_model
from ghosted_fast.surgery.cut import prune_model
from ghosted_fast.testing import relative_rms
from ghosted_fast.text.batches import iterate_batches
from ghosted_fast.text.loading import load_texts, token_batches

pytestmark = [
    pytest.mark.slow,
    pytest.mark.real_model,
    pytest.mark.skipif(
        not (cache_folder() / "demo").is_dir(), reason="no demo model: `make setup` fetches it"
    ),
]


@pytest.fixture(scope="module")
def model_and_tokenizer() -> tuple[Any, Any]:
    return load_model(fetch_demo_assets().model, torch.float32)


@pytest.fixture(scope="module")
def calibration(model_and_tokenizer: tuple[Any, Any]) -> list[torch.Tensor]:
    texts = load_texts(fetch_demo_assets().calibration)
    return token_batches(model_and_tokenizer[1], texts, 8192)


def test_the_papers_ghost_is_the_direct_solution(
    model_and_tokenizer: tuple[Any, Any], calibration: list[torch.Tensor]
) -> None:
    model, interval = model_and_tokenizer[0], (14, 19)
    options = GhostOptions("raw", "uniform", "off", damping=1e-6)
    fitted, solution = fit_ghost(
        collect_statistics(model, calibration, [interval], options)[0], options
    )
    gram = torch.zeros(576, 576, dtype=torch.float64)
    cross = torch.zeros_like(gram)

    def add(_: int, x: torch.Tensor, y: torch.Tensor) -> None:
        x64, y64 = x.flatten(0, 1).double(), y.flatten(0, 1).double()
        gram.add_(x64.mT @ x64)
        cross.add_(x64.mT @ (y64 - x64))

    for batch in iterate_batches(calibration):
        visit_intervals(model, batch, [interval], add)
    gram.diagonal().add_(1e-6)
    expected = torch.linalg.solve(gram, cross).mT
    assert relative_rms(fitted.weight, expected) <= 1e-5
    assert solution.num_tokens == 8192


def test_ghosts_recover_and_generate(
    model_and_tokenizer: tuple[Any, Any], calibration: list[torch.Tensor], tmp_path: Path
) -> None:
    model, tokenizer = model_and_tokenizer
    evaluation = token_batches(tokenizer, load_texts(fetch_demo_assets().evaluation), 1024)
    # The gap from layer 11 holds the one that makes the first token's activation.
    removed = range(11, 16)
    ghosted, report = ghost_model(
        model, calibration, removed=removed, run=RunOptions(corrections=0)
    )
    dense, pruned = (
        perplexity(model, evaluation),
        perplexity(prune_model(model, removed), evaluation),
    )
    recovered = perplexity(ghosted, evaluation)
    assert report.ghosts[0].first_state
    assert recovered.value < 1.8 * dense.value < 4.0 * dense.value < pruned.value
    facts = correct_ghosts(ghosted, model, calibration, 1, tokens=2048, held_out_tokens=1024)
    assert facts[0].accepted and facts[0].after < 0.95 * facts[0].before
    assert perplexity(ghosted, evaluation).value < recovered.value
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.inference_mode():
        tokens = ghosted.generate(**prompt, max_new_tokens=8, do_sample=False)
        uncached = ghosted.generate(**prompt, max_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(tokens, uncached)


def test_int8_ghosts_change_the_perplexity_by_less_than_two_thousandths(
    model_and_tokenizer: tuple[Any, Any], calibration: list[torch.Tensor]
) -> None:
    model, tokenizer = model_and_tokenizer
    evaluation = token_batches(tokenizer, load_texts(fetch_demo_assets().evaluation), 2048)
    ghosted, _ = ghost_model(
        model, calibration, removed=range(14, 19), run=RunOptions(corrections=0)
    )
    before = perplexity(ghosted, evaluation).value
    ghosts = [module for module in ghosted.modules() if isinstance(module, GhostLinear)]
    for ghost in ghosts:
        ghost.quantize("int8")
    assert ghosts
    after = perplexity(ghosted, evaluation).value
    assert 0 < abs(after / before - 1) < 0.002
