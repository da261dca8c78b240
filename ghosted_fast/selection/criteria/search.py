"""The set of layers, in one piece or several, whose ghosted model has the lowest loss.

1. Every interval of up to n layers is scored alone, with its ghost in place; within a length the
   clearly worse are dropped early.
2. Where gaps lie apart, what they cost nearly adds up. So the sets of n layers with the lowest sums
   are found exactly, by dynamic programming over the layers: as many in one piece as in two and in
   three, since sums promise the more too much the more pieces there are.
3. These, `beam` in all, race with all their ghosts in place, each fitted by itself.
4. The finalists' ghosts are fitted in sequence, and the last race decides; or, where that is
   asked for, a second look at the best of them, see `selection.corrected`.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

from ghosted_fast.facts import IntervalScore, SetScore
from ghosted_fast.fit.candidates import dense_loss, score_gaps
from ghosted_fast.fit.collect import collect_statistics
from ghosted_fast.fit.ghosts import fit_candidates, fit_in_sequence
from ghosted_fast.fit.memory_budget import default_memory_budget, passes_within
from ghosted_fast.models.gap import Gap
from ghosted_fast.selection.corrected import check_second_look, corrected_losses
from ghosted_fast.selection.criteria.request import Request, Selection
from ghosted_fast.statistics.sample import Interval
from ghosted_fast.text.batches import Batch
from ghosted_fast.text.folds import training_batches

# Ghosts that one model may get: each costs time at every token.
MOST_GAPS = 3
FINALISTS = 4
# Ghosts of candidates are fitted on this many tokens for each of their inputs.
_TOKENS_PER_INPUT = 24


@dataclass(frozen=True)
class _Scored:
    """An interval's ghost, and the loss with it.

    Attributes:
        gap: The interval with its ghost; without it where the race was lost early.
        loss: Nats per token.
    """

    gap: Gap
    loss: float


def by_ghost_search(request: Request) -> Selection:
    """Search for the set with the lowest loss on held-out tokens, the ghosts in place."""
    return search_sets(request, [request.remove])[request.remove]


def search_sets(request: Request, counts: Iterable[int]) -> dict[int, Selection]:
    """Search for the best sets of several sizes; the intervals are scored once for all.

    Args:
        request: The model and the text; its number of layers is not looked at.
        counts: Numbers of layers to remove.

    Returns:
        The selection of each count.
    """
    counts = sorted(set(counts))
    held_out = request.held_out()
    if request.run.corrected_candidates > 1:
        check_second_look(request.decoder, request.training())
    size = _TOKENS_PER_INPUT * request.decoder.hidden_size
    folds = request.options.folds
    batches = _head_of(request.text.hold(), size * folds // (folds - 1))
    dense = dense_loss(request.decoder, held_out)
    scored = _score_intervals(request, batches, held_out, counts[-1])
    costs = {pair: item.loss - dense for pair, item in scored.items() if item.gap.ghost is not None}
    training = training_batches(batches, request.options)
    scores = [IntervalScore(*pair, item.loss) for pair, item in scored.items()]
    selections = {}
    for count in counts:
        each = -(-request.run.beam // MOST_GAPS)
        sets = [
            pairs
            for pieces in range(1, MOST_GAPS + 1)
            for pairs in lowest_sums(costs, count, request.num_layers, each, pieces)
        ]
        ranked = _race(request, held_out, [[scored[pair].gap for pair in pairs] for pairs in sets])
        finalists = [_refit(request, training, gaps) for _, gaps in ranked[:FINALISTS]]
        again = request.run.corrected_candidates
        final = _race(request, held_out, finalists, keep=max(1, again))
        found = [SetScore(_layers(gaps), loss) for loss, gaps in final]
        if again > 1:
            found = _looked_at_again(request, training, held_out, found, final[:again])
        removed = found[0].removed
        found += [SetScore(_layers(gaps), loss) for loss, gaps in ranked[FINALISTS:]]
        kept = [item for item in scores if item.stop - item.start <= count]
        selections[count] = Selection(removed, kept, "ghost-search", {count: removed}, sets=found)
    return selections


def lowest_sums(
    costs: Mapping[Interval, float], count: int, layers: int, number: int, pieces: int
) -> list[tuple[Interval, ...]]:
    """Return the sets of intervals that lie apart with the lowest sums of costs, the lowest first.

    Args:
        costs: The cost of each interval (start, stop) that may be used.
        count: Layers of each set.
        layers: Layers of the model.
        number: How many sets to return, at most.
        pieces: Intervals in a set.
    """

    @cache
    def best(start: int, left: int, gaps: int) -> list[tuple[float, tuple[Interval, ...]]]:
        """Return the lowest sums over layers from `start` on."""
        if not left and not gaps:
            return [(0.0, ())]
        if gaps > left or left > layers - start or not gaps:
            return []
        found = list(best(start + 1, left, gaps))
        for length in range(1, left + 1):
            pair = (start, start + length)
            if pair in costs:
                # The layer behind a gap is kept, or it would be one gap with the next.
                rest = best(min(pair[1] + 1, layers), left - length, gaps - 1)
                found += [(costs[pair] + total, (pair, *others)) for total, others in rest]
        return sorted(found)[:number]

    return [pairs for _, pairs in best(0, count, pieces)]


def _score_intervals(
    request: Request, batches: Sequence[Batch], held_out: Sequence[Batch], longest: int
) -> dict[Interval, _Scored]:
    """Score every interval of up to `longest` layers alone, its ghost in place."""
    decoder, options = request.decoder, request.options
    budget = request.run.memory_budget or default_memory_budget(decoder.device)
    lengths = [request.intervals(n) for n in range(1, longest + 1)]
    intervals = [pair for pairs in lengths for pair in pairs]
    gaps: dict[Interval, Gap] = {}
    for group in passes_within(intervals, decoder.hidden_size, options, budget):
        statistics = collect_statistics(decoder, batches, group, options, request.run.progress)
        ghosts = fit_candidates(decoder, statistics, options, request.run.progress)
        for pair, ghost in zip(group, ghosts, strict=True):
            gaps[pair] = Gap(*pair, ghost)
    scored: dict[Interval, _Scored] = {}
    for pairs in lengths:
        candidates = [[gaps.pop(pair)] for pair in pairs]
        keep = max(1, request.run.beam // 2)
        losses = score_gaps(decoder, held_out, candidates, keep, request.run.progress)
        last = sorted(losses)[min(keep, len(losses)) - 1]
        for pair, (gap,), loss in zip(pairs, candidates, losses, strict=True):
            scored[pair] = _Scored(gap if loss <= last else replace(gap, ghost=None), loss)
    return scored


def _race(
    request: Request,
    held_out: Sequence[Batch],
    candidates: Sequence[list[Gap]],
    keep: int = FINALISTS,
) -> list[tuple[float, list[Gap]]]:
    """Return the candidates with their losses, the lowest first."""
    losses = score_gaps(request.decoder, held_out, candidates, keep, request.run.progress)
    order = sorted(range(len(losses)), key=losses.__getitem__)
    return [(losses[index], candidates[index]) for index in order]


def _refit(request: Request, training: Sequence[Batch], gaps: list[Gap]) -> list[Gap]:
    """Return the gaps with the ghosts behind the first one fitted in sequence."""
    intervals = [(gap.start, gap.stop) for gap in gaps[1:]]
    decoder = request.decoder
    fits = fit_in_sequence(
        decoder, training, intervals, request.options, request.run.progress, gaps[:1]
    )
    ghosts = [fitted.module_of(decoder) for fitted, _ in fits]
    return [gaps[0], *(Gap(*pair, ghost) for pair, ghost in zip(intervals, ghosts, strict=True))]


def _looked_at_again(
    request: Request,
    training: Sequence[Batch],
    held_out: Sequence[Batch],
    scores: Sequence[SetScore],
    finalists: Sequence[tuple[float, list[Gap]]],
) -> list[SetScore]:
    """Return scores that tell of corrections, the best with them first, then those without."""
    gaps = [gaps for _, gaps in finalists]
    losses = corrected_losses(request.decoder, training, held_out, gaps, request.run.progress)
    order = sorted(range(len(losses)), key=losses.__getitem__)
    found = [replace(scores[index], corrected=losses[index]) for index in order]
    return [*found, *scores[len(found) :]]


def _layers(gaps: Sequence[Gap]) -> list[int]:
    return [layer for gap in gaps for layer in range(gap.start, gap.stop)]


def _head_of(batches: Sequence[Batch], tokens: int) -> list[Batch]:
    """Return the first batches that hold a number of tokens, or all."""
    taken: list[Batch] = []
    for batch in batches:
        if sum(item.num_tokens for item in taken) >= tokens:
            break
        taken.append(batch)
    return taken
