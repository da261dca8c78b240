"""The interval whose ghosted model has the lowest loss: the recovery is part of the choice.

Source: ours. The ghosts are those of Yun et al., arXiv 2605.15491.
"""

from __future__ import annotations

from ghosted_fast.facts import IntervalScore
from ghosted_fast.fit.candidates import score_intervals
from ghosted_fast.fit.collect import collect_statistics
from ghosted_fast.fit.ghosts import fit_candidates
from ghosted_fast.fit.memory_budget import default_memory_budget, passes_within
from ghosted_fast.models.families import hidden_size
from ghosted_fast.selection.criteria.request import Request, Selection, candidate_intervals
from ghosted_fast.statistics.interval import IntervalStatistics
from ghosted_fast.text.batches import iterate_batches
from ghosted_fast.text.folds import held_out_batches

# What is left after as many tokens as other criteria use differs by less than the noise of those.
_TOKENS_FOR_THE_BEST = 4


def by_ghost(request: Request) -> Selection:
    """Score every interval of the length on held-out tokens, its ghost in place.

    The candidates race over up to four times `score_tokens`.
    """
    model, options = request.model, request.options
    intervals = candidate_intervals(request.count, request.layers)
    budget = request.memory_budget or default_memory_budget(next(model.parameters()).device)
    groups = passes_within(intervals, hidden_size(model), options, budget)
    batches = list(iterate_batches(request.batches))
    held_out = held_out_batches(batches, options, _TOKENS_FOR_THE_BEST * request.score_tokens)
    scores: list[IntervalScore] = []
    best: tuple[float, IntervalStatistics] | None = None
    for group in groups:
        statistics = collect_statistics(model, batches, group, options, request.progress)
        ghosts = fit_candidates(model, statistics, options, request.progress)
        losses = score_intervals(model, held_out, group, ghosts, request.progress)
        scores += [IntervalScore(*pair, loss) for pair, loss in zip(group, losses, strict=True)]
        lowest = min(range(len(group)), key=losses.__getitem__)
        if best is None or losses[lowest] < best[0]:
            best = losses[lowest], statistics[lowest]
    assert best is not None
    loss, chosen = best
    removed = list(range(chosen.start, chosen.stop))
    return Selection(removed, scores, "ghost", {request.count: removed}, loss, chosen)
