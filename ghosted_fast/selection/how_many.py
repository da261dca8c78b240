"""How many layers to remove, from what the result must hold: a quality or a speed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from typing import Any

from ghosted_fast import distributed
from ghosted_fast.errors import ArgumentError, BudgetError
from ghosted_fast.facts import Budget, Trial
from ghosted_fast.fit.candidates import DEFAULT_SCORE_TOKENS, dense_loss, score_gaps
from ghosted_fast.fit.ghosts import fit_in_sequence
from ghosted_fast.measure.speed import compare_throughput
from ghosted_fast.models.families import decoder_layers, hidden_size
from ghosted_fast.models.families import num_layers as layer_count
from ghosted_fast.models.gap import Gap
from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.options import GhostOptions
from ghosted_fast.selection.criteria.request import Selection
from ghosted_fast.selection.select import select_layers
from ghosted_fast.surgery.cut import remove_layers, removed_intervals
from ghosted_fast.text.batches import iterate_batches
from ghosted_fast.text.folds import held_out_batches, training_batches

# What a speed is measured with.
_PROMPT_LENGTH, _NEW_TOKENS, _REPEATS = 64, 24, 5


def most_layers_within(
    model: Any,
    batches: Iterable[Any],
    max_perplexity_increase: float,
    criterion: str = "ghost",
    *,
    options: GhostOptions | None = None,
    score_tokens: int = DEFAULT_SCORE_TOKENS,
    **settings: Any,
) -> tuple[Selection, Budget]:
    """Find the most layers that can go while the perplexity stays within a bound.

    The perplexity is that on the held-out fold, with ghosts that were fitted on the other folds. It
    is taken to grow with the number of layers, which is doubled until the bound is broken, and then
    bisected.

    Args:
        model: The dense model.
        batches: Calibration tokens.
        max_perplexity_increase: The bound, relative to the dense model: 0.1 is 10% above.
        criterion: What chooses the layers.
        options: How ghosts are fitted.
        score_tokens: Held-out tokens that the perplexity is measured on.
        settings: Others of `select_layers`.

    Returns:
        The layers, and how their number was found.

    Raises:
        ArgumentError: The bound is not above 0.
        BudgetError: No layer can go within it.
    """
    bound = max_perplexity_increase
    if not (math.isfinite(bound) and bound > 0):
        raise ArgumentError(
            f"expected max_perplexity_increase above 0, such as 0.1 for 10%, got {bound}"
        )
    options = options or GhostOptions()
    tokens = list(iterate_batches(batches))
    held_out = held_out_batches(tokens, options, score_tokens)
    training = training_batches(tokens, options)
    dense = dense_loss(model, held_out)
    known: dict[int, Selection] = {}
    increases: dict[int, float] = {}

    def measure_loss(removed: list[int]) -> float:
        intervals = removed_intervals(removed, layer_count(model))
        parameter = next(model.parameters())
        fits = fit_in_sequence(model, training, intervals, options)
        gaps = [
            Gap(*pair, fitted.to_module(parameter.dtype, parameter.device))
            for pair, (fitted, _) in zip(intervals, fits, strict=True)
        ]
        return score_gaps(model, held_out, [gaps])[0]

    def holds(count: int) -> bool:
        if count not in known:
            found = select_layers(
                model,
                tokens,
                count,
                criterion,
                options=options,
                score_tokens=score_tokens,
                **settings,
            )
            for number, removed in found.choices.items():
                known.setdefault(number, replace(found, removed=removed))
        selection = known[count]
        loss = measure_loss(selection.removed) if selection.loss is None else selection.loss
        increases[count] = math.expm1(loss - dense)
        return increases[count] <= bound

    best = _largest(layer_count(model) - 1, holds)
    tried = [Trial(count, increases[count]) for count in sorted(increases)]
    if not best:
        raise BudgetError(
            f"no layer can go within a perplexity {bound:.1%} above the dense model's: without "
            f"layer {known[1].removed[0]} it is {increases[1]:.1%} above on held-out text. "
            "Allow more"
        )
    return known[best], Budget("max_perplexity_increase", bound, best, increases[best], tried)


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


def fewest_layers_for(model: Any, min_decode_speedup: float) -> Budget:
    """Find the fewest layers without which decoding is faster by a factor.

    The number is estimated from the bytes that a decoding step reads, and then measured: layers
    from the middle of the model make room for a ghost that does nothing.

    Args:
        model: The dense model, in the dtype and on the device that it decodes in.
        min_decode_speedup: Decode tokens per second relative to the dense model, above 1.

    Raises:
        ArgumentError: The factor is not above 1.
        BudgetError: Not even one remaining layer is fast enough.
    """
    factor = min_decode_speedup
    if not (math.isfinite(factor) and factor > 1):
        raise ArgumentError(f"expected min_decode_speedup above 1, such as 1.3, got {factor}")
    layers = layer_count(model)
    parameter = next(model.parameters())
    measured: dict[int, float] = {}

    @cache
    def reaches(count: int) -> bool:
        start = (layers - count) // 2
        ghost = GhostLinear(hidden_size(model), device=parameter.device, dtype=parameter.dtype)
        smaller = remove_layers(model, range(start, start + count), [ghost])
        measured[count] = decode_speedup(model, smaller)
        return measured[count] >= factor

    count = 1
    while count < layers - 1 and estimated_speedup(model, count) < factor:
        count += 1
    while not reaches(count) and count < layers - 1:
        count += 1
    while count > 1 and reaches(count) and reaches(count - 1):
        count -= 1
    tried = [Trial(number, measured[number]) for number in sorted(measured)]
    if not reaches(count):
        best = max(tried, key=lambda trial: trial.value)
        raise BudgetError(
            f"decoding cannot become {factor:g} times as fast: without {best.num_layers} of the "
            f"{layers} layers it is {best.value:.2f} times as fast here. Ask for less"
        )
    return Budget("min_decode_speedup", factor, count, measured[count], tried)


def decode_speedup(dense: Any, smaller: Any) -> float:
    """Measure the decode tokens per second of a model relative to another's, in turns.

    In a process group rank 0 measures, while the others wait.
    """

    def measure() -> float:
        models = {"dense": dense, "smaller": smaller}
        speeds = compare_throughput(models, _PROMPT_LENGTH, _NEW_TOKENS, repeats=_REPEATS)
        return speeds["smaller"].decode_tokens_per_s / speeds["dense"].decode_tokens_per_s

    return distributed.on_first(measure)


def estimated_speedup(model: Any, count: int) -> float:
    """Return how many times fewer bytes decoding one token reads without some of the layers.

    Args:
        model: The dense model.
        count: Layers that one ghost replaces.
    """
    size = sum(parameter.nbytes for parameter in model.parameters())
    embedding = model.get_input_embeddings().weight
    if model.get_output_embeddings().weight is not embedding:
        size -= embedding.nbytes  # of which a token reads one row
    layers = decoder_layers(model)
    each = sum(parameter.nbytes for parameter in layers.parameters()) / len(layers)
    ghost = hidden_size(model) ** 2 * next(layers.parameters()).itemsize
    return size / (size - count * each + ghost)
