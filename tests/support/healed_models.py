"""Tiny pairs to heal: a model without some layers, its dense model, and text."""

from __future__ import annotations

from typing import Any

import torch

from ghosted_fast.facts import HealingFacts
from ghosted_fast.improve.healing import heal
from ghosted_fast.options import GhostOptions, HealOptions, RunOptions
from ghosted_fast.pipeline import ghost_model
from ghosted_fast.testing import random_tokens

SMALL = {"rank": 4, "tokens_per_step": 384, "held_out_tokens": 768, "learning_rate": 1e-2}


def text(count: int = 40) -> list[torch.Tensor]:
    """Return batches of 8 random sequences of 24 tokens."""
    return [random_tokens(8, 24, seed) for seed in range(count)]


def visible(model: Any) -> Any:
    """Return a model whose layers all count: a tiny GPT-2 is nearly the identity."""
    with torch.no_grad():
        for module in model.modules():
            if type(module).__name__ == "Conv1D":
                module.weight.mul_(12.0)
    return model


def fitted(dense: Any, removed: tuple[int, ...] = (2, 3), **options: Any) -> Any:
    """Return a model with ghosts in the place of layers, without corrections."""
    run = RunOptions(corrections=0)
    ghosts = GhostOptions(**options)
    return ghost_model(dense, text(12), removed=removed, options=ghosts, run=run)[0]


def healed(smaller: Any, dense: Any, batches: Any = None, **given: Any) -> HealingFacts:
    """Heal a model in a few small steps; `given` are options, a state or an adapter."""
    files = {name: given.pop(name, None) for name in ("state", "adapter")}
    files["overwrite"] = given.pop("overwrite", False)
    options = HealOptions(**{**SMALL, **given})
    return heal(smaller, dense, text() if batches is None else batches, options, **files)


def weights(model: Any) -> dict[str, torch.Tensor]:
    """Return copies of all that a model would save."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Return whether two models' weights are equal to the bit."""
    return a.keys() == b.keys() and all(_bits(a[name]).equal(_bits(b[name])) for name in a)


def _bits(value: torch.Tensor) -> torch.Tensor:
    return value.contiguous().reshape(-1).view(torch.uint8)
