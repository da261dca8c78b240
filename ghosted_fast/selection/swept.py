"""Criteria in a sweep: layers are chosen while the text goes up, each read once for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ghosted_fast import distributed
from ghosted_fast.errors import ArgumentError
from ghosted_fast.facts import IntervalScore
from ghosted_fast.fit.candidates import Race
from ghosted_fast.fit.collect import StatisticsListener
from ghosted_fast.fit.ghosts import fit_on_training_folds
from ghosted_fast.fit.sweep.climb import Sweep, climb, ride_on, rows_of, show_stored
from ghosted_fast.fit.sweep.heats import heat_ends
from ghosted_fast.fit.sweep.riders import Riders
from ghosted_fast.measure.perplexity import predicted_positions, token_losses
from ghosted_fast.models.gap import Gap
from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.models.unloaded.stand_in import stand_ins
from ghosted_fast.options import GhostOptions, RunOptions
from ghosted_fast.selection.criteria import CRITERIA, check_criterion
from ghosted_fast.selection.criteria.ghost import TOKENS_FOR_THE_BEST
from ghosted_fast.selection.criteria.request import Request, Selection
from ghosted_fast.selection.select import are_alike, check_layer_count
from ghosted_fast.statistics.interval import IntervalStatistics
from ghosted_fast.statistics.sample import Interval
from ghosted_fast.text.calibration_text import CalibrationText
from ghosted_fast.text.folds import held_out_batches, held_out_places
from ghosted_fast.timing.spans import span

SWEPT = ("ghost", "streamline", "shortgpt", "angular", "lorp")


def check_swept(criterion: str) -> None:
    """Raise ArgumentError unless a criterion can choose layers in a sweep."""
    check_criterion(criterion)
    if criterion not in SWEPT:
        raise ArgumentError(
            f"expected a criterion out of {', '.join(SWEPT)} for a model that is swept through "
            f"layer by layer, got {criterion!r}, which needs all layers at once: choose another, "
            "or give more memory"
        )


def choose_swept(
    sweep: Sweep,
    text: CalibrationText,
    remove: int,
    criterion: str,
    options: GhostOptions,
    run: RunOptions,
) -> Selection:
    """Choose layers to remove in one sweep, see `select_layers`.

    All boundaries' states are on the shelf afterwards.

    Args:
        sweep: Of the text.
        text: Calibration tokens.
        remove: How many layers to remove.
        criterion: One of `SWEPT`.
        options: How ghosts are fitted.
        run: Held-out tokens that candidates are scored on.

    Raises:
        ArgumentError, UnsupportedModelError, CalibrationError, NonFiniteError: As `select_layers`.
    """
    decoder = sweep.source.decoder
    check_layer_count(remove, decoder.num_layers)
    check_swept(criterion)
    CRITERIA[criterion].check(decoder, remove)
    request = request_of(sweep, text, remove, options, run)
    if criterion == "ghost":
        return _by_ghost(request, sweep)
    with stand_ins(decoder.model):
        request.intervals(remove)  # refused before the climb
    climb(sweep, decoder.num_layers, lambda _: None)
    with stand_ins(decoder.model):
        return CRITERIA[criterion].choose(request)


def request_of(
    sweep: Sweep, text: CalibrationText, remove: int, options: GhostOptions, run: RunOptions
) -> Request:
    """Return what a criterion is given, see `choose_swept`."""
    decoder = sweep.source.decoder
    with stand_ins(decoder.model):
        alike = are_alike(decoder)
    return Request(decoder, text, remove, options, run, alike=alike, sweep=sweep)


def _by_ghost(request: Request, sweep: Sweep) -> Selection:
    """Score every interval with its ghost in place, see `by_ghost`.

    The statistics of an interval are gathered when its upper end is reached, and solved at once;
    the held-out states behind its ghost then go up with the rest, those of a few rows for all
    candidates and of the others for those that may still be the best.
    """
    options, intervals = request.options, intervals_of(request, request.remove)
    riders = riders_of(sweep, request, [stop for _, stop in intervals])
    climb(sweep, request.num_layers, joining(sweep, riders, intervals, options), riders)
    selection = lowest(intervals, race_to_the_top(sweep, riders, intervals))
    return replace(selection, statistics=chosen_statistics(sweep, selection, options))


def intervals_of(request: Request, count: int) -> list[Interval]:
    """Return every interval of `count` layers that the model, which stays in its files, can lose.

    Raises:
        UnsupportedModelError: There is none.
    """
    with stand_ins(request.decoder.model):
        return request.intervals(count)


def joining(
    sweep: Sweep, riders: Riders, intervals: Sequence[Interval], options: GhostOptions
) -> Callable[[int], None]:
    """Return what lets each interval join the riders, with its ghost, when its end is reached."""

    def reached(boundary: int) -> None:
        for pair in intervals:
            if pair[1] == boundary:
                riders.join(Gap(*pair, _candidate(sweep, pair, options)))

    return reached


def lowest(intervals: Sequence[Interval], losses: Sequence[float]) -> Selection:
    """Return the selection of the interval with the lowest loss, its statistics left out."""
    scores = [IntervalScore(*pair, loss) for pair, loss in zip(intervals, losses, strict=True)]
    best = min(scores, key=lambda item: item.score)
    removed = list(range(best.start, best.stop))
    return Selection(removed, scores, "ghost", {len(removed): removed}, best.score)


def chosen_statistics(
    sweep: Sweep, selection: Selection, options: GhostOptions
) -> IntervalStatistics:
    """Return the statistics of the interval that was chosen, on the whole text."""
    pair = selection.removed[0], selection.removed[-1] + 1
    listener = StatisticsListener(sweep.source.decoder, pair, options)
    show_stored(sweep, [listener])
    return listener.statistics


def riders_of(
    sweep: Sweep, request: Request, stops: Sequence[int] = (), in_heats: bool = True
) -> Riders:
    """Return riders with the held-out sequences that candidates are scored on.

    Args:
        sweep: Of the text.
        request: What the criterion is given.
        stops: Where candidates will join.
        in_heats: Whether candidates race; else all rows go up at once.

    Raises:
        CalibrationError: No sequence is held out.
    """
    batches, options = request.text.hold(), request.options
    tokens = TOKENS_FOR_THE_BEST * request.run.score_tokens
    found = held_out_batches(batches, options, tokens)
    rows = rows_of(sweep, found, held_out_places(batches, options, tokens))
    counts = [batch.num_tokens for batch in found]
    ends = heat_ends(counts, sweep.source.decoder.device) if in_heats else []
    return Riders(rows, sweep.shelf, stops, ends)


def _candidate(sweep: Sweep, pair: Interval, options: GhostOptions) -> GhostLinear:
    """Return the ghost of an interval whose upper end was reached, fitted on the training folds."""
    decoder = sweep.source.decoder
    listener = StatisticsListener(decoder, pair, options)
    show_stored(sweep, [listener])

    def fit() -> GhostLinear:
        return fit_on_training_folds(listener.statistics, options).module_of(decoder)

    with span("solves"):
        return distributed.on_first(fit, decoder.device)


def race_to_the_top(
    sweep: Sweep, riders: Riders, intervals: Sequence[Interval | None]
) -> list[float]:
    """Return the loss of each candidate, as `score_gaps` finds it.

    Args:
        sweep: The sweep.
        riders: The candidates, whose states of the first heat have come to the top.
        intervals: The candidates; None for the dense model.
    """
    race = Race(len(intervals))
    for heat in range(riders.heats):
        if heat > 0:
            running = [pair for index in race.running if (pair := intervals[index]) is not None]
            ride_on(sweep, riders, heat, running)
        for losses in _losses_at_the_top(sweep, riders, intervals, race.running, heat):
            race.add(losses)
    return race.scores()


def _losses_at_the_top(
    sweep: Sweep,
    riders: Riders,
    intervals: Sequence[Interval | None],
    running: Sequence[int],
    heat: int,
) -> list[Tensor]:
    """Return the losses [candidates, tokens] on each row of a heat, of those that are running."""
    top, riders.heat = sweep.source.decoder.num_layers, heat
    predicted = [predicted_positions(row.batch.attention_mask) for row in riders.rows_of_heat]
    found = [
        torch.zeros(len(intervals), int(where.sum()), dtype=torch.float64) for where in predicted
    ]
    first = riders.rows_of_heat[0].number
    with sweep.source.head(), span("scoring"), torch.inference_mode():
        for index in running:
            for row, hidden in riders.states(intervals[index], top):
                batch, place = row.batch, row.number - first
                logits = sweep.source.logits(batch, hidden)
                loss, _ = token_losses(logits, batch.input_ids, batch.attention_mask)
                found[place][index] = loss[predicted[place]].double().cpu()
    distributed.add_up(found)
    return found


def statistics_of(
    sweep: Sweep, intervals: Sequence[Interval], options: GhostOptions
) -> list[StatisticsListener]:
    """Return listeners that have gathered the statistics of intervals, one sweep for all.

    Args:
        sweep: Of the text.
        intervals: Pairs (start, stop).
        options: How the ghosts will be fitted.
    """
    make = partial(StatisticsListener, sweep.source.decoder, options=options)
    listeners = [make(interval=pair) for pair in intervals]
    climb(sweep, max(stop for _, stop in intervals), lambda _: None)
    show_stored(sweep, listeners)
    return listeners
