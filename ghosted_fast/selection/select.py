"""Which layers to remove: the door to every criterion."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ghosted_fast import distributed
from ghosted_fast.errors import ArgumentError
from ghosted_fast.facts import IntervalScore, SetScore
from ghosted_fast.fit.candidates import DEFAULT_SCORE_TOKENS, score_intervals
from ghosted_fast.fit.memory_budget import default_memory_budget, passes_within
from ghosted_fast.models.families import num_layers as layer_count
from ghosted_fast.options import GhostOptions
from ghosted_fast.selection.criteria import CRITERIA
from ghosted_fast.selection.criteria.request import (
    DEFAULT_BEAM,
    Request,
    Selection,
    candidate_intervals,
)
from ghosted_fast.text.folds import held_out_batches

__all__ = [
    "CRITERIA",
    "DEFAULT_BEAM",
    "DEFAULT_SCORE_TOKENS",
    "IntervalScore",
    "Selection",
    "SetScore",
    "candidate_intervals",
    "check_layer_count",
    "default_memory_budget",
    "held_out_batches",
    "passes_within",
    "score_intervals",
    "select_layers",
]


@distributed.together()
def select_layers(
    model: nn.Module,
    batches: Iterable[Any],
    num_layers: int,
    criterion: str = "ghost",
    *,
    options: GhostOptions | None = None,
    score_tokens: int = DEFAULT_SCORE_TOKENS,
    memory_budget: int | None = None,
    beam: int = DEFAULT_BEAM,
    also: Iterable[int] = (),
    progress: bool = False,
) -> Selection:
    """Choose layers to remove.

    In a process group the ranks share the work; every rank calls this with the whole text.

    Args:
        model: The dense model, a transformers causal language model.
        batches: Calibration tokens, see `iterate_batches`.
        num_layers: How many layers to remove, in 1..layers-1.
        criterion: One of `CRITERIA`:
            `ghost`: the interval whose ghosted model has the lowest loss on held-out tokens;
            `ghost-search`: the same over sets of layers in up to three pieces;
            `streamline`: the interval whose ends have the highest cosine;
            `shortgpt`: the layers that turn the state least, one by one;
            `sleb`: greedily the layer without which the loss is lowest, with nothing in its place;
            `taylor`: the layers of the lowest sum of |weight x gradient|, one by one;
            `angular`: the interval across which the last token turns least.
        options: How ghosts are fitted (the ghost criteria), and how many folds there are, the last
            of which is held out.
        score_tokens: Held-out tokens that candidates are scored on (the ghost criteria, `sleb`,
            `taylor`). Those that may still be the best see up to four times as many where the
            criterion is `ghost`.
        memory_budget: Bytes that statistics may take (the ghost criteria). Where all candidates
            together need more, several passes are made. Default: half of the free memory.
        beam: How many sets race in the criterion `ghost-search`.
        also: Other numbers of layers; `streamline` and `angular` settle them in the same pass, see
            `Selection.choices`.
        progress: Whether to show progress bars on stderr.

    Returns:
        The chosen layers and every candidate's score.

    Raises:
        ArgumentError: The number of layers or the criterion is not one that can be used.
        CalibrationError: Too few tokens, or a budget below the statistics of one interval.
        NonFiniteError: An activation is NaN or infinite.
        RankError: Another rank failed, or is gone.
    """
    layers = layer_count(model)
    also = tuple(also)
    distributed.check_same(
        {
            "num_layers": num_layers,
            "criterion": criterion,
            "options": options,
            "score_tokens": score_tokens,
            "memory_budget": memory_budget,
            "beam": beam,
            "also": also,
        },
        model,
    )
    for count in (num_layers, *also):
        check_layer_count(count, layers)
    if criterion not in CRITERIA:
        raise ArgumentError(f"expected a criterion out of {', '.join(CRITERIA)}, got {criterion!r}")
    if beam < 1:
        raise ArgumentError(f"expected beam >= 1, got {beam}")
    request = Request(
        model,
        distributed.whole_text(batches),
        num_layers,
        layers,
        options or GhostOptions(),
        score_tokens,
        memory_budget,
        progress,
        beam,
        also,
    )
    return CRITERIA[criterion](request)


def check_layer_count(count: int, layers: int) -> None:
    """Raise ArgumentError unless `count` layers can be removed from a model of `layers` layers."""
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"expected num_layers to be an int, got {type(count).__name__}")
    if not 1 <= count < layers:
        raise ArgumentError(
            f"expected num_layers in 1..{layers - 1} for a model of {layers} layers, got {count}"
        )
