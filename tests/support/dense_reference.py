"""What a ghosted model must compute, found without surgery: the dense model with hooks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ghosted_fast.models.families import decoder_layers
from ghosted_fast.models.ghost_linear import GhostLinear

HIDDEN_SIZE = 32
# Gaps at the start, in the middle and at the end; the first kept layer has a ghost on each side.
NUM_LAYERS = 8
REMOVED = [0, 2, 3, 7]
KEPT = [1, 4, 5, 6]
INTERVALS = [(0, 1), (2, 4), (7, 8)]


def random_ghost(seed: int, **options: Any) -> GhostLinear:
    """Return a ghost whose every part changes the output visibly."""
    ghost = GhostLinear(HIDDEN_SIZE, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in ghost.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return ghost


def random_ghosts() -> list[GhostLinear]:
    """Return three ghosts, for the gaps `INTERVALS`, that use every option between them."""
    return [
        random_ghost(1, bias=True, first_state=True),
        random_ghost(2, norm_eps=1e-5, first_state=True),
        random_ghost(3, bias=True, norm_eps=1e-6),
    ]


def ghost_formula(ghost: GhostLinear, x: Tensor, is_first: Tensor) -> Tensor:
    """Return y = x + M f(x) + b, and the first state where `is_first` [B, T] is True, in fp32."""
    x = x.float()
    features = x
    if ghost.norm_eps is not None:
        features = x / (x.square().mean(-1, keepdim=True) + ghost.norm_eps).sqrt()
    y = x + features @ ghost.weight.float().T
    if ghost.bias is not None:
        y = y + ghost.bias
    if ghost.first_state is not None:
        y = torch.where(is_first[..., None], ghost.first_state.float(), y)
    return y


@contextmanager
def gaps_emulated(
    dense: nn.Module,
    intervals: list[tuple[int, int]],
    ghosts: list[GhostLinear | None],
    is_first: Tensor,
) -> Iterator[None]:
    """Make the dense model's layers in each interval return what the ghost would.

    Args:
        dense: The dense model.
        intervals: The gaps [start, stop).
        ghosts: A ghost for each gap, or None for a gap that passes its input on.
        is_first: Bool [B, T], the first attended tokens of the batch to run.
    """
    layers, entering, handles = decoder_layers(dense), {}, []

    def enter(start: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entering[start] = args[0] if args else kwargs["hidden_states"]

        return hook

    def leave(start: int, ghost: GhostLinear | None) -> Any:
        def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            x = entering[start]
            return x if ghost is None else ghost_formula(ghost, x, is_first).to(x.dtype)

        return hook

    for (start, stop), ghost in zip(intervals, ghosts, strict=True):
        handles.append(layers[start].register_forward_pre_hook(enter(start), with_kwargs=True))
        handles.append(layers[stop - 1].register_forward_hook(leave(start, ghost)))
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()


def first_of(mask: Tensor) -> Tensor:
    """Return where the first one of each row of a mask [B, T] is, by looking at each row."""
    first = torch.zeros_like(mask, dtype=torch.bool)
    for row, entries in enumerate(mask.tolist()):
        first[row, entries.index(1)] = True
    return first


def expected_logits(
    dense: Any,
    tokens: Tensor,
    intervals: list[tuple[int, int]],
    ghosts: list[GhostLinear | None],
    mask: Tensor | None = None,
    **inputs: Any,
) -> Tensor:
    """Return the logits [B, T, V] that the ghosted model must have."""
    is_first = first_of(torch.ones_like(tokens) if mask is None else mask)
    with gaps_emulated(dense, intervals, ghosts, is_first):
        return dense(tokens, attention_mask=mask, use_cache=False, **inputs).logits


def expected_tokens(
    dense: Any,
    prompt: Tensor,
    intervals: list[tuple[int, int]],
    ghosts: list[GhostLinear | None],
    new_tokens: int,
) -> Tensor:
    """Return a prompt [1, T] with the greedy continuation, each step computed from the start."""
    tokens = prompt
    for _ in range(new_tokens):
        logits = expected_logits(dense, tokens, intervals, ghosts)
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    return tokens
