"""How many layers to remove, from what the result must hold: a quality or a speed."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from typing import Any

from ghosted_fast import distributed
from ghosted_fast.errors import BudgetError
from ghosted_fast.facts import Budget, Trial
from ghosted_fast.fit.candidates import dense_loss, score_gaps
from ghosted_fast.fit.ghosts import fit_in_sequence
from ghosted_fast.measure.speed import compare_throughput
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.models.gap import Gap
from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.options import (
    Count,
    GhostOptions,
    HowMany,
    Layers,
    PerplexityBound,
    RunOptions,
    SpeedBound,
)
from ghosted_fast.selection.criteria import CRITERIA
from ghosted_fast.selection.criteria.ghost import TOKENS_FOR_THE_BEST
from ghosted_fast.selection.criteria.request import Selection
from ghosted_fast.selection.select import select_layers
from ghosted_fast.surgery.cut import remove_layers, removed_intervals
from ghosted_fast.text.calibration_text import CalibrationText
from ghosted_fast.text.folds import held_out_batches, training_batches

_LOGGER = logging.getLogger(__name__)
# What a speed is measured with.
_SPEED = {"prompt_length": 64, "new_tokens": 32, "precision": 0.01, "seconds": 30.0}


def choose_layers(
    model: Any,
    batches: Iterable[Any],
    how_many: HowMany,
    criterion: str,
    options: GhostOptions,
    run: RunOptions,
) -> tuple[Selection, Budget | None]:
    """Return the layers that are asked for, and how a bound led to their number.

    Args:
        model: The dense model.
        batches: Calibration tokens.
        how_many: What is asked for.
        criterion: What chooses the layers.
        options: How ghosts are fitted.
        run: As in `select_layers`.

    Raises:
        ArgumentError: So many layers cannot be removed.
        BudgetError: The bound cannot be kept.
    """
    if isinstance(how_many, Layers):
        return Selection(sorted(how_many.removed), [], criterion), None
    if isinstance(how_many, PerplexityBound):
        return most_layers_within(model, batches, how_many, criterion, options=options, run=run)
    budget = None
    if isinstance(how_many, SpeedBound):
        budget = fewest_layers_for(model, how_many)
        how_many = Count(budget.remove)
    selection = select_layers(model, batches, how_many.layers, criterion, options=options, run=run)
    return selection, budget


def most_layers_within(
    model: Any,
    batches: Iterable[Any],
    bound: PerplexityBound,
    criterion: str = "ghost",
    *,
    options: GhostOptions | None = None,
    run: RunOptions | None = None,
) -> tuple[Selection, Budget]:
    """Find the most layers that can go while the perplexity stays within a bound.

    The perplexity is that on the held-out fold, with ghosts that were fitted on the other folds. It
    is taken to grow with the number of layers, which is doubled until the bound is broken, and then
    bisected.

    Args:
        model: The dense model.
        batches: Calibration tokens.
        bound: Relative to the dense model.
        criterion: What chooses the layers.
        options: How ghosts are fitted.
        run: As in `select_layers`.

    Returns:
        The layers, and how their number was found.

    Raises:
        BudgetError: No layer can go within it.
    """
    options, run = options or GhostOptions(), run or RunOptions()
    decoder, text = Decoder.of(model), CalibrationText.of(batches)
    held_out = held_out_batches(text.hold(), options, TOKENS_FOR_THE_BEST * run.score_tokens)
    training = training_batches(text.hold(), options)

    def choose(count: int) -> Selection:
        return select_layers(decoder, text, count, criterion, options=options, run=run)

    def measure_loss(removed: list[int]) -> float:
        intervals = removed_intervals(removed, decoder.num_layers)
        fits = fit_in_sequence(decoder, training, intervals, options)
        gaps = [
            Gap(*pair, fitted.module_of(decoder))
            for pair, (fitted, _) in zip(intervals, fits, strict=True)
        ]
        return score_gaps(decoder, held_out, [gaps])[0]

    method = CRITERIA[criterion]
    method.check(decoder, 1)
    most = decoder.num_layers - method.keeps
    return most_layers(most, bound, dense_loss(decoder, held_out), choose, measure_loss)


def most_layers(
    most: int,
    bound: PerplexityBound,
    dense: float,
    choose: Callable[[int], Selection],
    measure_loss: Callable[[list[int]], float],
) -> tuple[Selection, Budget]:
    """Find the most layers that can go within a bound, see `most_layers_within`.

    Args:
        most: So many at most.
        bound: Relative to the dense model.
        dense: The loss of that on the held-out fold, nats per token.
        choose: Chooses a number of layers.
        measure_loss: Gives the loss without some layers, where the choice does not tell it.

    Raises:
        BudgetError: No layer can go within it.
    """
    known: dict[int, Selection] = {}
    increases: dict[int, float] = {}

    def holds(count: int) -> bool:
        if count not in known:
            found = choose(count)
            for number, removed in found.choices.items():
                known.setdefault(number, replace(found, removed=removed))
        selection = known[count]
        loss = measure_loss(selection.removed) if selection.loss is None else selection.loss
        increases[count] = math.expm1(loss - dense)
        return increases[count] <= bound.max_increase

    best = _largest(most, holds)
    tried = [Trial(count, increases[count]) for count in sorted(increases)]
    if not best:
        raise BudgetError(
            f"no layer can go within a perplexity {bound.max_increase:.1%} above the dense "
            f"model's: without layer {known[1].removed[0]} it is {increases[1]:.1%} above on "
            "held-out text. Allow more"
        )
    budget = Budget("max_perplexity_increase", bound.max_increase, best, increases[best], tried)
    return known[best], budget


def _largest(most: int, holds: Callable[[int], bool]) -> int:
    """Return the largest number in 1..most for which something holds, 0 if it does for none."""
    low, high = 0, 1
    while high <= most and holds(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def numbers_tried(most: int, best: int) -> list[int]:
    """Return the numbers of layers that are tried until a bound has led to one of them.

    Args:
        most: So many can go at most.
        best: The number that is found, 0 for none.
    """
    tried: list[int] = []

    def holds(count: int) -> bool:
        tried.append(count)
        return count <= best

    _largest(most, holds)
    return tried


def fewest_layers_for(model: Any, bound: SpeedBound) -> Budget:
    """Find the fewest layers without which decoding is faster by a factor.

    The number is estimated from the bytes that a decoding step reads, and then measured: layers
    from the middle of the model make room for a ghost that does nothing.

    Args:
        model: The dense model, in the dtype and on the device that it decodes in.
        bound: Relative to the dense model.

    Raises:
        BudgetError: Not even one remaining layer is fast enough.
    """
    factor = bound.min_speedup
    decoder = Decoder.of(model)
    layers = decoder.num_layers
    measured: dict[int, float] = {}

    @cache
    def reaches(count: int) -> bool:
        start = (layers - count) // 2
        ghost = GhostLinear(decoder.hidden_size, device=decoder.device, dtype=decoder.dtype)
        smaller = remove_layers(decoder.model, range(start, start + count), [ghost])
        measured[count] = decode_speedup(decoder.model, smaller)
        return measured[count] >= factor

    count = 1
    while count < layers - 1 and estimated_speedup(decoder, count) < factor:
        count += 1
    while not reaches(count) and count < layers - 1:
        count += 1
    while count > 1 and reaches(count) and reaches(count - 1):
        count -= 1
    tried = [Trial(number, measured[number]) for number in sorted(measured)]
    if not reaches(count):
        best = max(tried, key=lambda trial: trial.value)
        raise BudgetError(
            f"decoding cannot become {factor:g} times as fast: without {best.remove} of the "
            f"{layers} layers it is {best.value:.2f} times as fast here. Ask for less"
        )
    return Budget("min_decode_speedup", factor, count, measured[count], tried)


def remeasured(budget: Budget, dense: Any, smaller: Any) -> Budget:
    """Return a bound on speed with what the finished model gives, and warn if that is less."""
    reached = decode_speedup(dense, smaller)
    if reached < budget.asked:
        _LOGGER.warning(
            "decoding is %.2f times as fast as the dense model's, less than the %g asked for: "
            "measured again with the chosen layers and their ghosts",
            reached,
            budget.asked,
        )
    return replace(budget, reached=reached)


def decode_speedup(dense: Any, smaller: Any) -> float:
    """Measure how many times as fast as another a model decodes, at the least.

    It is the lower end of the interval, so that a bound that holds once holds again. In a process
    group rank 0 measures, while the others wait.
    """

    def measure() -> float:
        models = {"dense": dense, "smaller": smaller}
        found = compare_throughput(models, **_SPEED, interruptible=False)["smaller"]  # type: ignore[arg-type]
        return found.relative["dense"]["decode"].low

    return distributed.on_first(measure)


def estimated_speedup(model: Any, count: int) -> float:
    """Return how many times fewer bytes decoding one token reads without some of the layers.

    Args:
        model: The dense model.
        count: Layers that one ghost replaces.
    """
    decoder = Decoder.of(model)
    size = sum(parameter.nbytes for parameter in decoder.model.parameters())
    embedding = decoder.model.get_input_embeddings().weight
    if decoder.model.get_output_embeddings().weight is not embedding:
        size -= embedding.nbytes  # of which a token reads one row
    each = sum(parameter.nbytes for parameter in decoder.layers.parameters()) / decoder.num_layers
    ghost = decoder.hidden_size**2 * next(decoder.layers.parameters()).itemsize
    return size / (size - count * each + ghost)
