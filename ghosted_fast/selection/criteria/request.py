"""What every criterion is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ghosted_fast.errors import UnsupportedModelError
from ghosted_fast.facts import IntervalScore, SetScore, layers_as_text, notebook_table
from ghosted_fast.fit.sweep.climb import Sweep
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.options import GhostOptions, RunOptions
from ghosted_fast.statistics.interval import IntervalStatistics
from ghosted_fast.statistics.sample import Interval
from ghosted_fast.surgery.removable import check_removable
from ghosted_fast.text.batches import Batch
from ghosted_fast.text.calibration_text import CalibrationText
from ghosted_fast.text.folds import held_out_batches, training_batches


@dataclass(frozen=True)
class Selection:
    """The layers a criterion chose.

    Attributes:
        removed: Layers to remove, ascending.
        scores: Every candidate that was looked at: intervals, or single layers for the criteria
            that choose layer by layer.
        criterion: The name of the criterion.
        choices: The choice for each number of layers that the same work has settled, this one
            included: all for `shortgpt` and `taylor`, all up to this one for `sleb`.
        loss: The held-out loss of the ghosted model, where the criterion measured it, else None.
        statistics: The winner's statistics where the criterion gathered them, else None.
        sets: The sets that `ghost-search` raced, the best first.
    """

    removed: list[int]
    scores: list[IntervalScore]
    criterion: str
    choices: dict[int, list[int]] = field(default_factory=dict)
    loss: float | None = None
    statistics: IntervalStatistics | None = field(default=None, repr=False, compare=False)
    sets: list[SetScore] = field(default_factory=list)

    def _repr_html_(self) -> str:
        title = f"{self.criterion} removes {layers_as_text(self.removed)}"
        best = sorted(self.scores, key=lambda item: item.score)
        rows = [
            (layers_as_text(range(item.start, item.stop)), f"{item.score:.5f}") for item in best
        ]
        return notebook_table(title, rows, ["layers", "score"])


@dataclass(frozen=True)
class Request:
    """A checked call of `select_layers`.

    Attributes:
        decoder: The dense model.
        text: Calibration tokens.
        remove: How many layers to remove.
        options: How ghosts are fitted.
        run: Held-out tokens to score on, sets to race, memory, progress.
        also: Other numbers of layers, to be settled too where that takes no pass of its own.
        alike: Whether layers are taken to be alike, so that any run can go that `Decoder.needs`
            allows; if not, each candidate is tried.
        sweep: The states of the text at all boundaries, where a sweep has them.
    """

    decoder: Decoder
    text: CalibrationText
    remove: int
    options: GhostOptions
    run: RunOptions
    also: tuple[int, ...] = ()
    alike: bool = True
    sweep: Sweep | None = None

    @property
    def num_layers(self) -> int:
        """Layers that the model has."""
        return self.decoder.num_layers

    def intervals(self, count: int) -> list[Interval]:
        """Return every interval of `count` layers that the model can do without.

        Raises:
            UnsupportedModelError: There is none.
        """
        found = candidate_intervals(count, self.num_layers)
        reasons = [self._refusal(range(*pair)) for pair in found]
        allowed = [pair for pair, why in zip(found, reasons, strict=True) if why is None]
        if not allowed:
            raise UnsupportedModelError(f"no run of {count} layers can go: {reasons[0]}")
        return allowed

    def rests(self, layer: int) -> bool:
        """Return whether a layer does not run on text, so that text cannot tell what it does."""
        return layer in self.decoder.contract.resting

    def _refusal(self, layers: range) -> str | None:
        """Return why layers cannot go, None if they can."""
        reason = self.decoder.needs(layers) or self.decoder.contract.why_needed(layers)
        if reason is not None or self.alike:
            return reason
        try:
            check_removable(self.decoder.model, layers)
        except UnsupportedModelError as error:
            return str(error)
        return None

    def held_out(self, times: int = 1) -> list[Batch]:
        """Return the held-out sequences that candidates are scored on.

        Args:
            times: How many times the tokens that were asked for.
        """
        return held_out_batches(self.text.hold(), self.options, times * self.run.score_tokens)

    def training(self) -> list[Batch]:
        """Return the sequences that candidates are fitted on."""
        return training_batches(self.text.hold(), self.options)


def candidate_intervals(count: int, layers: int) -> list[Interval]:
    """Return every interval of `count` layers, the first and the last layer included."""
    return [(start, start + count) for start in range(layers - count + 1)]


def wanted_intervals(request: Request) -> list[Interval]:
    """Return every interval of every number of layers that is asked for."""
    counts = sorted({request.remove, *request.also})
    return [pair for count in counts for pair in request.intervals(count)]


def best_interval(request: Request, scores: Sequence[IntervalScore], criterion: str) -> Selection:
    """Return the selection of the interval with the lowest score of those of its length."""
    choices: dict[int, list[int]] = {}
    for count in {request.remove, *request.also}:
        rivals = [item for item in scores if item.stop - item.start == count]
        best = min(rivals, key=lambda item: item.score)
        choices[count] = list(range(best.start, best.stop))
    return Selection(choices[request.remove], list(scores), criterion, choices)


def in_order(
    order: Sequence[int], scores: Sequence[float], count: int, criterion: str
) -> Selection:
    """Return the selection of a criterion that removes one layer after the other.

    Args:
        order: Layers, the first to be removed first.
        scores: The score of every layer.
        count: How many to remove.
        criterion: The criterion's name.
    """
    choices = {n: sorted(order[:n]) for n in range(1, min(len(order), len(scores) - 1) + 1)}
    singles = [IntervalScore(layer, layer + 1, score) for layer, score in enumerate(scores)]
    return Selection(choices[count], singles, criterion, choices)
