"""What the next step of a healing depends on, the step itself, and the file it is kept in."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ghosted_fast._atomic_files import atomic_file
from ghosted_fast.errors import ArgumentError, CheckpointError

_BETAS = (0.9, 0.95)
_TINY = 1e-12
_WARMUP_STEPS = 3
# The last share of the run, in which the steps become smaller.
_COOLING = 0.3


@dataclass
class Run:
    """All that the next step depends on.

    Attributes:
        key: What tells one run from another: models, text and options.
        step: Steps taken.
        share: Which share of the run is over, of its tokens or of its time, in 0..1.
        point: What is trained, fp32.
        first: Running mean of the gradients.
        second: Running mean of their squares.
        best: The point that was judged best.
        curve: Tokens and held-out divergence of each judgement.
        seconds: Wall-clock time spent.
    """

    key: str
    step: int
    share: float
    point: list[Tensor]
    first: list[Tensor]
    second: list[Tensor]
    best: list[Tensor]
    curve: list[tuple[int, float]]
    seconds: float

    @classmethod
    def start(cls, key: str, point: list[Tensor], value: float, seconds: float) -> Run:
        """Return a run without a step; `value` is the divergence where it begins."""
        first, second = ([torch.zeros_like(part) for part in point] for _ in range(2))
        return cls(key, 0, 0.0, point, first, second, point, [(0, value)], seconds)

    @property
    def best_value(self) -> float:
        """The lowest divergence of all judgements."""
        return min(value for _, value in self.curve)


def take_step(run: Run, gradients: Sequence[Tensor], size: float, shares: Sequence[float]) -> None:
    """Move the point by one step of Adam.

    Args:
        run: Its point and its running means change; the tensors of the old point do not.
        gradients: Of the mean divergence per token, like the point.
        size: The learning rate of this step.
        shares: Of it, for each tensor of the point.
    """
    run.step += 1
    beta, gamma = _BETAS
    new = []
    moved = zip(run.point, gradients, shares, strict=True)
    for index, (value, gradient, share) in enumerate(moved):
        first = run.first[index].lerp_(gradient, 1.0 - beta) / (1.0 - beta**run.step)
        second = run.second[index].lerp_(gradient.square(), 1.0 - gamma)
        second = second / (1.0 - gamma**run.step)
        new.append(value - size * share * first / (second.sqrt() + _TINY))
    run.point = new


def learning_rate_share(run: Run) -> float:
    """Return the share of the learning rate: up over a few steps, and down a line at the end."""
    rising = min(1.0, (run.step + 1) / _WARMUP_STEPS)
    return rising * min(1.0, (1.0 - run.share) / _COOLING)


def save_run(path: Path, run: Run) -> None:
    """Write a run into a file, whole or not at all."""
    with atomic_file(path) as file:
        torch.save(vars(run), file)


def load_run(path: Path | None, key: str, device: torch.device) -> Run | None:
    """Return the run that a file holds, None where there is no file.

    Raises:
        CheckpointError: The file cannot be read.
        ArgumentError: It holds another run.
    """
    if path is None or not path.exists():
        return None
    try:
        run = Run(**torch.load(path, map_location=device, weights_only=True))
    except (OSError, RuntimeError, TypeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{str(path)!r} is not the state of a healing that this version reads ({error}): "
            "remove it, or name another file"
        ) from error
    if run.key != key:
        raise ArgumentError(
            f"{str(path)!r} holds another healing (other model, text or options): remove it, or "
            "name another file"
        )
    return run
