"""Healing: minutes of distillation, in the memory of one model.

The dense model's next-token distributions are distilled into low-rank factors of the linear maps of
the layers that are left, and into the ghosts, by steps of Adam. Teacher and student share all
weights, so that beside them only factors, their moments and one pass's activations take memory. At
the end the factors are folded into the weights: nothing is slower than before, and no engine needs
anything new.

No sequence of the text is read twice: fresh tokens are what counts, and a second turn through the
same text makes a model worse on other text. Where the text ends, healing ends. The best state on
held-out text is kept, which may be the one that it began with.

Source: Hinton et al., arXiv 1503.02531 (distillation); Hu et al., arXiv 2106.09685 (factors);
Kingma and Ba, arXiv 1412.6980 (Adam).
"""

from __future__ import annotations

import hashlib
import logging
import math
import pickle
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ghosted_fast import distributed
from ghosted_fast._atomic_files import atomic_file
from ghosted_fast.errors import (
    ArgumentError,
    CheckpointError,
    NonFiniteError,
    check_above,
    check_at_least,
)
from ghosted_fast.facts import HealingFacts, HealingPoint
from ghosted_fast.improve.divergence import check_pair
from ghosted_fast.improve.exits import Exit, exit_divergence
from ghosted_fast.improve.factors import Trained, check_foldable
from ghosted_fast.text.batches import Batch
from ghosted_fast.text.fingerprints import model_digest, text_digest
from ghosted_fast.text.folds import (
    check_split,
    in_passes,
    sequences_for,
    split_sequences,
    token_count,
)
from ghosted_fast.text.progress import progress_bar

_LOGGER = logging.getLogger(__name__)
_BETAS = (0.9, 0.95)
_TINY = 1e-12
_WARMUP_STEPS = 3
# Judgements of the whole run, beside the one before it.
_JUDGEMENTS = 10
# A held-out divergence so many times the best one, and so many nats above it, ends the run: the
# steps lead nowhere.
_LOST, _LEAST_LOSS = 1.5, 0.01


@dataclass(frozen=True)
class HealOptions:
    """How a model is healed.

    Attributes:
        rank: Rank of the factors of each linear map; 0 trains the ghosts alone.
        learning_rate: Of Adam's steps on the factors and ghosts; > 0. It falls to nothing by a
            cosine.
        tokens_per_step: Tokens of each step.
        held_out_tokens: Tokens that the model is judged on.
        minutes: When to end at the latest; None for no limit.
        seed: Of the factors, and of the order of the text.

    Raises:
        ArgumentError: A field is out of range.
    """

    rank: int = 32
    learning_rate: float = 1e-3
    tokens_per_step: int = 2048
    held_out_tokens: int = 4096
    minutes: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least(0, rank=self.rank)
        check_at_least(
            1, tokens_per_step=self.tokens_per_step, held_out_tokens=self.held_out_tokens
        )
        check_above(0, learning_rate=self.learning_rate)
        if self.minutes is not None:
            check_above(0, minutes=self.minutes)


@dataclass
class _Run:
    """All that the next step depends on."""

    key: str
    step: int
    share: float
    point: list[Tensor]
    first: list[Tensor]
    second: list[Tensor]
    best: list[Tensor]
    curve: list[tuple[int, float]]
    seconds: float


@distributed.failing_together()
def heal(
    smaller: Any,
    dense: Any,
    batches: Iterable[Any],
    tokens: int | None = None,
    *,
    options: HealOptions | None = None,
    state: str | Path | None = None,
    progress: bool = False,
) -> HealingFacts:
    """Train a ghosted or pruned model, in place, to predict what the dense model predicts.

    In a process group the ranks share the text of each step, and end with the same weights.

    Args:
        smaller: A model without some of the dense model's layers, with ghosts or without.
        dense: The dense model that it comes from, in the same dtype. It is not changed, though the
            two may share weights.
        batches: Text, see `iterate_batches`; every fourth sequence is held out, and no other is
            read twice.
        tokens: Tokens to learn from at most; all that there are if not given.
        options: What is trained, and in which steps.
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
        NonFiniteError: The model's predictions are NaN or infinite before the first step.
        UnsupportedModelError: A weight that is to be trained is not floating point, or there is
            none.
        RankError: Another rank failed, or is gone.
    """
    options = options or HealOptions()
    if tokens is not None:
        check_at_least(1, tokens=tokens)
    check_pair(smaller, dense)
    trained = Trained(smaller, options.rank, options.seed)
    check_foldable(trained.factors)
    text = distributed.same_text_everywhere(batches)
    device = trained.parameters[0].device
    train, judges = split_sequences(text, options.held_out_tokens, device)
    check_split(train, judges)
    distributed.check_same({"tokens": tokens, "options": options})
    healing = _Healing(smaller, dense, trained, train, judges, tokens, options)
    return healing.run(None if state is None else Path(state), progress)


class _Healing:
    """One run of `heal`."""

    def __init__(
        self,
        smaller: Any,
        dense: Any,
        trained: Trained,
        train: Sequence[Batch],
        judges: Sequence[Batch],
        tokens: int | None,
        options: HealOptions,
    ) -> None:
        self._dense, self._smaller, self._trained = Exit(dense), Exit(smaller), trained
        self._options = options
        self._asked = token_count(train) if tokens is None else tokens
        self._text_ends = tokens is not None and token_count(train) < tokens
        generator = torch.Generator().manual_seed(options.seed)
        order = torch.randperm(len(train), generator=generator).tolist()
        wanted = sequences_for(min(self._asked, token_count(train)), train)
        self._train = [train[index] for index in order[:wanted]]
        self._per_step = sequences_for(options.tokens_per_step, self._train)
        self._steps = math.ceil(len(self._train) / self._per_step)
        self._judges = list(in_passes(judges))
        self._judged_states: list[Tensor] = []
        settings = repr((asdict(options), self._asked, model_digest(smaller)))
        parts = settings + text_digest([*self._train, *judges])
        self._key = hashlib.sha256(parts.encode()).hexdigest()

    def run(self, path: Path | None, progress: bool) -> HealingFacts:
        """Take the steps, and leave the best state in the model."""
        device = self._trained.parameters[0].device
        run = distributed.on_first(partial(_load, path, self._key, device), device)
        if run is None:
            run = self._start()
        began = time.perf_counter() - run.seconds
        ended: Literal["tokens", "text", "time", "worse"] = (
            "text" if self._text_ends else "tokens"
        )
        total = token_count(self._train)
        with progress_bar("healing", progress, of=total, tokens=True) as bar:
            bar.update(token_count(self._train[: run.step * self._per_step]))
            while run.step < self._steps and run.share < 1.0:
                chosen = self._train[run.step * self._per_step :][: self._per_step]
                self._set(run.point)
                is_finite = self._take_step(run, chosen)
                bar.update(token_count(chosen))
                run.seconds = time.perf_counter() - began
                run.share = self._share(run)
                run.point = distributed.from_first(run.point, device)
                every = max(1, self._steps // _JUDGEMENTS)
                if run.step % every and run.step < self._steps and run.share < 1.0 and is_finite:
                    continue
                value = self._judge(run.point) if is_finite else math.inf
                best = min(value for _, value in run.curve)
                run.curve.append((token_count(self._train[: run.step * self._per_step]), value))
                bar.set_postfix_str(f"held-out divergence {value:.4f}")
                _LOGGER.info("step %d: held-out divergence %.5f", run.step, value)
                if value < best:
                    run.best = run.point
                if path is not None and distributed.is_first():
                    _save(path, run)
                if not value < _LOST * best + _LEAST_LOSS:
                    ended = "worse"
                    _LOGGER.warning(
                        "healing stopped: the held-out divergence rose from %.4f to %.4f; the best "
                        "state is kept. Take a smaller learning_rate than %g",
                        best,
                        value,
                        self._options.learning_rate,
                    )
                    break
        if run.share >= 1.0 and run.step < self._steps:
            ended = "time"
        self._set(run.best)
        if run.best is not run.point or len(run.curve) > 1:
            self._trained.fold()
        return self._facts(run, ended)

    def _start(self) -> _Run:
        point = [part.detach().clone() for part in self._trained.parameters]
        zeros = [torch.zeros_like(part) for part in point]
        value = self._judge(point)
        if not math.isfinite(value):
            raise NonFiniteError(
                f"expected finite predictions before healing, got a divergence of {value}: check "
                "the models in this dtype"
            )
        return _Run(
            self._key, 0, 0.0, point, zeros, [z.clone() for z in zeros], point, [(0, value)], 0.0
        )

    def _share(self, run: _Run) -> float:
        """Return which share of the run is over, of its tokens or of its time."""
        share = run.step / self._steps
        if self._options.minutes is not None:
            share = max(share, run.seconds / (60.0 * self._options.minutes))
        return distributed.from_first(share)

    @torch.no_grad()
    def _set(self, point: Sequence[Tensor]) -> None:
        for parameter, value in zip(self._trained.parameters, point, strict=True):
            parameter.copy_(value)

    def _take_step(self, run: _Run, chosen: Sequence[Batch]) -> bool:
        """Take one step of Adam; return whether all was finite."""
        parameters = self._trained.parameters
        gradients = [torch.zeros_like(part) for part in parameters]
        count = token_count(chosen)
        for batch in distributed.my_share(in_passes(chosen)):
            theirs = self._dense.states(batch)
            with self._trained.applied():
                ours = self._smaller.states(batch, gradients=True)
                away = torch.zeros_like(ours, memory_format=torch.contiguous_format)
                counted = batch.attention_mask.bool()
                exit_divergence(self._dense, self._smaller, theirs, ours, counted, away)
                found = torch.autograd.grad(ours, parameters, away, allow_unused=True)
            for total, part in zip(gradients, found, strict=True):
                if part is not None:
                    total.add_(part, alpha=1.0 / count)
        distributed.add_up(gradients)
        run.step += 1
        if not all(bool(torch.isfinite(part).all()) for part in gradients):
            return False
        size = self._options.learning_rate * _schedule(run.step - 1, run.share)
        beta, gamma = _BETAS
        new = []
        for index, (value, gradient) in enumerate(zip(run.point, gradients, strict=True)):
            first = run.first[index].lerp_(gradient, 1.0 - beta) / (1.0 - beta**run.step)
            second = run.second[index].lerp_(gradient.square(), 1.0 - gamma)
            second = second / (1.0 - gamma**run.step)
            new.append(value - size * first / (second.sqrt() + _TINY))
        run.point = new
        return True

    def _judge(self, point: Sequence[Tensor]) -> float:
        """Return the held-out divergence per token, nats, of what is trained at a point."""
        self._set(point)
        found = 0.0
        with self._trained.applied():
            for batch in distributed.my_share(self._judges):
                theirs, ours = self._dense.states(batch), self._smaller.states(batch)
                counted = batch.attention_mask.bool()
                found += exit_divergence(self._dense, self._smaller, theirs, ours, counted)
        sums = torch.tensor([found], dtype=torch.float64)
        distributed.add_up([sums])
        return float(sums[0]) / token_count(self._judges)

    def _facts(
        self, run: _Run, ended: Literal["tokens", "text", "time", "worse"]
    ) -> HealingFacts:
        values = [value for _, value in run.curve]
        best = min(range(len(values)), key=values.__getitem__)
        if ended == "text":
            _LOGGER.warning(
                "the text ended after %d of the %d tokens asked for, and none was read twice: "
                "over the last half of them the held-out divergence fell by %.1f%%. Give more text",
                run.curve[-1][0],
                self._asked,
                100.0 * (1.0 - values[-1] / values[len(values) // 2]),
            )
        return HealingFacts(
            before=values[0],
            after=values[best],
            tokens=run.curve[-1][0],
            best_tokens=run.curve[best][0],
            rank=self._options.rank,
            maps=len(self._trained.factors),
            ghosts=len(self._trained.ghosts),
            trained_parameters=sum(part.numel() for part in self._trained.parameters),
            curve=[HealingPoint(*point) for point in run.curve],
            ended=ended,
            seconds=run.seconds,
        )


def _schedule(step: int, share: float) -> float:
    """Return the share of the learning rate: up over a few steps, then down a half cosine."""
    return min(1.0, (step + 1) / _WARMUP_STEPS) * 0.5 * (1.0 + math.cos(math.pi * share))


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
            f"{str(path)!r} is not the state of a healing that this version reads ({error}): "
            "remove it, or name another file"
        ) from error
    if run.key != key:
        raise ArgumentError(
            f"{str(path)!r} holds another healing (other model, text or settings): remove it, or "
            "name another file"
        )
    return run
