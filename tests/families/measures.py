"""How far a cut model is from what the dense one computes with hooks, with a cache and padded."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from support.dense_reference import ghost_formula
from torch import Tensor

from ghosted_fast.models.decoder import Decoder
from ghosted_fast.models.ghost_linear import GhostLinear

LENGTH = 10


def tokens(rows: int = 2, length: int = LENGTH, seed: int = 0) -> Tensor:
    """Return token ids that mean nothing special to any of the tiny models."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, 40, (rows, length), generator=generator)


@torch.inference_mode()
def logits(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the logits of a text."""
    given = {} if mask is None else {"attention_mask": mask}
    found: Tensor = model(input_ids=ids, use_cache=False, **given).logits
    return found.float()


def ghosts_for(intervals: list[tuple[int, int]], width: int) -> list[GhostLinear]:
    """Return one ghost for each gap; the first has all there is."""
    ghosts = []
    for index, _ in enumerate(intervals):
        first = index == 0
        ghost = GhostLinear(width, bias=first, norm_eps=1e-5 if index else None, first_state=first)
        generator = torch.Generator().manual_seed(index)
        with torch.no_grad():
            for parameter in ghost.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        ghosts.append(ghost)
    return ghosts


@contextmanager
def passed_by(
    model: Any, intervals: list[tuple[int, int]], ghosts: list[GhostLinear] | None = None
) -> Iterator[None]:
    """Run the dense model with what its layers give put in the place of what removed ones do."""
    layers = Decoder.of(model).layers
    handles = []

    def replace_by(ghost: GhostLinear | None) -> Callable[..., Any]:
        def hook(_: Any, args: Any, kwargs: Any, output: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            if ghost is not None:
                first = torch.zeros(hidden.shape[:2], dtype=torch.bool)
                first[:, 0] = True
                hidden = ghost_formula(ghost, hidden, first).to(hidden.dtype)
            if isinstance(output, tuple | list):
                return type(output)((hidden, *output[1:]))
            return hidden

        return hook

    for index, (start, stop) in enumerate(intervals):
        for layer in range(start, stop):
            ghost = ghosts[index] if ghosts is not None and layer == stop - 1 else None
            hook = replace_by(ghost)
            handles.append(layers[layer].register_forward_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def distance(got: Tensor, expected: Tensor) -> float:
    """Return the largest difference of logits, relative to the largest logit."""
    if got.shape != expected.shape or not torch.isfinite(got).all():
        return float("inf")
    return float((got - expected).abs().max() / expected.abs().max())


def cached_apart(model: Any) -> float:
    """Return how far the logits of a last token computed with a cache are from those without."""
    ids = tokens()
    expected = logits(model, ids)[:, -1]
    ones, places = torch.ones_like(ids), torch.arange(LENGTH).expand_as(ids)
    takes = inspect.signature(model.forward).parameters

    def step(start: int, end: int, **cache: Any) -> Any:
        given = {"attention_mask": ones[:, :end], "position_ids": places[:, start:end], **cache}
        known = {name: value for name, value in given.items() if name in takes}
        return model(input_ids=ids[:, start:end], use_cache=True, **known)

    with torch.inference_mode():
        found = step(0, LENGTH - 2)
        caches = ("past_key_values", "cache_params", "state")
        for end in (LENGTH - 1, LENGTH):
            cache = {name: found[name] for name in caches if found.get(name) is not None}
            found = step(end - 1, end, **cache)
    return distance(found.logits[:, -1].float(), expected)


def generated_apart(model: Any) -> float:
    """Return 0 if greedy generation gives the same tokens with a cache and without, else 1."""
    ids = tokens(rows=1, length=6)
    ones = torch.ones_like(ids)
    config = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    runs = [
        model.generate(ids, attention_mask=ones, use_cache=on, **config) for on in (True, False)
    ]
    return float(not torch.equal(*runs))


def padded_apart(model: Any) -> float:
    """Return how far the last logits of a left-padded row are from those of the row alone."""
    ids = tokens(rows=1, length=LENGTH)
    padded = torch.cat([torch.full((1, 3), 1), ids], 1)
    mask = torch.cat([torch.zeros(1, 3, dtype=torch.long), torch.ones_like(ids)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.inference_mode():
        try:
            found = model(
                input_ids=padded, attention_mask=mask, position_ids=positions, use_cache=False
            )
        except TypeError:  # a model without positions
            found = model(input_ids=padded, attention_mask=mask, use_cache=False)
    return distance(found.logits[:, -1].float(), logits(model, ids)[:, -1])
