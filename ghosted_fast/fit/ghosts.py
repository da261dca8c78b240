"""From an interval's statistics to its ghost: the solve, and the state of the first token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ghosted_fast import distributed
from ghosted_fast.fit.below import Below
from ghosted_fast.fit.collect import collect_statistics
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.models.gap import Gap
from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.options import GhostOptions
from ghosted_fast.statistics.gram import GramAccumulator, NormalEquations
from ghosted_fast.statistics.interval import FirstTokens, IntervalStatistics
from ghosted_fast.statistics.solve import (
    GhostSolution,
    damping_on_split,
    outputs_at,
    solve_ghost,
    solve_on_split,
)
from ghosted_fast.statistics.token_weights import token_weights
from ghosted_fast.text.batches import Batch
from ghosted_fast.text.progress import progress_bar
from ghosted_fast.timing.spans import span


@dataclass(frozen=True)
class FittedGhost:
    """A ghost's operator and its first-token state, before they are cast to the model's dtype.

    Attributes:
        weight: M [d, d] fp64.
        bias: b [d] fp64, or None.
        first_state: [d] fp64, or None.
        norm_eps: Epsilon of the rms for a normed ghost, else None.
    """

    weight: Tensor
    bias: Tensor | None
    first_state: Tensor | None
    norm_eps: float | None

    def apply(self, x: Tensor) -> Tensor:
        """Return the linear map's output for rows x [n, d], in fp64; no row counts as first."""
        x = x.double()
        y = x + _features(x, self.norm_eps) @ self.weight.mT
        return y if self.bias is None else y + self.bias

    def module_of(self, decoder: Decoder) -> GhostLinear:
        """Return the ghost as a module of a model's dtype, on its device."""
        return self.to_module(decoder.dtype, decoder.device)

    def to_module(self, dtype: torch.dtype, device: torch.device | str) -> GhostLinear:
        """Return the ghost as a module of the model's dtype, on its device."""
        module = GhostLinear(
            len(self.weight),
            bias=self.bias is not None,
            norm_eps=self.norm_eps,
            first_state=self.first_state is not None,
            device=device,
            dtype=dtype,
        )
        with torch.no_grad():
            module.weight.copy_(self.weight)
            if self.bias is not None and module.bias is not None:
                module.bias.copy_(self.bias)
            if self.first_state is not None and module.first_state is not None:
                module.first_state.copy_(self.first_state)
        return module.requires_grad_(False)


def fit_ghost(
    statistics: IntervalStatistics, options: GhostOptions
) -> tuple[FittedGhost, GhostSolution]:
    """Fit a ghost on all tokens. The statistics are used up: first tokens may be added to the sums.

    With `features="auto"` the ghost has the form that `fit_on_training_folds` finds the better one,
    and is the same to the bit as if that had been asked for.

    Returns:
        The ghost, and the solution with its errors and condition.
    """
    if statistics.raw is not None:
        statistics.settle(fit_on_training_folds(statistics, options).norm_eps)
    first = statistics.first
    first_state = None
    if first is not None and first.count:
        if (
            options.first_state == "on"
            or _with_first_tokens(statistics, *statistics.split(), options) is None
        ):
            first_state = first.mean()
        else:
            _include_first_tokens(statistics, first, options)
            statistics.first = None
    solution = solve_ghost(statistics.gram, options.damping, options.bias)
    ghost = FittedGhost(solution.weight, solution.bias, first_state, statistics.gram.norm_eps)
    return ghost, solution


def fit_ghosts(
    statistics: Sequence[IntervalStatistics], options: GhostOptions
) -> list[tuple[FittedGhost, GhostSolution]]:
    """Fit a ghost on each of several statistics, see `fit_ghost`; the ranks share the solves."""
    device = statistics[0].gram.device
    return distributed.one_item_per_rank(statistics, partial(fit_ghost, options=options), device)


def fit_in_sequence(
    model: Any,
    batches: Sequence[Batch],
    intervals: Sequence[tuple[int, int]],
    options: GhostOptions,
    progress: bool = False,
    gaps: Sequence[Gap] = (),
) -> list[tuple[FittedGhost, GhostSolution]]:
    """Fit the ghosts of several gaps one after the other, each on what it will really be given.

    The states that enter a gap come from the model with the ghosts of the gaps below it; those that
    should leave it come from the dense model. So a ghost also mends what the ones below it left.
    Each pass over the text begins where the last one ended, see `Below`, with the statistics of one
    gap in memory.

    Args:
        model: The dense model.
        batches: Calibration tokens.
        intervals: The gaps (start, stop), ascending, at least one layer apart.
        options: How the ghosts are fitted.
        progress: Whether to show progress bars on stderr.
        gaps: Gaps below all of these that have their ghosts already.

    Returns:
        The ghosts, in the order of the gaps, with their solutions.

    Raises:
        CalibrationError: There are fewer than 2 x hidden_size tokens.
        NonFiniteError: An activation is NaN or infinite; the message names boundary and batch.

    Source: ours.
    """
    decoder = Decoder.of(model)
    below = Below(decoder, len(intervals), gaps)
    fits: list[tuple[FittedGhost, GhostSolution]] = []
    for interval in intervals:
        statistics = collect_statistics(decoder, batches, [interval], options, progress, below)
        fits += fit_ghosts(statistics, options)
        below.fill(Gap(*interval, fits[-1][0].module_of(decoder)))
    return fits


def fit_candidates(
    model: Any,
    statistics: Sequence[IntervalStatistics],
    options: GhostOptions,
    progress: bool = False,
) -> list[GhostLinear]:
    """Fit the ghost of each candidate on the training folds; the ranks share the solves.

    Args:
        model: The model that gives the ghosts their dtype and device.
        statistics: Those of each candidate.
        options: How the ghosts are fitted.
        progress: Whether to show a progress bar on stderr.
    """
    decoder = Decoder.of(model)
    total = len(list(distributed.my_share(statistics)))
    with span("solves"), progress_bar("fitting", progress, of=total) as bar:

        def fit(item: IntervalStatistics) -> GhostLinear:
            ghost = fit_on_training_folds(item, options)
            bar.update()
            return ghost.module_of(decoder)

        return distributed.one_item_per_rank(statistics, fit, decoder.device)


def fit_on_training_folds(statistics: IntervalStatistics, options: GhostOptions) -> FittedGhost:
    """Fit a ghost on all folds but the last, to be judged on the last.

    With `first_state="auto"` the ghost gets a constant state for the first token where the mean of
    the training folds predicts the held-out first tokens better than the linear map does. A linear
    map fails where the removed layers give the first token a large activation that its input does
    not have yet.

    With `features="auto"` it is the ghost of the form whose error on the held-out fold is the lower
    share of that without a ghost. (Of all tokens but the first of each sequence, where these are
    kept apart: what they get is decided for each form. Errors are shares because the weights of the
    two forms differ in their rounding.)
    """
    forms = statistics.forms()
    ghosts = [_fit_form(form, options) for form in forms]
    if len(ghosts) == 1:
        return ghosts[0]
    errors = [
        form.gram.fold(form.gram.folds - 1).error_share(ghost.weight.mT, ghost.bias)
        for form, ghost in zip(forms, ghosts, strict=True)
    ]
    return ghosts[errors.index(min(errors))]


def _fit_form(statistics: IntervalStatistics, options: GhostOptions) -> FittedGhost:
    """Fit the ghost of one form of features on all folds but the last."""
    train, held_out = statistics.split()
    first, damping = statistics.first, options.damping
    first_state = None
    if first is not None and first.count:
        found = None
        if options.first_state == "auto":
            found = _with_first_tokens(statistics, train, held_out, options)
        if found is None:
            first_state = first.mean()
        else:
            train, damping = found
    solution, bias, _ = solve_on_split(train, held_out, damping, options.bias)
    return FittedGhost(solution.mT.contiguous(), bias, first_state, statistics.gram.norm_eps)


def _with_first_tokens(
    statistics: IntervalStatistics,
    train: NormalEquations,
    held_out: NormalEquations,
    options: GhostOptions,
) -> tuple[NormalEquations, float] | None:
    """Return the training folds' sums with the first tokens in, and the damping to solve them with.

    None where a constant state is better for the held-out first tokens, see
    `fit_on_training_folds`. The map is only solved for these.
    """
    first, eps = statistics.first, statistics.gram.norm_eps
    assert first is not None
    train = train + _first_sums(statistics, first, options)
    damping = damping_on_split(train, held_out, options.damping, options.bias)
    x, y, folds = first.rows()
    judged = folds == statistics.gram.folds - 1
    known = ~judged
    if not (judged.any() and known.any()):
        judged = known = torch.ones_like(judged)
    x, target = x[judged].double(), y[judged].double()
    mapped = x + outputs_at(train, damping, options.bias, _features(x, eps))
    error_of_map = (target - mapped).square().sum()
    error_of_constant = (target - y[known].double().mean(0)).square().sum()
    return None if bool(error_of_constant < error_of_map) else (train, damping)


def _features(x: Tensor, norm_eps: float | None) -> Tensor:
    """Return the rows that a ghost's operator multiplies, of states x [n, d] fp64."""
    if norm_eps is None:
        return x
    return x / (x.square().mean(-1, keepdim=True) + norm_eps).sqrt()


def _first_sums(
    statistics: IntervalStatistics, first: FirstTokens, options: GhostOptions
) -> NormalEquations:
    """Return the sums over the first tokens of the training folds."""
    gram, floor = statistics.gram, statistics.energy_floor
    x, y, folds = first.rows()
    known = folds != gram.folds - 1
    x, y = x[known], y[known]
    sums = GramAccumulator(gram.hidden_size, 1, gram.norm_eps, gram.device)
    return sums.update(x, y, token_weights(x, y, options, gram.norm_eps, floor)).total()


def _include_first_tokens(
    statistics: IntervalStatistics, first: FirstTokens, options: GhostOptions
) -> None:
    gram, floor = statistics.gram, statistics.energy_floor
    x, y, folds = first.rows()
    weight = token_weights(x, y, options, gram.norm_eps, floor)
    for fold in range(gram.folds):
        rows = folds == fold
        gram.update(x[rows], y[rows], weight[rows], fold)
