"""The loss of a model without some of its layers, for many candidates at a time.

The dense model runs once per batch; each candidate runs from its first gap on. Candidates race:
those that are clearly worse than the best are dropped before the next batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ghosted_fast import distributed
from ghosted_fast.measure.perplexity import predicted_positions, token_losses
from ghosted_fast.models.boundaries import resume, visit_boundaries
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.models.gap import Gap
from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.text.batches import Batch, iterate_batches
from ghosted_fast.text.progress import progress_bar
from ghosted_fast.timing.spans import span

# A candidate is dropped when its loss is above the lowest by this many standard errors of the
# difference, token by token: about one in 30,000 of those that are as good would be.
_DROP_ABOVE = 4.0
FEWEST_TOKENS_TO_DROP = 256


def dense_loss(model: Any, batches: Sequence[Batch]) -> float:
    """Return the mean loss of the model as it is, in nats per predicted token."""
    losses = []
    decoder = Decoder.of(model)
    with torch.inference_mode():
        for batch in iterate_batches(batches, decoder.device):
            output = decoder.model(
                batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            )
            loss, predicted = token_losses(output.logits, batch.input_ids, batch.attention_mask)
            losses.append(loss[predicted].double().cpu())
    return distributed.from_first(_mean(torch.cat(losses)))


def score_intervals(
    model: Any,
    batches: Sequence[Batch],
    intervals: Sequence[tuple[int, int]],
    ghosts: Sequence[GhostLinear | None],
    progress: bool = False,
    keep: int = 1,
) -> list[float]:
    """Return the loss of the model with each interval removed and its ghost in place.

    Args:
        model: The dense model.
        batches: The tokens to score on.
        intervals: Pairs (start, stop).
        ghosts: The ghost of each interval, of the model's dtype, or None.
        progress: Whether to show a progress bar on stderr.
        keep: As in `score_gaps`.

    Returns:
        As of `score_gaps`.
    """
    candidates = [[Gap(*pair, ghost)] for pair, ghost in zip(intervals, ghosts, strict=True)]
    return score_gaps(model, batches, candidates, keep, progress)


def score_gaps(
    model: Any,
    batches: Sequence[Batch],
    candidates: Sequence[Sequence[Gap]],
    keep: int = 1,
    progress: bool = False,
) -> list[float]:
    """Return the loss of the model with each candidate's gaps in it.

    Candidates that are clearly worse than the best so far are dropped before the next batch; their
    score is the best's, plus the difference on the tokens that both saw. In a process group every
    rank runs a share of the candidates.

    Args:
        model: The dense model.
        batches: The tokens to score on.
        candidates: The gaps of each, ascending, at least one.
        keep: How many of the best are wanted: what may still be one of them is not dropped.
        progress: Whether to show a progress bar on stderr.

    Returns:
        Mean cross-entropy per token, nats, in the order of the candidates.
    """
    decoder = Decoder.of(model)
    race = Race(len(candidates), keep)
    bar = progress_bar("scoring", progress, of=len(batches) * len(candidates))
    with span("scoring"), bar, torch.inference_mode():
        for left, batch in zip(
            range(len(batches) - 1, -1, -1), iterate_batches(batches, decoder.device), strict=True
        ):
            states: dict[int, Tensor] = {}
            running = race.running
            shared = list(distributed.my_share(running))
            if starts := sorted({candidates[index][0].start for index in shared}):
                with span("layers below"):
                    visit_boundaries(decoder, batch, starts, states.__setitem__)
            predicted = predicted_positions(batch.attention_mask)
            found = torch.zeros(len(candidates), int(predicted.sum()), dtype=torch.float64)
            for index in shared:
                (start, stop, enter), *others = [gap.on(batch) for gap in candidates[index]]
                hidden = states[start] if enter is None else enter(states[start])
                with span("layers above, head"):
                    logits = resume(decoder, batch, stop, hidden, others)
                with span("losses"):
                    loss, _ = token_losses(logits, batch.input_ids, batch.attention_mask)
                found[index] = loss[predicted].double().cpu()
            distributed.add_up([found])
            race.add(found)
            bar.update(len(running) + (len(running) - len(race.running)) * left)
    return race.scores()


class Race:
    """The losses of candidates, batch by batch; those that are clearly worse are dropped.

    Args:
        count: How many candidates there are.
        keep: How many of the best are wanted: what may still be one of them is not dropped.

    Attributes:
        running: Those that were not dropped.
    """

    def __init__(self, count: int, keep: int = 1) -> None:
        self._losses: list[list[Tensor]] = [[] for _ in range(count)]
        self._keep = keep
        self.running = list(range(count))

    def add(self, found: Tensor) -> None:
        """Add the losses [candidates, tokens] of one batch; those of dropped ones do not count."""
        for index in self.running:
            self._losses[index].append(found[index])
        self.running = _still_good(self._losses, self.running, self._keep)

    def scores(self) -> list[float]:
        """Return each candidate's mean loss, see `score_gaps`."""
        return _mean_losses(self._losses, self.running)


def _still_good(losses: Sequence[Sequence[Tensor]], running: Sequence[int], keep: int) -> list[int]:
    """Return the candidates that may still turn out to be among the best."""
    if len(running) <= keep:
        return list(running)
    seen = {index: torch.cat(list(losses[index])) for index in running}
    last_kept = sorted(seen.values(), key=lambda loss: float(loss.mean()))[keep - 1]
    count = len(last_kept)
    if count < FEWEST_TOKENS_TO_DROP:
        return list(running)
    good = []
    for index, loss in seen.items():
        difference = loss - last_kept
        error = float(difference.std()) / count**0.5
        if float(difference.mean()) <= _DROP_ABOVE * error:
            good.append(index)
    return good


def _mean_losses(losses: Sequence[Sequence[Tensor]], running: Sequence[int]) -> list[float]:
    """Return each candidate's mean loss over all tokens, for the dropped as far as it is known."""
    means = {index: _mean(torch.cat(list(losses[index]))) for index in running}
    best = min(means, key=means.__getitem__)
    for index, parts in enumerate(losses):
        if index not in means:
            seen, same = torch.cat(list(parts)), torch.cat(list(losses[best][: len(parts)]))
            means[index] = means[best] + _mean(seen - same)
    return [means[index] for index in range(len(losses))]


def _mean(losses: Tensor) -> float:
    """Return the mean, 0 where no token was predicted (sequences of one token)."""
    return float(losses.sum()) / max(len(losses), 1)
