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
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ghosted_fast import distributed
from ghosted_fast.errors import ArgumentError, NonFiniteError, UnsupportedModelError
from ghosted_fast.facts import HealingEnd, HealingFacts, HealingPoint
from ghosted_fast.improve.adapter import check_adapter, save_adapter
from ghosted_fast.improve.exits import Exit, exit_divergence
from ghosted_fast.improve.factors import Trained, check_trainable
from ghosted_fast.improve.gradients import check_gradients, kernels_with_gradients
from ghosted_fast.improve.healing_run import Run, learning_rate_share, load_run, save_run, take_step
from ghosted_fast.improve.pairs import check_pair, check_same_dtype, check_sharding
from ghosted_fast.models.checked.bos import tell_missing_bos
from ghosted_fast.models.decoder import Decoder, evaluating
from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.models.quantized.loading import quantization_of
from ghosted_fast.models.unloaded.sharded import shard_weights, turns_of, whole_on_first
from ghosted_fast.options import HealOptions
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
from ghosted_fast.timing.spans import span

_LOGGER = logging.getLogger(__name__)
# Judgements of the whole run, beside the one before it: as many as read a quarter of the tokens
# that are learned from, in these limits.
_FEWEST_JUDGEMENTS, _MOST_JUDGEMENTS = 2, 10
_SHARE_TO_JUDGE = 0.25
# A held-out divergence so many times the best one, and so many nats above it, ends the run: the
# steps lead nowhere.
_LOST, _LEAST_LOSS = 1.5, 0.01


@distributed.failing_together()
def heal(
    smaller: Any,
    dense: Any,
    batches: Iterable[Any],
    options: HealOptions | None = None,
    *,
    state: str | Path | None = None,
    adapter: str | Path | None = None,
    overwrite: bool = False,
    shard: bool = False,
    progress: bool = False,
) -> HealingFacts:
    """Train a ghosted or pruned model, in place, to predict what the dense model predicts.

    Linear maps and ghosts get new weights; none that another model shares is written. With
    `adapter` the model stays as it is: what was trained is written apart from it, as an adapter
    that PEFT loads (`peft.PeftModel.from_pretrained(smaller, adapter)`) and takes off again; ghosts
    too are trained by factors of the rank then, and the base may be quantized. In a process group
    the ranks share the text of each step, and end with the same weights.

    Args:
        smaller: A model without some of the dense model's layers, with ghosts or without.
        dense: The dense model that it comes from, in the same dtype. It is not changed, though the
            two may share weights.
        batches: Text, see `iterate_batches`. Of its first sequences every fourth is held out, until
            these hold enough tokens; no other sequence is read twice.
        options: What is trained, on how much, and in which steps.
        state: A file that the run is kept in, so that it goes on there if it is killed. It is left
            behind; a run that has ended is not repeated. Only rank 0 writes and reads it.
        adapter: A folder to write as a PEFT adapter, or None, so that all is folded into the model.
        overwrite: Whether an existing folder `adapter` is replaced.
        shard: Whether the ranks share out the weights of the layers too, so that each holds its
            part of them. Both models stay so: `save_model` saves them, called on all ranks, and
            `unshard_weights` makes them whole. Where an error ends the healing, they are lost.
        progress: Whether to show a progress bar on stderr.

    Returns:
        What was done. Where no step helped, the model is as it was.

    Raises:
        ArgumentError: The models do not fit each other, a ghost is int8, the state is that of
            another run, the adapter's folder exists, or whole weights are to be trained and shared
            out.
        CalibrationError: There is too little text to hold any out.
        CheckpointError: The state file cannot be read.
        MissingExtraError: An adapter is asked for, and package peft is absent.
        NonFiniteError: The model's predictions are NaN or infinite before the first step.
        UnsupportedModelError: The model is quantized, passes no gradients back or is spread over
            processes by FSDP, or there is nothing to train.
        RankError: Another rank failed, or is gone.
    """
    options = options or HealOptions()
    check_pair(smaller, dense)
    check_same_dtype(smaller, dense)
    apart = adapter is not None
    if adapter is not None:
        check_adapter(Path(adapter), options.rank, overwrite)
    check_sharding(smaller, dense, options.rank, shard)
    check_healable(smaller, options, apart)
    given = {"options": options, "apart": apart, "shard": shard}
    for model in (smaller, dense):
        distributed.check_same(given, model)
    text = distributed.same_text_everywhere(batches)
    device = Decoder.of(smaller).device
    train, judges = split_sequences(text, options.held_out_tokens, device, keep_rest=True)
    # A row without a token is masked everywhere, and what a model computes there may be NaN.
    train, judges = ([item for item in part if item.num_tokens] for part in (train, judges))
    check_split(train, judges)
    tell_missing_bos(dense, judges[0])
    trained = Trained(smaller, options.rank, options.seed, apart)
    healing = _Healing(smaller, dense, trained, train, judges, options)
    if shard:
        shard_weights(smaller, dense)
    with kernels_with_gradients(smaller, dense), evaluating(smaller), evaluating(dense):
        facts = healing.run(None if state is None else Path(state), progress)
    if adapter is None and facts.best_tokens:
        trained.fold()
    if adapter is not None:
        with whole_on_first(smaller):
            if distributed.is_first():
                save_adapter(smaller, trained, facts, Path(adapter))
    return facts


def check_healable(model: Any, options: HealOptions, apart: bool = False) -> None:
    """Raise, before any long work, unless a model can be healed.

    Args:
        model: The model, or the dense one that it will be cut from.
        options: How it would be healed.
        apart: Whether what is trained stays apart from the model, which may be quantized then.

    Raises:
        ArgumentError: A ghost is int8.
        UnsupportedModelError: It passes no gradients back, or weights that factors would be folded
            into are quantized.
    """
    ghosts = (module for module in model.modules() if isinstance(module, GhostLinear))
    if any(ghost.quantization for ghost in ghosts):
        raise ArgumentError(
            "expected floating-point ghosts to heal, got int8: heal the model first, and quantize "
            "the ghosts afterwards"
        )
    kind = quantization_of(model.config)
    if options.rank and kind is not None and not apart:
        raise UnsupportedModelError(
            f"expected plain weights, which the factors are folded into, got weights quantized by "
            f"{kind}: heal the model in bf16 and quantize it afterwards, keep the factors apart "
            "(adapter=, --adapter), or train the ghosts alone (rank=0)"
        )
    check_gradients(model)
    if options.rank:
        check_trainable(model, apart)


class _Healing:
    """One run of `heal`."""

    def __init__(
        self,
        smaller: Any,
        dense: Any,
        trained: Trained,
        train: Sequence[Batch],
        judges: Sequence[Batch],
        options: HealOptions,
    ) -> None:
        self._dense, self._smaller, self._trained = Exit(dense), Exit(smaller), trained
        self._model = smaller
        self._options = options
        self._device = trained.parameters[0].device
        there = token_count(train)
        self._asked = there if options.tokens is None else options.tokens
        self._text_ends = there < self._asked
        generator = torch.Generator().manual_seed(options.seed)
        order = torch.randperm(len(train), generator=generator).tolist()
        wanted = sequences_for(min(self._asked, there), train)
        self._train = [train[index] for index in order[:wanted]]
        self._per_step = sequences_for(options.tokens_per_step, self._train)
        self._steps = math.ceil(len(self._train) / self._per_step)
        self._judges = list(in_passes(judges))
        # Of the dense model, behind its last layer; made for the first judgement and kept.
        self._expected: list[Tensor] = []
        enough = round(_SHARE_TO_JUDGE * token_count(self._train) / token_count(judges))
        self._judgements = min(max(enough, _FEWEST_JUDGEMENTS), _MOST_JUDGEMENTS)
        self._stepping = self._judging = 0.0  # seconds that the last step and judgement took
        settings = repr(
            (asdict(options), trained.apart, model_digest(smaller), model_digest(dense))
        )
        parts = settings + text_digest([*self._train, *judges])
        self._key = hashlib.sha256(parts.encode()).hexdigest()

    def run(self, path: Path | None, progress: bool) -> HealingFacts:
        """Take the steps, and leave the best state in what is trained."""
        began = time.perf_counter()
        run = distributed.on_first(partial(load_run, path, self._key, self._device), self._device)
        if run is None:
            run = self._start(began)
        began = time.perf_counter() - run.seconds
        ended: HealingEnd = "text" if self._text_ends else "tokens"
        with progress_bar("healing", progress, of=token_count(self._train), tokens=True) as bar:
            bar.update(self._tokens(run))
            while run.step < self._steps and run.share < 1.0 and not _leads_nowhere(run):
                chosen = self._train[run.step * self._per_step :][: self._per_step]
                self._trained.move_to(run.point)
                gradients = self._gradients(chosen)
                if not all(bool(torch.isfinite(part).all()) for part in gradients):
                    ended = self._nan_ends("a gradient", run)
                    break
                size = self._options.step_size * learning_rate_share(run)
                take_step(run, gradients, size, self._trained.rate_shares)
                bar.update(token_count(chosen))
                self._stepping = time.perf_counter() - began - run.seconds
                run.seconds += self._stepping
                last, run.share = run.share, self._share(run)
                count = self._judgements
                if run.share < 1.0 and int(last * count) == int(run.share * count):
                    continue
                run.point = distributed.from_first(run.point, self._device)
                value, best = self._judge(run.point), run.best_value
                if not math.isfinite(value):
                    ended = self._nan_ends("the held-out divergence", run)
                    break
                run.seconds = time.perf_counter() - began
                run.curve.append((self._tokens(run), value))
                bar.set_postfix_str(f"held-out divergence {value:.4f}")
                _LOGGER.info("step %d: held-out divergence %.5f", run.step, value)
                if value < best:
                    run.best = run.point
                if path is not None and distributed.is_first():
                    save_run(path, run)
        if _leads_nowhere(run):
            ended = "worse"
            self._warn_worse(run)
        elif ended != "nan" and run.step < self._steps:
            ended = "time"
        run.best = distributed.from_first(run.best, self._device)
        self._trained.move_to(run.best)
        if ended == "text":
            self._warn_short(run)
        return distributed.from_first(self._facts(run, ended))

    def _start(self, began: float) -> Run:
        point = [part.detach().clone() for part in self._trained.parameters]
        value = self._judge(point)
        if not math.isfinite(value):
            raise NonFiniteError(
                f"expected finite predictions before healing, got a divergence of {value}: check "
                "the models in this dtype"
            )
        return Run.start(self._key, point, value, time.perf_counter() - began)

    def _tokens(self, run: Run) -> int:
        """Return the tokens learned from."""
        return token_count(self._train[: run.step * self._per_step])

    def _share(self, run: Run) -> float:
        """Return which share of the run is over, of its tokens or of its time."""
        share = run.step / self._steps
        if self._options.minutes is not None:
            # There must be time for a judgement now, one more step, and the judgement at the end.
            left = 60.0 * self._options.minutes - self._judging
            is_over = run.seconds + self._judging + self._stepping > left
            share = 1.0 if is_over else max(share, run.seconds / left)
        return distributed.from_first(min(share, 1.0))

    def _gradients(self, chosen: Sequence[Batch]) -> list[Tensor]:
        """Return the gradients of the mean divergence per token, by all that is trained."""
        parameters = self._trained.parameters
        gradients = [torch.zeros_like(part) for part in parameters]
        count = token_count(chosen)
        for batch, is_mine in turns_of(self._model, list(in_passes(chosen))):
            with span("dense model"):
                theirs = self._dense.states(batch)
            with self._trained.applied():
                with span("smaller model"):
                    ours = self._smaller.states(batch, gradients=True)
                away = torch.zeros_like(ours, memory_format=torch.contiguous_format)
                counted = batch.attention_mask.bool()
                with span("heads and divergence"):
                    if is_mine:
                        exit_divergence(self._dense, self._smaller, theirs, ours, counted, away)
                with span("backward"):
                    found = torch.autograd.grad(ours, parameters, away, allow_unused=True)
            for total, part in zip(gradients, found, strict=True):
                if is_mine and part is not None:
                    total.add_(part, alpha=1.0 / max(count, 1))
        distributed.add_up(gradients)
        return gradients

    def _judge(self, point: Sequence[Tensor]) -> float:
        """Return the held-out divergence per token, nats, of what is trained at a point."""
        began = time.perf_counter()
        self._trained.move_to(point)
        found, turns = 0.0, list(turns_of(self._model, self._judges))
        with span("judgement"):
            if not self._expected:
                self._expected = [self._dense.states(batch) for batch, _ in turns]
            with self._trained.applied():
                for (batch, is_mine), theirs in zip(turns, self._expected, strict=True):
                    ours = self._smaller.states(batch)
                    counted = batch.attention_mask.bool()
                    if is_mine:
                        found += exit_divergence(self._dense, self._smaller, theirs, ours, counted)
        sums = torch.tensor([found], dtype=torch.float64)
        distributed.add_up([sums])
        self._judging = time.perf_counter() - began
        return distributed.from_first(float(sums[0]) / token_count(self._judges))

    def _nan_ends(self, what: str, run: Run) -> HealingEnd:
        _LOGGER.warning(
            "healing stopped after %d tokens: %s is NaN or infinite; the best state is kept. Take "
            "a smaller learning_rate than %g, or check the models in this dtype",
            self._tokens(run),
            what,
            self._options.step_size,
        )
        return "nan"

    def _warn_worse(self, run: Run) -> None:
        _LOGGER.warning(
            "healing stopped: the held-out divergence rose from %.4f to %.4f; the best state is "
            "kept. Take a smaller learning_rate than %g",
            run.best_value,
            run.curve[-1][1],
            self._options.step_size,
        )

    def _warn_short(self, run: Run) -> None:
        tokens, value = run.curve[-1]
        half = min(run.curve, key=lambda item: abs(2 * item[0] - tokens))
        _LOGGER.warning(
            "the text ended after %d of the %d tokens asked for, and none is read twice. Over the "
            "last %d of them the held-out divergence fell by %.1f%%: give more text",
            tokens,
            self._asked,
            tokens - half[0],
            100.0 * (1.0 - value / max(half[1], 1e-30)),
        )

    def _facts(self, run: Run, ended: HealingEnd) -> HealingFacts:
        best = min(run.curve, key=lambda item: item[1])
        return HealingFacts(
            before=run.curve[0][1],
            after=best[1],
            tokens=self._tokens(run),
            best_tokens=best[0],
            rank=self._options.rank,
            maps=self._trained.num_maps,
            ghosts=len(self._trained.ghosts),
            trained_parameters=sum(part.numel() for part in self._trained.parameters),
            curve=[HealingPoint(*point) for point in run.curve],
            ended=ended,
            seconds=run.seconds,
        )


def _leads_nowhere(run: Run) -> bool:
    return run.curve[-1][1] > _LOST * run.best_value + _LEAST_LOSS
