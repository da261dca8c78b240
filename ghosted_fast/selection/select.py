"""Which layers to remove: the door to every criterion."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from ghosted_fast import distributed
from ghosted_fast.errors import ArgumentError, UnsupportedModelError, renamed
from ghosted_fast.models.checked.bos import tell_missing_bos
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.options import GhostOptions, RunOptions
from ghosted_fast.selection.criteria import CRITERIA, check_criterion
from ghosted_fast.selection.criteria.request import Request, Selection
from ghosted_fast.surgery.removable import check_removable

_RUN = "a field of run=RunOptions(...)"


@renamed(num_layers="remove", score_tokens=_RUN, memory_budget=_RUN, beam=_RUN, progress=_RUN)
@distributed.failing_together()
def select_layers(
    model: Any,
    batches: Iterable[Any],
    remove: int,
    criterion: str = "ghost",
    *,
    options: GhostOptions | None = None,
    run: RunOptions | None = None,
    also: Iterable[int] = (),
) -> Selection:
    """Choose layers to remove.

    In a process group the ranks share the work; every rank calls this with the whole text.

    Args:
        model: The dense model, a transformers causal language model.
        batches: Calibration tokens, see `iterate_batches`.
        remove: How many layers to remove, in 1..layers-1.
        criterion: One of `CRITERIA`:
            `ghost`: the interval whose ghosted model has the lowest loss on held-out tokens;
            `ghost-search`: the same over sets of layers in up to three pieces;
            `streamline`: the interval whose ends have the highest cosine;
            `shortgpt`: the layers that turn the state least, one by one;
            `sleb`: greedily the layer without which the loss is lowest, with nothing in its place;
            `taylor`: the layers of the lowest sum of |weight x gradient|, one by one;
            `angular`: the interval across which the last token turns least;
            `lorp`: the most redundant layers of groups of like layers;
            `prunecomp`: again and again the layer that turns the state least, the size of the state
            made up for.
        options: How ghosts are fitted (the ghost criteria), and how many folds there are, the last
            of which is held out.
        run: Held-out tokens that candidates are scored on (the ghost criteria, `sleb`, `taylor`;
            those that may still be the best see up to four times as many where the criterion is
            `ghost`), memory for statistics (the ghost criteria), sets that race (`ghost-search`),
            and whether to show progress.
        also: Other numbers of layers; `streamline` and `angular` settle them in the same pass, see
            `Selection.choices`.

    Returns:
        The chosen layers and every candidate's score.

    Raises:
        ArgumentError: The number of layers or the criterion is not one that can be used, or the
            criterion cannot choose so many.
        UnsupportedModelError: The model's layers depend on one another in ways that a cut breaks.
        CalibrationError: Too few tokens, or a budget below the statistics of one interval.
        NonFiniteError: An activation is NaN or infinite.
        RankError: Another rank failed, or is gone.
    """
    options, run, also = options or GhostOptions(), run or RunOptions(), tuple(also)
    decoder = Decoder.of(model)
    for count in (remove, *also):
        check_layer_count(count, decoder.num_layers)
    check_criterion(criterion)
    CRITERIA[criterion].check(decoder, max((remove, *also)))
    alike = are_alike(decoder)
    distributed.check_same(
        {
            "remove": remove,
            "criterion": criterion,
            "options": options,
            "run": replace(run, progress=False),
            "also": also,
        },
        decoder.model,
    )
    text = distributed.same_text_everywhere(batches)
    tell_missing_bos(model, text.beginning)
    return CRITERIA[criterion].choose(Request(decoder, text, remove, options, run, also, alike))


def are_alike(decoder: Decoder) -> bool:
    """Return whether the first layer, one in the middle and the last can all be removed.

    Where they can, the others are taken to be alike; else each candidate is tried before anything
    is calibrated.

    Raises:
        UnsupportedModelError: None of the three can.
    """
    last = decoder.num_layers - 1
    tried, refused = {0, last // 2, last}, []
    for layer in sorted(tried):
        try:
            check_removable(decoder.model, [layer])
        except UnsupportedModelError as error:
            refused.append(error)
    if len(refused) == len(tried):
        raise refused[0]
    return not refused


def check_layer_count(count: int, num_layers: int) -> None:
    """Raise unless so many layers can be removed from a model.

    Raises:
        TypeError: `count` is no int.
        ArgumentError: It is not in 1..num_layers - 1.
    """
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"expected remove to be an int, got {type(count).__name__}")
    if not 1 <= count < num_layers:
        raise ArgumentError(
            f"expected remove in 1..{num_layers - 1} for a model of {num_layers} layers, "
            f"got {count}"
        )
