"""The statistics of one interval: sums over all tokens, and the first tokens apart."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from ghosted_fast import distributed
from ghosted_fast.errors import NonFiniteError
from ghosted_fast.options import GhostOptions
from ghosted_fast.statistics.gram import (
    GramAccumulator,
    NormalEquations,
    statistics_bytes,
)
from ghosted_fast.statistics.sample import Interval, Sample
from ghosted_fast.statistics.token_weights import energy_floor, token_weights

# First tokens kept apart to decide whether a ghost needs a state for them: enough for the decision
# and for a fit that includes them, and small beside the statistics.
_MAX_FIRST_TOKENS = 1024


@dataclass
class FirstTokens:
    """The first attended tokens of the sequences, kept apart from the sums.

    Those of so many sequences are kept as they are, in fp32; the sum of y runs over all.
    """

    y_sum: Tensor
    folds: int
    count: int = 0
    x: list[Tensor] = field(default_factory=list)
    y: list[Tensor] = field(default_factory=list)
    sequences: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor, y: Tensor, sequences: Tensor) -> None:
        """Add rows x, y [n, d] of the sequences [n], by their numbers."""
        self.y_sum += y.double().sum(0)
        self.count += len(y)
        kept = (sequences < _MAX_FIRST_TOKENS).nonzero()[:, 0]
        self.x.append(x[kept].float())
        self.y.append(y[kept].float())
        self.sequences.append(sequences[kept])

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the kept rows: x [n, d], y [n, d], folds [n]."""
        return torch.cat(self.x), torch.cat(self.y), torch.cat(self.sequences) % self.folds

    def placed(self, num_sequences: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the rows in their places among those of all sequences, zeros in the others.

        Args:
            num_sequences: Sequences of the whole text.

        Returns:
            x [n, d], y [n, d], and 1 where there is a row [n]; all fp32.
        """
        places = min(num_sequences, _MAX_FIRST_TOKENS)
        x, y = self.y_sum.new_zeros(2, places, len(self.y_sum), dtype=torch.float32)
        present = x.new_zeros(places)
        for rows, targets, sequences in zip(self.x, self.y, self.sequences, strict=True):
            x[sequences], y[sequences], present[sequences] = rows, targets, 1.0
        return x, y, present

    def mean(self) -> Tensor:
        """Return the mean y [d], fp64."""
        return self.y_sum / max(self.count, 1)


@dataclass
class IntervalStatistics:
    """All that the fit of the ghost in place of layers [start, stop) needs to know.

    Attributes:
        start: First removed layer.
        stop: The layer that the ghost's output enters.
        gram: Sums over the tokens; without the first of each sequence if `first` is given.
        raw: With features="auto", those of raw features; `gram` has those of normed ones.
        first: The first tokens, where they are kept apart.
        energy_floor: For "capped" weights, the energy up to which tokens count alike; known from
            the first sequence on, 0 if that has none.
    """

    start: int
    stop: int
    gram: GramAccumulator
    first: FirstTokens | None
    energy_floor: float | None = None
    raw: GramAccumulator | None = None

    @property
    def grams(self) -> list[GramAccumulator]:
        """The sums of each form of features, normed ones first."""
        return [self.gram] if self.raw is None else [self.gram, self.raw]

    def forms(self) -> list[IntervalStatistics]:
        """Return the statistics of each form of features; they share the first tokens."""
        return [replace(self, gram=gram, raw=None) for gram in self.grams]

    def settle(self, norm_eps: float | None) -> None:
        """Keep one form of features alone, by its epsilon: None for raw ones."""
        if self.raw is not None and norm_eps is None:
            self.gram = self.raw
        self.raw = None

    def split(self) -> tuple[NormalEquations, NormalEquations]:
        """Return the equations of all folds but the last, and those of the last."""
        held_out = self.gram.fold(self.gram.folds - 1)
        return self.gram.total() - held_out, held_out

    def add_ranks(self, num_sequences: int) -> None:
        """Add what the other ranks have gathered, so that all have the sums of the whole text.

        Args:
            num_sequences: Sequences of the whole text.
        """
        if distributed.count() == 1:
            return
        sums = [item for gram in self.grams for item in gram.sums]
        if self.first is None:
            distributed.add_up(sums)
            return
        first = self.first
        count, (x, y, present) = torch.tensor([first.count]), first.placed(num_sequences)
        distributed.add_up([*sums, first.y_sum, count, x, y, present])
        kept = present.nonzero()[:, 0]
        first.count = int(count)
        first.x, first.y, first.sequences = [x[kept]], [y[kept]], [kept]


def interval_bytes(size: int, options: GhostOptions) -> int:
    """Return the bytes of one interval's statistics, at most.

    Args:
        size: The model's hidden size.
        options: How the ghosts are fitted.
    """
    first = 0 if options.first_state == "off" else _MAX_FIRST_TOKENS * 2 * 4 * size + 8 * size
    forms = 2 if options.features == "auto" else 1
    return forms * statistics_bytes(size, options.folds) + first


def new_statistics(
    interval: Interval,
    options: GhostOptions,
    size: int,
    norm_eps: float,
    device: torch.device | str | None = None,
) -> IntervalStatistics:
    """Return the statistics of no token yet.

    Args:
        interval: Pair (start, stop) of removed layers.
        options: How the ghost will be fitted.
        size: The model's hidden size.
        norm_eps: Epsilon of the rms, for normed features.
        device: Where the sums are.
    """
    first = None
    if options.first_state != "off":
        first = FirstTokens(torch.zeros(size, dtype=torch.float64, device=device), options.folds)
    make = partial(GramAccumulator, size, options.folds, device=device)
    gram = make(norm_eps=None if options.features == "raw" else norm_eps)
    raw = make() if options.features == "auto" else None
    return IntervalStatistics(*interval, gram, first, raw=raw)


def lacks_floor(item: IntervalStatistics, options: GhostOptions) -> bool:
    """Return whether the statistics still need the `energy_floor` of the text's first batch."""
    return options.token_weight == "capped" and item.energy_floor is None


def update_statistics(item: IntervalStatistics, sample: Sample, options: GhostOptions) -> None:
    """Add a batch to an interval's statistics.

    Args:
        item: The statistics, changed in place.
        sample: The batch.
        options: How the ghost will be fitted.

    Raises:
        NonFiniteError: An activation is NaN or infinite.
    """
    x, y, batch = sample.x, sample.y, sample.batch
    if lacks_floor(item, options):
        item.energy_floor = energy_floor(batch, y)
    counts = batch.attention_mask
    if item.first is not None:
        is_first = batch.is_first
        counts = counts.masked_fill(is_first, 0)
        row, column = is_first.nonzero(as_tuple=True)
        x_first, y_first = x[row, column], y[row, column]
        if not bool(torch.isfinite(x_first).all() & torch.isfinite(y_first).all()):
            raise sample.non_finite("the first token of a sequence is not finite")
        item.first.add(x_first, y_first, row + sample.sequences)
    for gram in item.grams:
        weight = token_weights(x, y, options, gram.norm_eps, item.energy_floor) * counts
        for first in range(min(options.folds, len(x))):
            rows = slice(first, None, options.folds)
            fold = (sample.sequences + first) % options.folds
            try:
                gram.update(x[rows], y[rows], weight[rows], fold=fold)
            except NonFiniteError as error:
                raise sample.non_finite(str(error)) from error
