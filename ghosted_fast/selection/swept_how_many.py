"""How many layers to remove within a bound, where a model is swept through.

The text goes up once. For each number of layers that is tried, its candidates then ride up past it:
held-out states behind their ghosts, through the layers above. All that is found out is that of the
way in memory, see `most_layers_within`, and so are the numbers that are tried.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ghosted_fast import distributed
from ghosted_fast.errors import CalibrationError
from ghosted_fast.facts import Budget
from ghosted_fast.fit.collect import TrainingListener
from ghosted_fast.fit.ghosts import fit_ghost
from ghosted_fast.fit.sweep.climb import HEAT, RIDE, Sweep, climb, pass_gap, ride, show_stored
from ghosted_fast.fit.sweep.riders import Riders
from ghosted_fast.fit.walk import check_enough_tokens
from ghosted_fast.models.gap import Gap
from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.models.unloaded.stand_in import stand_ins
from ghosted_fast.options import GhostOptions, PerplexityBound, RunOptions
from ghosted_fast.selection.criteria import CRITERIA
from ghosted_fast.selection.criteria.request import Request, Selection
from ghosted_fast.selection.how_many import most_layers
from ghosted_fast.selection.swept import (
    check_swept,
    chosen_statistics,
    intervals_of,
    joining,
    lowest,
    race_to_the_top,
    request_of,
    riders_of,
)
from ghosted_fast.statistics.sample import Interval
from ghosted_fast.surgery.cut import removed_intervals
from ghosted_fast.text.calibration_text import CalibrationText
from ghosted_fast.text.folds import is_held_out, token_count, training_batches

# What a shelf keeps the losses that were found under, by the number of layers; "0" is the dense
# model's.
_LOSSES = "losses"


def most_layers_swept(
    sweep: Sweep,
    text: CalibrationText,
    bound: PerplexityBound,
    criterion: str,
    options: GhostOptions,
    run: RunOptions,
) -> tuple[Selection, Budget]:
    """Find the most layers that can go within a bound, see `most_layers_within`.

    All boundaries' states are on the shelf afterwards.

    Args:
        sweep: Of the text.
        text: Calibration tokens.
        bound: Relative to the dense model.
        criterion: One of `SWEPT`.
        options: How ghosts are fitted.
        run: Held-out tokens that candidates are scored on.

    Returns:
        The layers, and how their number was found.

    Raises:
        BudgetError: No layer can go within it.
        ArgumentError, UnsupportedModelError, CalibrationError, NonFiniteError: As `select_layers`.
    """
    check_swept(criterion)
    CRITERIA[criterion].check(sweep.source.decoder, 1)
    request = request_of(sweep, text, 1, options, run)
    intervals_of(request, 1)  # refused before the climb
    riders = riders_of(sweep, request, in_heats=criterion == "ghost")
    climb(sweep, request.num_layers, lambda _: None, riders)
    rides = _Rides(sweep, riders, request, criterion)
    (dense,) = rides.losses(0, lambda: [None])
    most = request.num_layers - CRITERIA[criterion].keeps
    selection, budget = most_layers(most, bound, dense, rides.choose, rides.measure_loss)
    if criterion == "ghost":
        statistics = chosen_statistics(sweep, selection, options)
        selection = replace(selection, statistics=statistics)
    return selection, budget


@dataclass(frozen=True, eq=False)
class _Rides:
    """The numbers of layers that are tried, each with its ride to the top.

    Attributes:
        sweep: Of the text, which has come to the top.
        riders: The held-out states.
        request: What the criterion is given; its number of layers is not looked at.
        criterion: What chooses the layers.
    """

    sweep: Sweep
    riders: Riders
    request: Request
    criterion: str

    def choose(self, count: int) -> Selection:
        """Return what the criterion chooses for a number of layers."""
        request, method = replace(self.request, remove=count), CRITERIA[self.criterion]
        method.check(request.decoder, count)
        if self.criterion != "ghost":
            with stand_ins(request.decoder.model):
                return method.choose(request)
        intervals = intervals_of(request, count)

        def take_up() -> list[Interval | None]:
            reached = joining(self.sweep, self.riders, intervals, request.options)
            self._ride([stop for _, stop in intervals], reached, count)
            return list(intervals)

        return lowest(intervals, self.losses(count, take_up))

    def measure_loss(self, removed: list[int]) -> float:
        """Return the held-out loss without some layers, with ghosts of the other folds."""
        gaps = removed_intervals(removed, self.request.num_layers)

        def reached(boundary: int) -> None:
            if boundary == gaps[-1][1]:
                self._join_behind(gaps)

        def take_up() -> list[Interval | None]:
            self._ride([gaps[-1][1]], reached, len(removed))
            return [gaps[-1]]

        return self.losses(len(removed), take_up)[0]

    def losses(self, count: int, take_up: Callable[[], list[Interval | None]]) -> list[float]:
        """Return losses that an earlier run has kept, or that are found now and kept.

        Args:
            count: The number of layers that they are for.
            take_up: Takes candidates to the top, and returns them; None stands for the dense model.
        """
        shelf = self.sweep.shelf
        kept = shelf.facts.get(_LOSSES, {})
        if all(distributed.gather(str(count) in kept)):
            return [float(loss) for loss in kept[str(count)]]
        candidates = take_up()
        rode = [pair for pair in candidates if pair is not None]
        # The dense model's states are all there: the head is read once for them.
        riders = self.riders if rode else Riders(self.riders.rows, shelf)
        found = race_to_the_top(self.sweep, riders, candidates)
        self.riders.get_off(rode, self.request.num_layers)
        shelf.keep({_LOSSES: kept | {str(count): found}, RIDE: None, HEAT: None})
        return found

    def _ride(self, stops: list[int], reached: Callable[[int], None], count: int) -> None:
        name = f"trying {count} layer{'s' if count > 1 else ''}"
        ride(self.sweep, self.riders, stops, reached, name)

    def _join_behind(self, gaps: list[Interval]) -> None:
        """Let the model without some layers join behind the last of its gaps.

        Its ghosts are fitted one after the other, see `fit_in_sequence`.
        """
        sweep, x_name = self.sweep, None
        _check_training_text(sweep, self.request)
        for number, gap in enumerate(gaps):
            filled = Gap(*gap, _ghost_of(sweep, gap, self.request.options, x_name))
            if number + 1 < len(gaps):
                x_name = pass_gap(sweep, filled, gaps[number + 1][0], x_name)
            else:
                self.riders.join(filled, x_name)
        if x_name is not None:
            sweep.shelf.drop(x_name)


def _ghost_of(
    sweep: Sweep, gap: Interval, options: GhostOptions, x_name: str | None
) -> GhostLinear:
    """Return the ghost of a gap, fitted on all folds but the held-out one."""
    decoder = sweep.source.decoder
    listener = TrainingListener(decoder, gap, options)
    show_stored(sweep, [listener], x_name)

    def fit() -> GhostLinear:
        return fit_ghost(listener.statistics, options)[0].module_of(decoder)

    return distributed.on_first(fit, decoder.device)


def _check_training_text(sweep: Sweep, request: Request) -> None:
    """Raise unless there is enough text that is not held out, and rank 0 has the first of it.

    Raises:
        CalibrationError: There is not, or it has none.
    """
    options, width = request.options, request.decoder.hidden_size
    found = token_count(training_batches(request.text.hold(), options))
    check_enough_tokens(found, 2 * width, width)
    own = any(
        not is_held_out(turn.sequences + row, options) and bool(mask.any())
        for turn in sweep.text.turns
        for row, mask in enumerate(turn.batch.attention_mask)
    )
    if not distributed.from_first(own):
        raise CalibrationError(
            "expected sequences to learn from in the part of the text that rank 0 has, got none: "
            "give more text, or use fewer processes"
        )
