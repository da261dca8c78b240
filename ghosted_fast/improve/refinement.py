"""Refinement: the ghosts' operators, and nothing else, trained towards the dense predictions.

Adam on the divergence, in coordinates in which the features of the calibration text are white:
with the damped Gram G + damping = L L^T, the step is taken in W = M L, where a change of one size
in any direction changes the ghost's output by the same amount.

The gradients at the ghosts' outputs are those of the corrections; no parameter of the model has
one. The steps are the same for the same text and seed, and a run that was killed goes on from its
state file to the same result.

Source: Kingma and Ba, arXiv 1412.6980 (Adam); the coordinates are ours.
"""

from __future__ import annotations

import hashlib
import logging
import math
import pickle
import time
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ghosted_fast import distributed
from ghosted_fast._atomic_files import atomic_file
from ghosted_fast.errors import (
    ArgumentError,
    CheckpointError,
    check_above,
    check_at_least,
    renamed,
)
from ghosted_fast.facts import RefinementFacts
from ghosted_fast.improve.divergence import Divergence, GhostSlope
from ghosted_fast.improve.gradients import uses_gradients
from ghosted_fast.ops.reference import mirror_lower
from ghosted_fast.statistics.solve import mean_diagonal
from ghosted_fast.text.batches import Batch
from ghosted_fast.text.folds import check_split, in_passes, sequences_for, split_sequences
from ghosted_fast.text.progress import progress_bar

_LOGGER = logging.getLogger(__name__)
DEFAULT_STEPS = 48
DEFAULT_TOKENS = 2048
DEFAULT_HELD_OUT_TOKENS = 4096
# rms change of a ghost's output, relative to that output, of one full step in all directions.
DEFAULT_STEP_SIZE = 0.005
_DAMPING = 0.1
_BETAS = (0.9, 0.95)
_TINY = 1e-30
_WARMUP_STEPS = 4
_STEPS_PER_JUDGEMENT = 8
_PATIENCE = 2


@dataclass
class _Run:
    """All that the next step depends on."""

    key: str
    step: int
    point: list[Tensor]
    first: list[Tensor]
    second: list[Tensor]
    factors: list[Tensor]
    before: float
    best: list[Tensor]
    best_value: float
    best_step: int


@dataclass(frozen=True)
class RefinementOptions:
    """How ghosts are refined.

    Attributes:
        tokens: Tokens of each step.
        held_out_tokens: Tokens that the ghosts are judged on.
        step_size: Of the first full step: rms change of a ghost's output relative to that output,
            were all coordinates moved; > 0. Later steps shorten to nothing.
        seed: Of the order of the text.

    Raises:
        ArgumentError: A field is out of range.
    """

    tokens: int = DEFAULT_TOKENS
    held_out_tokens: int = DEFAULT_HELD_OUT_TOKENS
    step_size: float = DEFAULT_STEP_SIZE
    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least(1, tokens=self.tokens, held_out_tokens=self.held_out_tokens)
        check_above(0, step_size=self.step_size)


_OPTION = "a field of options=RefinementOptions(...)"


@renamed(**dict.fromkeys(("tokens", "held_out_tokens", "step_size", "seed"), _OPTION))
@distributed.failing_together()
@uses_gradients
def refine_ghosts(
    ghosted: Any,
    dense: Any,
    batches: Iterable[Any],
    steps: int = DEFAULT_STEPS,
    *,
    options: RefinementOptions | None = None,
    state: str | Path | None = None,
    progress: bool = False,
) -> RefinementFacts:
    """Train a model's ghosts, in place, so that its predictions come closer to the dense model's.

    The ghosts are judged on held-out text every few steps. The best of them are kept, and the run
    ends early where they stop to become better. In a process group the ranks share the text, and
    end with the same ghosts, those of rank 0.

    Args:
        ghosted: A model with ghosts of any kind and fit, corrected or not.
        dense: The dense model that it comes from, in the same dtype.
        batches: Text, see `iterate_batches`; every fourth sequence is held out.
        steps: Steps to take at most, at least 1.
        options: The size of the steps, and the text of each.
        state: A file that the run is kept in, so that it goes on there if it is killed. It is left
            behind; a run that has ended is not repeated. Only rank 0 writes and reads it.
        progress: Whether to show a progress bar on stderr.

    Returns:
        What was done.

    Raises:
        ArgumentError: An argument is out of range, the models do not fit each other, or the state
            is that of another run.
        CalibrationError: There is too little text to hold any out.
        CheckpointError: The state file cannot be read.
        NonFiniteError: A state or a gradient is NaN or infinite.
        RankError: Another rank failed, or is gone.
    """
    check_at_least(1, steps=steps)
    options = options or RefinementOptions()
    began = time.perf_counter()
    divergence = Divergence(ghosted, dense)
    text = distributed.same_text_everywhere(batches)
    train, judges = split_sequences(text, options.held_out_tokens, divergence.device)
    check_split(train, judges)
    held_out = divergence.held_out(in_passes(judges))
    settings = (steps, *astuple(options))
    distributed.check_same({"steps": steps, "options": options})
    key = _key(settings, [*train, *judges], divergence.parameters64())
    path = None if state is None else Path(state)
    run = distributed.on_first(partial(_load, path, key, divergence.device), divergence.device)
    if run is None:
        run = _start(key, divergence, divergence.value(held_out))
    per_step = sequences_for(options.tokens, train)
    with progress_bar("refining", progress, of=steps) as bar:
        bar.update(run.step)
        while run.step < steps and not _is_stale(run):
            divergence.set_parameters(run.point)
            chosen = _sequences(train, run.step * per_step, per_step, options.seed)
            slopes = divergence.gradients(in_passes(chosen))
            _take_step(run, slopes, options.step_size * _schedule(run.step, steps))
            run.point = distributed.from_first(run.point, divergence.device)
            bar.update()
            if run.step % _STEPS_PER_JUDGEMENT == 0 or run.step == steps:
                divergence.set_parameters(run.point)
                value = divergence.value(held_out)
                _LOGGER.info("step %d: held-out divergence %.5f", run.step, value)
                if value < run.best_value:
                    run.best, run.best_value, run.best_step = run.point, value, run.step
                if path is not None and distributed.is_first():
                    _save(path, run)
    divergence.set_parameters(run.best)
    divergence.synchronise()
    return RefinementFacts(
        run.before, run.best_value, run.step, run.best_step, time.perf_counter() - began
    )


def _start(key: str, divergence: Divergence, value: float) -> _Run:
    point = divergence.parameters64()
    zeros = [torch.zeros_like(part) for part in point]
    return _Run(key, 0, point, zeros, list(zeros), [], value, point, value, 0)


def _is_stale(run: _Run) -> bool:
    return run.step - run.best_step >= _PATIENCE * _STEPS_PER_JUDGEMENT and (
        run.step % _STEPS_PER_JUDGEMENT == 0
    )


def _schedule(step: int, steps: int) -> float:
    """Return the share of the step size: up over a few steps, then down a half cosine."""
    return min(1.0, (step + 1) / _WARMUP_STEPS) * 0.5 * (1.0 + math.cos(math.pi * step / steps))


def _sequences(train: Sequence[Batch], start: int, count: int, seed: int) -> list[Batch]:
    """Return entries start.. of the text in random order, epoch after epoch; each its own order."""
    orders: dict[int, list[int]] = {}
    chosen = []
    for place in range(start, start + count):
        epoch, index = divmod(place, len(train))
        if epoch not in orders:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            orders[epoch] = torch.randperm(len(train), generator=generator).tolist()
        chosen.append(train[orders[epoch][index]])
    return chosen


def _take_step(run: _Run, slopes: Sequence[GhostSlope], size: float) -> None:
    """Take one step of Adam in the white coordinates, which the first step's text decides."""
    if not run.factors:
        run.factors = [factor for slope in slopes for factor in _factors(slope)]
    gradients = [part for slope in slopes for part in slope.gradient(max(slope.num_tokens, 1))]
    run.step += 1
    beta, gamma = _BETAS
    corrections = 1.0 - beta**run.step, 1.0 - gamma**run.step
    new = []
    for index, (gradient, factor) in enumerate(zip(gradients, run.factors, strict=True)):
        white = _whitened(gradient, factor)
        run.first[index] = beta * run.first[index] + (1.0 - beta) * white
        run.second[index] = gamma * run.second[index] + (1.0 - gamma) * white.square()
        first, second = run.first[index] / corrections[0], run.second[index] / corrections[1]
        change = _coloured(first / (second.sqrt() + _TINY), factor)
        new.append(run.point[index] - size * change)
    run.point = new


def _factors(slope: GhostSlope) -> list[Tensor]:
    """Return L [d, d] of the weight, and its counterpart [1] of the bias where there is one.

    In the coordinates M L, a change of 1 in all of them changes the ghost's output by its own rms.
    """
    equations = slope.equations()
    gram = mirror_lower(equations.gram)
    gram.diagonal().add_(_DAMPING * mean_diagonal(equations))
    tokens = max(slope.num_tokens, 1)
    factors = [torch.linalg.cholesky(gram) * math.sqrt(len(gram) / tokens)]
    if slope.has_bias:
        factors.append(gram.new_tensor([math.sqrt(equations.weight_sum / tokens)]))
    return factors


def _whitened(gradient: Tensor, factor: Tensor) -> Tensor:
    """Return the gradient by the white coordinates, from that by the parameter."""
    if factor.dim() == 1:
        return gradient / factor
    return torch.linalg.solve_triangular(factor.mT, gradient, upper=True, left=False)


def _coloured(change: Tensor, factor: Tensor) -> Tensor:
    """Return the change of the parameter, from that of the white coordinates."""
    if factor.dim() == 1:
        return change / factor
    return torch.linalg.solve_triangular(factor, change, upper=False, left=False)


def _key(settings: tuple[Any, ...], text: Sequence[Batch], point: Sequence[Tensor]) -> str:
    """Return what tells one run from another: settings, text, and where it starts."""
    digest = hashlib.sha256(repr(settings).encode())
    for sequence in text:
        digest.update(sequence.input_ids.cpu().numpy().tobytes())
        digest.update(sequence.attention_mask.cpu().numpy().tobytes())
    for part in point:
        digest.update(part.cpu().numpy().tobytes())
    return digest.hexdigest()


def _save(path: Path, run: _Run) -> None:
    with atomic_file(path) as file:
        torch.save(vars(run), file)


def _load(path: Path | None, key: str, device: torch.device) -> _Run | None:
    """Return the run that a file holds, None where there is no file."""
    if path is None or not path.exists():
        return None
    try:
        run = _Run(**torch.load(path, map_location=device, weights_only=True))
    except (OSError, RuntimeError, TypeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{str(path)!r} is not the state of a refinement that this version reads ({error}): "
            "remove it, or name another file"
        ) from error
    if run.key != key:
        raise ArgumentError(
            f"{str(path)!r} holds another refinement (other ghosts, text or settings): remove it, "
            "or name another file"
        )
    return run
