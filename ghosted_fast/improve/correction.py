"""Corrections: steps of fitted ghosts towards the dense model's predictions, in closed form.

The least-squares fit makes a ghost's output close to the dense state; what counts is that the
predictions are close. A correction takes the gradient of the divergence at each ghost's output and
solves, with the features' Gram as the curvature,

    (G + damping) dM^T = sum f(x_t) g_t^T

then moves the ghosts in the span of -dM, of -S^-1 dM with S the damped Gram of the gradients, and
of the correction before. S makes up for outputs that differ much in how sensitive the predictions
are to them, as in models where a few dimensions hold most of the state; where it misleads, the span
gives it no share. How far is decided on held-out tokens: one forward pass per direction gives the
change of the logits, and with it the Gauss-Newton optimum of the divergence in that span. A step
that raises the held-out divergence is never taken. Nothing is random: the same text gives the same
ghosts.

Source: ours. G and S are the two factors of Martens and Grosse, arXiv 1503.05671 (K-FAC). The span
of new directions and the last one is that of conjugate gradients (Hestenes and Stiefel, 1952); the
curvature of the divergence by logits z is the covariance of z under softmax(z).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ghosted_fast import distributed
from ghosted_fast.errors import check_above, check_at_least
from ghosted_fast.facts import CorrectionFacts
from ghosted_fast.improve.comparison import Comparison
from ghosted_fast.improve.divergence import Divergence, LoadedComparison
from ghosted_fast.improve.gradients import uses_gradients
from ghosted_fast.improve.slopes import GhostSlope
from ghosted_fast.options import Corrections, check_corrections
from ghosted_fast.statistics.solve import mean_diagonal, solve_equations
from ghosted_fast.text.batches import Batch
from ghosted_fast.text.folds import (
    check_split,
    sequences_for,
    split_sequences,
    token_count,
)
from ghosted_fast.text.progress import progress_bar
from ghosted_fast.timing.spans import span

_LOGGER = logging.getLogger(__name__)

MOST_CORRECTIONS = 8
DEFAULT_DAMPING = 0.1
DEFAULT_TOKENS = 8192
DEFAULT_HELD_OUT_TOKENS = 4096
# Held-out tokens below which "auto" makes none.
FEWEST_FOR_AUTO = 2048
# "auto" stops after a correction that lowers the held-out divergence by less than this share.
_LEAST_GAIN = 0.003
# Size of the first trial: rms change of the ghosts' outputs relative to the outputs. Large beside
# bf16 rounding. Where a few dimensions or tokens hold most of a state's energy, good steps are far
# smaller, and a trial of this size says nothing about them: trials shorten until the step is no
# less than half of them, at most tenfold each.
_TRIAL_CHANGE = 0.02
_MOST_TRIALS = 4
_RIDGE = 1e-3
# Damping of the gradients' Gram, relative to the mean of its diagonal.
_OUTPUT_DAMPING = 1.0
# To so many nats a divergence is known, for its sums in fp32.
_KNOWN_TO = 1e-7
# Shares of the Gauss-Newton step that are tried, one after the other, until one is an improvement.
_SHARES = (1.0, 0.5, 0.25)


@distributed.failing_together()
@uses_gradients
def correct_ghosts(
    ghosted: Any,
    dense: Any,
    batches: Iterable[Any],
    corrections: Corrections = "auto",
    *,
    damping: float = DEFAULT_DAMPING,
    tokens: int = DEFAULT_TOKENS,
    held_out_tokens: int = DEFAULT_HELD_OUT_TOKENS,
    progress: bool = False,
) -> list[CorrectionFacts]:
    """Move a model's ghosts, in place, so that its predictions come closer to the dense model's.

    In a process group the ranks share the text, and end with the same ghosts, those of rank 0.

    Args:
        ghosted: A model with ghosts, of any fit; all of them are corrected together.
        dense: The dense model that it comes from, in the same dtype.
        batches: Text, see `iterate_batches`; every fourth sequence is held out.
        corrections: How many to make; "auto" for at most `MOST_CORRECTIONS`, as long as they help,
            and none, with a warning, where the text is too short to judge them.
        damping: Relative to the mean of G's diagonal, > 0.
        tokens: Tokens of each correction. Corrections take turns with the text, from the start
            again where it ends.
        held_out_tokens: Tokens that steps are decided on.
        progress: Whether to show a progress bar on stderr.

    Returns:
        What each correction did.

    Raises:
        ArgumentError: An argument is out of range, or the models do not fit each other.
        CalibrationError: There is too little text to hold any out.
        NonFiniteError: A state or a gradient is NaN or infinite.
        RankError: Another rank failed, or is gone.
    """
    check_corrections(corrections)
    check_at_least(1, tokens=tokens, held_out_tokens=held_out_tokens)
    check_above(0, damping=damping)
    if corrections == 0:
        return []
    distributed.check_same(
        {
            "corrections": corrections,
            "damping": damping,
            "tokens": tokens,
            "held_out_tokens": held_out_tokens,
        }
    )
    divergence = Divergence(ghosted, dense)
    text = distributed.same_text_everywhere(batches)
    train, judges = split_sequences(text, held_out_tokens, divergence.device)
    if not can_be_judged(corrections, train, judges, held_out_tokens):
        return []
    comparison = LoadedComparison(divergence, train, judges)
    return take_steps(
        comparison,
        corrections,
        damping=damping,
        sequences=sequences_for(tokens, train),
        progress=progress,
    )


def can_be_judged(
    corrections: Corrections,
    train: Sequence[Batch],
    judges: Sequence[Batch],
    held_out_tokens: int = DEFAULT_HELD_OUT_TOKENS,
) -> bool:
    """Return whether there is text to judge corrections by; warn where "auto" finds too little.

    Args:
        corrections: How many are to be made.
        train: Sequences to learn from.
        judges: Sequences to judge by.
        held_out_tokens: Tokens that they were to hold.

    Raises:
        CalibrationError: There is too little text for a number of corrections.
    """
    found, needed = token_count(judges), min(held_out_tokens, FEWEST_FOR_AUTO)
    if corrections == "auto" and found < needed:
        _LOGGER.warning(
            "ghosts are not corrected: %d tokens of the text can be held out, and fewer than %d "
            "are no judge of a step; give more text, or a number of corrections",
            found,
            needed,
        )
        return False
    check_split(train, judges)
    return True


def most_steps(corrections: Corrections) -> int:
    """Return how many corrections are made at most."""
    return MOST_CORRECTIONS if corrections == "auto" else corrections


def take_steps(
    comparison: Comparison,
    corrections: Corrections,
    *,
    sequences: int,
    damping: float = DEFAULT_DAMPING,
    progress: bool = False,
) -> list[CorrectionFacts]:
    """Move ghosts, in place, wherever the layers around them are; see `correct_ghosts`.

    Args:
        comparison: Of the model with the ghosts and the dense one.
        corrections: How many steps to take.
        sequences: Training sequences of each.
        damping: Relative to the mean of G's diagonal.
        progress: Whether to show a progress bar on stderr.

    Returns:
        What each correction did, those of an earlier run that is gone on with included.
    """
    moved = comparison.moved
    facts, last = comparison.kept()
    rest = range(len(facts), most_steps(corrections))
    for number in progress_bar("correcting", progress, of=rest):
        if corrections == "auto" and facts and not _was_worth_it(facts[-1]):
            break
        began = time.perf_counter()
        places = range(number * sequences, (number + 1) * sequences)
        with span("gradients"):
            slopes = comparison.gradients([place % comparison.num_training for place in places])
        with span("solves"):
            directions = distributed.on_first(
                partial(_directions, slopes, damping, last), moved.device
            )
        with span("trials"):
            step, change, before, after = _best_step(
                comparison, slopes, directions, _trial_size(facts)
            )
        last = last if step is None else step
        facts.append(
            CorrectionFacts(
                before=before,
                after=after,
                accepted=step is not None,
                change=change,
                seconds=time.perf_counter() - began,
            )
        )
        comparison.keep(facts, last)
        _LOGGER.info("held-out divergence %.5f -> %.5f", before, after)
    moved.synchronise()
    return facts


def _was_worth_it(fact: CorrectionFacts) -> bool:
    """Return whether "auto" goes on after a correction."""
    return fact.before - fact.after >= _LEAST_GAIN * fact.before


def _trial_size(facts: Sequence[CorrectionFacts]) -> float:
    """Return the relative change of the first trial after some corrections."""
    taken = (fact.change for fact in reversed(facts) if fact.accepted)
    return min(next(taken, _TRIAL_CHANGE), _TRIAL_CHANGE)


def _descent(slopes: Sequence[GhostSlope], damping: float) -> list[Tensor]:
    """Return the solution of the damped equations, downhill, as a direction of all parameters."""
    direction: list[Tensor] = []
    for slope in slopes:
        equations = slope.equations()
        absolute = damping * mean_diagonal(equations)
        solution, offset, _ = solve_equations(equations, absolute, slope.has_bias)
        direction.append(-solution.mT)
        if offset is not None:
            direction.append(-offset)
    return direction


def _output_scaled(slopes: Sequence[GhostSlope], direction: Sequence[Tensor]) -> list[Tensor]:
    """Return S^-1 times the direction, S the damped Gram of the gradients at the outputs."""
    parts = iter(direction)
    return [
        slope.output_scaled(next(parts), _OUTPUT_DAMPING)
        for slope in slopes
        for _ in range(1 + slope.has_bias)
    ]


def _relative_change(slopes: Sequence[GhostSlope], direction: Sequence[Tensor]) -> float:
    """Return the rms change of the ghosts' outputs, relative to the outputs.

    It has three digits: the last bits of a product in fp64 may depend on where its operands lie in
    memory, and directions are scaled by this number.
    """
    parts = iter(direction)
    energy = tokens = 0.0
    for slope in slopes:
        weight = next(parts)
        bias = next(parts) if slope.has_bias else None
        energy += slope.relative_energy(weight, bias)
        tokens += slope.num_tokens
    return float(f"{math.sqrt(max(energy, 0.0) / max(tokens, 1.0)):.2e}")


def _directions(
    slopes: Sequence[GhostSlope], damping: float, last: list[Tensor] | None
) -> list[list[Tensor]]:
    """Return the directions that may lead downhill, each of a relative change of 1."""
    descent = _descent(slopes, damping)
    found = [descent, _output_scaled(slopes, descent), *([] if last is None else [last])]
    changes = [_relative_change(slopes, direction) for direction in found]
    return [
        [part / change for part in direction]
        for direction, change in zip(found, changes, strict=True)
        if change > 0.0
    ]


def _best_step(
    comparison: Comparison,
    slopes: Sequence[GhostSlope],
    directions: Sequence[Sequence[Tensor]],
    size: float,
) -> tuple[list[Tensor] | None, float, float, float]:
    """Move the ghosts by the best step in the span of some directions, if it is an improvement.

    Args:
        comparison: What the step is decided on.
        slopes: What relative changes are measured with.
        directions: Each of a relative change of 1.
        size: Relative change of the first trial.

    Returns:
        The step, or None; its relative change; and the held-out divergence before and after.
    """
    if not directions:
        value = comparison.value()
        return None, 0.0, value, value
    moved = comparison.moved
    point = moved.parameters64()
    for _ in range(_MOST_TRIALS):
        trials = [[size * part for part in direction] for direction in directions]
        before, slope, curvature = comparison.local_model(point, trials)
        ridge = _RIDGE * curvature.diagonal().diag()
        amounts = -torch.linalg.lstsq(curvature + ridge, slope[:, None]).solution[:, 0]
        step = _combined(amounts, trials)
        change = distributed.on_first(partial(_relative_change, slopes, step))
        if change >= 0.5 * size:
            break
        size = max(change, 0.1 * size)
    for share in _SHARES:
        shorter = [share * part for part in step]
        moved.set_parameters([old + part for old, part in zip(point, shorter, strict=True)])
        after = comparison.value()
        if after < before - _KNOWN_TO:
            return shorter, share * change, before, after
    moved.set_parameters(point)
    return None, 0.0, before, before


def _combined(amounts: Tensor, directions: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Return the sum of directions, each times its amount."""
    scaled = [
        [float(amount) * part for part in direction]
        for amount, direction in zip(amounts, directions, strict=True)
    ]
    return [torch.stack(parts).sum(0) for parts in zip(*scaled, strict=True)]
