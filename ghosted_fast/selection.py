"""Which layers to remove.

`ghost` (ours) scores every interval of a length with its ghost in place. `streamline` is the cosine
criterion of LLM-Streamline (Chen et al., arXiv 2403.19135), `shortgpt` the block influence of
ShortGPT (Men et al., arXiv 2403.03853).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ghosted_fast.batches import Batch, iterate_batches
from ghosted_fast.boundaries import resume, visit_boundaries, visit_intervals
from ghosted_fast.calibration import (
    GhostOptions,
    IntervalStatistics,
    collect_statistics,
    interval_bytes,
    is_held_out,
)
from ghosted_fast.errors import ArgumentError, CalibrationError
from ghosted_fast.evaluation import token_losses
from ghosted_fast.families import hidden_size
from ghosted_fast.families import num_layers as layer_count
from ghosted_fast.fitting import fit_on_training_folds
from ghosted_fast.modules import GhostLinear

DEFAULT_SCORE_TOKENS = 2048
# A candidate is dropped when its loss is above the lowest by this many standard errors of the
# difference, token by token: about one in 30,000 of those that are as good would be.
_DROP_ABOVE = 4.0
_FEWEST_TOKENS_TO_DROP = 256


@dataclass(frozen=True)
class IntervalScore:
    """The score of one candidate: lower is better.

    Attributes:
        start: First removed layer.
        stop: One past the last removed layer.
        score: In the unit of the criterion: nats per token for `ghost`, 1 - cosine for the others.
    """

    start: int
    stop: int
    score: float


@dataclass(frozen=True)
class Selection:
    """The layers a criterion chose.

    Attributes:
        removed: Layers to remove, ascending.
        scores: Every candidate that was looked at: intervals, or single layers for `shortgpt`.
        criterion: The name of the criterion.
        statistics: The winner's statistics where the criterion gathered them, else None.
    """

    removed: list[int]
    scores: list[IntervalScore]
    criterion: str
    statistics: IntervalStatistics | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class _Request:
    model: nn.Module
    batches: Iterable[Any]
    count: int
    layers: int
    options: GhostOptions
    score_tokens: int
    memory_budget: int | None
    progress: bool


def select_layers(
    model: nn.Module,
    batches: Iterable[Any],
    num_layers: int,
    criterion: str = "ghost",
    *,
    options: GhostOptions | None = None,
    score_tokens: int = DEFAULT_SCORE_TOKENS,
    memory_budget: int | None = None,
    progress: bool = False,
) -> Selection:
    """Choose layers to remove.

    Args:
        model: The dense model, a transformers causal language model.
        batches: Calibration tokens, see `iterate_batches`.
        num_layers: How many layers to remove, in 1..layers-1.
        criterion: One of `CRITERIA`.
        options: How ghosts are fitted (criterion `ghost`).
        score_tokens: Held-out tokens that each candidate is scored on (criterion `ghost`).
        memory_budget: Bytes that statistics may take (criterion `ghost`). Where all candidates
            together need more, several passes are made. Default: half of the free memory.
        progress: Whether to show progress bars on stderr.

    Returns:
        The chosen layers and every candidate's score.

    Raises:
        ArgumentError: The number of layers or the criterion is not one that can be used.
        CalibrationError: Too few tokens, or a budget below the statistics of one interval.
        NonFiniteError: An activation is NaN or infinite.
    """
    layers = layer_count(model)
    check_layer_count(num_layers, layers)
    if criterion not in CRITERIA:
        raise ArgumentError(f"expected a criterion out of {', '.join(CRITERIA)}, got {criterion!r}")
    request = _Request(
        model,
        batches,
        num_layers,
        layers,
        options or GhostOptions(),
        score_tokens,
        memory_budget,
        progress,
    )
    return CRITERIA[criterion](request)


def check_layer_count(count: int, layers: int) -> None:
    """Raise ArgumentError unless `count` layers can be removed from a model of `layers` layers."""
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"expected num_layers to be an int, got {type(count).__name__}")
    if not 1 <= count < layers:
        raise ArgumentError(
            f"expected num_layers in 1..{layers - 1} for a model of {layers} layers, got {count}"
        )


def candidate_intervals(count: int, layers: int) -> list[tuple[int, int]]:
    """Return every interval of `count` layers, the first and the last layer included."""
    return [(start, start + count) for start in range(layers - count + 1)]


def passes_within(
    intervals: Sequence[tuple[int, int]], size: int, options: GhostOptions, budget: int
) -> list[list[tuple[int, int]]]:
    """Cut a list of intervals into groups whose statistics fit a budget of bytes.

    Raises:
        CalibrationError: Not even one interval fits.
    """
    each = interval_bytes(size, options)
    if each > budget:
        raise CalibrationError(
            f"expected a memory budget of at least {each} bytes (the statistics of one interval: "
            f"hidden size {size}, {options.folds} folds), got {budget}: raise it, or use fewer "
            "folds"
        )
    per_pass = budget // each
    return [list(intervals[i : i + per_pass]) for i in range(0, len(intervals), per_pass)]


def default_memory_budget(device: torch.device) -> int:
    """Return half of the free memory beside a device's tensors, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") // 2


def _by_ghost(request: _Request) -> Selection:
    model, options = request.model, request.options
    intervals = candidate_intervals(request.count, request.layers)
    budget = request.memory_budget or default_memory_budget(next(model.parameters()).device)
    groups = passes_within(intervals, hidden_size(model), options, budget)
    batches = list(iterate_batches(request.batches))
    held_out = held_out_batches(batches, options, request.score_tokens)
    scores: list[IntervalScore] = []
    best: tuple[float, IntervalStatistics] | None = None
    for group in groups:
        statistics = collect_statistics(model, batches, group, options, request.progress)
        parameter = next(model.parameters())
        ghosts = [
            fit_on_training_folds(item, options).to_module(parameter.dtype, parameter.device)
            for item in tqdm(statistics, desc="fitting", delay=2.0, disable=not request.progress)
        ]
        losses = score_intervals(model, held_out, group, ghosts, request.progress)
        scores += [IntervalScore(*pair, loss) for pair, loss in zip(group, losses, strict=True)]
        lowest = min(range(len(group)), key=losses.__getitem__)
        if best is None or losses[lowest] < best[0]:
            best = losses[lowest], statistics[lowest]
    assert best is not None
    chosen = best[1]
    return Selection(list(range(chosen.start, chosen.stop)), scores, "ghost", chosen)


def held_out_batches(
    batches: Sequence[Batch], options: GhostOptions, score_tokens: int
) -> list[Batch]:
    """Return the sequences of the held-out fold, until they hold enough tokens.

    Raises:
        CalibrationError: There are fewer sequences than folds, so that none is held out.
    """
    selected: list[Batch] = []
    sequences = tokens = 0
    for batch in batches:
        rows = [row for row in range(len(batch.input_ids)) if is_held_out(sequences + row, options)]
        sequences += len(batch.input_ids)
        for row in rows:
            if tokens < score_tokens:
                selected.append(batch.rows(torch.tensor([row], device=batch.input_ids.device)))
                tokens += selected[-1].num_tokens
    if not selected:
        raise CalibrationError(
            f"expected at least {options.folds} calibration sequences (one per fold), got "
            f"{sequences}: cut the text into shorter sequences, or give more"
        )
    return selected


def score_intervals(
    model: nn.Module,
    batches: Sequence[Batch],
    intervals: Sequence[tuple[int, int]],
    ghosts: Sequence[GhostLinear],
    progress: bool = False,
) -> list[float]:
    """Return the loss of the model with each interval removed and its ghost in place.

    The dense model runs once per batch; each candidate runs from its boundary on. Candidates that
    are clearly worse than the best so far are dropped before the next batch; their score is the
    best's, plus the difference on the tokens that both saw.

    Args:
        model: The dense model.
        batches: The tokens to score on.
        intervals: Pairs (start, stop).
        ghosts: The ghost of each interval, of the model's dtype.
        progress: Whether to show a progress bar on stderr.

    Returns:
        Mean cross-entropy per token, nats, in the order of the intervals.
    """
    device = next(model.parameters()).device
    losses: list[list[Tensor]] = [[] for _ in intervals]
    running = list(range(len(intervals)))
    bar = tqdm(
        desc="scoring intervals",
        total=len(batches) * len(intervals),
        delay=2.0,
        disable=not progress,
    )
    with bar, torch.inference_mode():
        for left, batch in zip(
            range(len(batches) - 1, -1, -1), iterate_batches(batches, device), strict=True
        ):
            states: dict[int, Tensor] = {}
            starts = sorted({intervals[index][0] for index in running})
            visit_boundaries(model, batch, starts, states.__setitem__)
            for index in running:
                start, stop = intervals[index]
                ghost = ghosts[index]
                is_first = batch.is_first if ghost.first_state is not None else None
                logits = resume(model, batch, stop, ghost(states[start], is_first))
                loss, predicted = token_losses(logits, batch.input_ids, batch.attention_mask)
                losses[index].append(loss[predicted].double().cpu())
                bar.update()
            good = _still_good(losses, running)
            bar.update((len(running) - len(good)) * left)
            running = good
    return _mean_losses(losses, running)


def _still_good(losses: Sequence[Sequence[Tensor]], running: Sequence[int]) -> list[int]:
    """Return the candidates that may still turn out to be the best."""
    seen = {index: torch.cat(list(losses[index])) for index in running}
    best = min(seen.values(), key=lambda loss: float(loss.mean()))
    count = len(best)
    if count < _FEWEST_TOKENS_TO_DROP:
        return list(running)
    good = []
    for index, loss in seen.items():
        difference = loss - best
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


def _by_streamline(request: _Request) -> Selection:
    intervals = candidate_intervals(request.count, request.layers)
    distances = _cosine_distances(request, intervals)
    scores = [IntervalScore(*pair, value) for pair, value in zip(intervals, distances, strict=True)]
    best = min(scores, key=lambda item: item.score)
    return Selection(list(range(best.start, best.stop)), scores, "streamline")


def _by_shortgpt(request: _Request) -> Selection:
    layers = candidate_intervals(1, request.layers)
    distances = _cosine_distances(request, layers)
    scores = [IntervalScore(*pair, value) for pair, value in zip(layers, distances, strict=True)]
    chosen = sorted(scores, key=lambda item: item.score)[: request.count]
    return Selection(sorted(item.start for item in chosen), scores, "shortgpt")


def _cosine_distances(request: _Request, intervals: Sequence[tuple[int, int]]) -> list[float]:
    """Return the mean of 1 - cos(input of start, input of stop) over the attended tokens."""
    sums = [0.0] * len(intervals)
    tokens = 0
    device = next(request.model.parameters()).device
    bar = tqdm(
        desc="comparing", unit="tok", unit_scale=True, delay=2.0, disable=not request.progress
    )
    with bar:
        for batch in iterate_batches(request.batches, device):
            attended = batch.attention_mask.bool()

            def compare(index: int, x: Tensor, y: Tensor) -> None:
                cosine = torch.cosine_similarity(x[attended].float(), y[attended].float(), dim=-1)  # noqa: B023
                sums[index] += float((1.0 - cosine).double().sum())

            visit_intervals(request.model, batch, intervals, compare)
            tokens += batch.num_tokens
            bar.update(batch.num_tokens)
    if not tokens:
        raise CalibrationError("expected calibration tokens, got none: give some text")
    return [value / tokens for value in sums]


CRITERIA: dict[str, Callable[[_Request], Selection]] = {
    "ghost": _by_ghost,
    "streamline": _by_streamline,
    "shortgpt": _by_shortgpt,
}
