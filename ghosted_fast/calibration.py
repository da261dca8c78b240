"""Calibration: one pass of the dense model over text, into the statistics of all ghosts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ghosted_fast import ranks
from ghosted_fast.batches import Batch, iterate_batches
from ghosted_fast.boundaries import visit_intervals
from ghosted_fast.errors import ArgumentError, CalibrationError, NonFiniteError
from ghosted_fast.families import hidden_size
from ghosted_fast.gaps import Gap
from ghosted_fast.gram import GramAccumulator, NormalEquations, mean_square, statistics_bytes

Input = Literal["normed", "hidden"]
TokenWeight = Literal["inverse_energy", "capped", "uniform"]
FirstState = Literal["auto", "on", "off"]

# First tokens kept apart to decide whether a ghost needs a state for them: enough for the decision
# and for a fit that includes them, and small beside the statistics.
_MAX_FIRST_TOKENS = 1024
_DEFAULT_NORM_EPS = 1e-6
# Of "capped" weights: the multiple of the median energy from which on a token counts less.
_USUAL_ENERGIES = 4.0
_MIN_EXPONENT, _MAX_EXPONENT = -60, 60


@dataclass(frozen=True)
class GhostOptions:
    """How ghosts are fitted.

    Attributes:
        input: "normed" for y = x + M (x / rms(x)), "hidden" for y = x + M x.
        token_weight: "inverse_energy" for about 1 / mean(y^2) per token, "uniform" for 1, "capped"
            for about 1 / max(mean(y^2), 4 times the energy of a usual token).
        first_state: Whether the first attended token of a sequence gets a constant state: "on",
            "off", or "auto": where it predicts that token better than the linear map does.
        bias: Whether to fit an additive bias.
        damping: Absolute damping, or "auto" for the one that held-out folds prefer.
        folds: Folds of the statistics; sequence i belongs to fold i modulo this.
    """

    input: Input = "normed"
    token_weight: TokenWeight = "capped"
    first_state: FirstState = "auto"
    bias: bool = False
    damping: float | Literal["auto"] = "auto"
    folds: int = 4

    def __post_init__(self) -> None:
        for name, choices in (
            ("input", get_args(Input)),
            ("token_weight", get_args(TokenWeight)),
            ("first_state", get_args(FirstState)),
        ):
            if getattr(self, name) not in choices:
                raise ArgumentError(
                    f"expected {name} to be one of {', '.join(choices)}, "
                    f"got {getattr(self, name)!r}"
                )
        if self.folds < 2:
            raise ArgumentError(f"expected folds >= 2, got {self.folds}")


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
        kept = sequences < _MAX_FIRST_TOKENS
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
        first: The first tokens, where they are kept apart.
        energy_floor: For "capped" weights, the energy up to which tokens count alike; known from
            the first sequence on, 0 if that has none.
    """

    start: int
    stop: int
    gram: GramAccumulator
    first: FirstTokens | None
    energy_floor: float | None = None

    def split(self) -> tuple[NormalEquations, NormalEquations]:
        """Return the equations of all folds but the last, and those of the last."""
        held_out = self.gram.fold(self.gram.folds - 1)
        return self.gram.total() - held_out, held_out

    def add_ranks(self, num_sequences: int) -> None:
        """Add what the other ranks have gathered, so that all have the sums of the whole text.

        Args:
            num_sequences: Sequences of the whole text.
        """
        if ranks.count() == 1:
            return
        if self.first is None:
            ranks.add_up(self.gram.sums)
            return
        first = self.first
        count, (x, y, present) = torch.tensor([first.count]), first.placed(num_sequences)
        ranks.add_up([*self.gram.sums, first.y_sum, count, x, y, present])
        kept = present.nonzero()[:, 0]
        first.count = int(count)
        first.x, first.y, first.sequences = [x[kept]], [y[kept]], [kept]


def norm_eps_of(model: nn.Module, options: GhostOptions) -> float | None:
    """Return the epsilon of the ghosts' rms: the model's own, which engines know."""
    if options.input == "hidden":
        return None
    config: Any = model.config
    return float(getattr(config, "rms_norm_eps", None) or _DEFAULT_NORM_EPS)


def is_held_out(sequence: int, options: GhostOptions) -> bool:
    """Return whether a calibration sequence, by its number, belongs to the held-out fold."""
    return sequence % options.folds == options.folds - 1


def interval_bytes(size: int, options: GhostOptions) -> int:
    """Return the bytes of one interval's statistics, at most.

    Args:
        size: The model's hidden size.
        options: How the ghosts are fitted.
    """
    first = 0 if options.first_state == "off" else _MAX_FIRST_TOKENS * 2 * 4 * size + 8 * size
    return statistics_bytes(size, options.folds) + first


def token_weights(
    x: Tensor,
    y: Tensor,
    options: GhostOptions,
    norm_eps: float | None,
    energy_floor: float | None = None,
) -> Tensor:
    """Return the weight of each token in the fit.

    "inverse_energy" is 1 / mean(y^2), moved by at most a factor of 2 so that the scale of a row in
    the Gram, sqrt(w) or sqrt(w) / rms(x), is a power of two: exact in bf16. "capped" is the same
    with an energy of `energy_floor` at least.

    Args:
        x: States that enter the ghost [..., d].
        y: States that it should give [..., d].
        options: How the ghosts are fitted.
        norm_eps: Epsilon of the rms for normed ghosts, None for the others.
        energy_floor: As in `IntervalStatistics`; None for none.

    Returns:
        Weights [...], fp32, above zero.
    """
    if options.token_weight == "uniform":
        return torch.ones(x.shape[:-1], device=x.device)
    energy = mean_square(y)
    if energy_floor is not None:
        energy = energy.clamp_min(energy_floor)  # NaN stays
    unit = torch.ones_like(energy)
    if norm_eps is not None:
        unit = mean_square(x) + norm_eps
    # A row that is not finite keeps a plain weight, so that the accumulator sees and reports it.
    usable = torch.isfinite(energy) & torch.isfinite(unit) & (energy > 0) & (unit > 0)
    exponent = torch.where(usable, -0.5 * (energy.log2() + unit.log2()), 0.0).round()
    power = exponent.clamp(_MIN_EXPONENT, _MAX_EXPONENT).to(torch.int32)
    power_of_four = ((2 * power + 127) << 23).view(torch.float32)
    return torch.where(usable, unit * power_of_four, 1.0)


@ranks.together()
def collect_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    intervals: Sequence[tuple[int, int]],
    options: GhostOptions | None = None,
    progress: bool = False,
    gaps: Sequence[Gap] = (),
) -> list[IntervalStatistics]:
    """Run the dense model once over text and gather the statistics of all intervals.

    Layers above the last interval are not computed, and hidden states are dropped as soon as the
    last interval that needs them is served: memory is the statistics and one batch. In a process
    group every rank runs a share of the batches; there is one reduction for each interval.

    Args:
        model: The dense model.
        batches: Calibration tokens, see `iterate_batches`.
        intervals: Pairs (start, stop) of removed layers.
        options: How the ghosts will be fitted.
        progress: Whether to show a progress bar on stderr.
        gaps: Gaps below all the intervals. The states that enter an interval are then those of the
            model with these gaps; the states that leave it stay those of the dense model.

    Returns:
        The statistics, in the order of the intervals.

    Raises:
        CalibrationError: There are fewer than 2 x hidden_size tokens.
        NonFiniteError: An activation is NaN or infinite; the message names boundary and batch.
        RankError: Another rank failed, or is gone.
    """
    options = options or GhostOptions()
    size, device = hidden_size(model), next(model.parameters()).device
    statistics = [new_statistics(model, interval, options) for interval in intervals]
    ranks.check_same({"intervals": list(intervals), "options": options})
    sequences = tokens = turn = 0
    bar = tqdm(desc="calibrating", unit="tok", unit_scale=True, delay=2.0, disable=not progress)
    with bar:
        for index, batch in enumerate(iterate_batches(ranks.whole_text(batches), device)):
            count = batch.num_tokens
            if count and ranks.is_own(turn):
                update = partial(_update, statistics, batch, index, sequences, options)
                visit_intervals(model, batch, intervals, update, [gap.on(batch) for gap in gaps])
            turn += count > 0
            sequences += len(batch.input_ids)
            tokens += count
            bar.update(count)
    # A rank without a batch of its own; in the order in which a batch visits the intervals.
    for item in sorted(statistics, key=lambda item: item.stop):
        if _has_no_floor(item, options):
            item.energy_floor = ranks.from_first(item.energy_floor)
    check_enough_tokens(tokens, 2 * size, size)
    for item in statistics:
        item.add_ranks(sequences)
    return statistics


def _update(
    statistics: Sequence[IntervalStatistics],
    batch: Batch,
    batch_index: int,
    sequences: int,
    options: GhostOptions,
    interval: int,
    x: Tensor,
    y: Tensor,
) -> None:
    item = statistics[interval]
    if _has_no_floor(item, options):  # rank 0 has the text's first batch
        item.energy_floor = ranks.from_first(energy_floor(batch, y))
    update_statistics(item, batch, batch_index, sequences, options, x, y)


def _has_no_floor(item: IntervalStatistics, options: GhostOptions) -> bool:
    return options.token_weight == "capped" and item.energy_floor is None


def new_statistics(
    model: nn.Module, interval: tuple[int, int], options: GhostOptions
) -> IntervalStatistics:
    """Return the statistics of no token yet, for one interval of a model."""
    size, device = hidden_size(model), next(model.parameters()).device
    first = None
    if options.first_state != "off":
        first = FirstTokens(torch.zeros(size, dtype=torch.float64, device=device), options.folds)
    gram = GramAccumulator(size, options.folds, norm_eps_of(model, options), device)
    return IntervalStatistics(*interval, gram, first)


def update_statistics(
    item: IntervalStatistics,
    batch: Batch,
    batch_index: int,
    sequences: int,
    options: GhostOptions,
    x: Tensor,
    y: Tensor,
) -> None:
    """Add a batch to an interval's statistics.

    Args:
        item: The statistics, changed in place.
        batch: The tokens.
        batch_index: Number of the batch, for error messages.
        sequences: Sequences in the batches before; they decide the folds.
        options: How the ghost will be fitted.
        x: States that enter the gap [batch, length, d].
        y: States that leave it [batch, length, d].

    Raises:
        NonFiniteError: An activation is NaN or infinite.
    """
    y = y.to(x.device)
    if _has_no_floor(item, options):
        item.energy_floor = energy_floor(batch, y)
    weight = token_weights(x, y, options, item.gram.norm_eps, item.energy_floor)
    weight = weight * batch.attention_mask
    rows_of_text = torch.arange(len(x), device=x.device) + sequences
    if item.first is not None:
        is_first = batch.is_first
        weight = weight.masked_fill(is_first, 0.0)
        x_first, y_first = x[is_first], y[is_first]
        _check_first(x_first, y_first, item, batch_index)
        item.first.add(x_first, y_first, rows_of_text[is_first.nonzero()[:, 0]])
    for row in range(min(options.folds, len(x))):
        rows, fold = slice(row, None, options.folds), (sequences + row) % options.folds
        try:
            item.gram.update(x[rows], y[rows], weight[rows], fold=fold)
        except NonFiniteError as error:
            raise non_finite(item.start, item.stop, batch_index, str(error)) from error


def energy_floor(batch: Batch, y: Tensor) -> float:
    """Return the `IntervalStatistics.energy_floor` that the text's first batch decides.

    Args:
        batch: The tokens.
        y: States that leave the gap [batch, length, d].
    """
    attended = batch.attention_mask.bool()
    row = int(attended.any(1).int().argmax())
    usual = float(mean_square(y[row])[attended[row].to(y.device)].nanmedian())
    return _USUAL_ENERGIES * usual if math.isfinite(usual) else 0.0


def _check_first(x: Tensor, y: Tensor, item: IntervalStatistics, batch_index: int) -> None:
    if not bool(torch.isfinite(x).all() & torch.isfinite(y).all()):
        detail = "the first token of a sequence is not finite"
        raise non_finite(item.start, item.stop, batch_index, detail)


def check_enough_tokens(count: int, least: int, size: int) -> None:
    """Raise CalibrationError if there are fewer tokens than a fit of width `size` needs."""
    if count < least:
        reason = f"2 x the hidden size {size}" if least == 2 * size else "one at least"
        raise CalibrationError(
            f"expected at least {least} calibration tokens ({reason}), got {count}: give more text"
        )


def non_finite(start: int, stop: int, batch_index: int, detail: str) -> NonFiniteError:
    """Return the error for activations of a gap that are NaN or infinite."""
    return NonFiniteError(
        f"expected finite activations at boundaries {start} and {stop}, got NaN or "
        f"infinity in calibration batch {batch_index} ({detail}): check the model in this dtype, "
        "or leave that text out"
    )
