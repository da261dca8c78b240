"""The interval whose ghosted model has the lowest loss: the recovery is part of the choice.

Source: ours. The ghosts are those of Yun et al., arXiv 2605.15491.
"""

from __future__ import annotations

from ghosted_fast.facts import IntervalScore
from ghosted_fast.fit.candidates import score_intervals
from ghosted_fast.fit.collect import collect_statistics
from ghosted_fast.fit.ghosts import fit_candidates
from ghosted_fast.fit.memory_budget import default_memory_budget, passes_within
from ghosted_fast.selection.criteria.request import Request, Selection
from ghosted_fast.statistics.interval import IntervalStatistics

# What is left after as many tokens as other criteria use differs by less than the noise of those.
TOKENS_FOR_THE_BEST = 4


def by_ghost(request: Request) -> Selection:
    """Score every interval of the length on held-out tokens, its ghost in place.

    The candidates race over up to four times `score_tokens`.
    """
    decoder, options, progress = request.decoder, request.options, request.run.progress
    intervals = request.intervals(request.remove)
    budget = request.run.memory_budget or default_memory_budget(decoder.device)
    groups = passes_within(intervals, decoder.hidden_size, options, budget)
    held_out = request.held_out(TOKENS_FOR_THE_BEST)
    scores: list[IntervalScore] = []
    best: tuple[float, IntervalStatistics] | None = None
    for group in groups:
        statistics = collect_statistics(decoder, request.text, group, options, progress)
        ghosts = fit_candidates(decoder, statistics, options, progress)
        losses = score_intervals(decoder, held_out, group, ghosts, progress)
        scores += [IntervalScore(*pair, loss) for pair, loss in zip(group, losses, strict=True)]
        lowest = min(range(len(group)), key=losses.__getitem__)
        if best is None or losses[lowest] < best[0]:
            best = losses[lowest], statistics[lowest]
    assert best is not None
    loss, chosen = best
    removed = list(range(chosen.start, chosen.stop))
    return Selection(removed, scores, "ghost", {request.remove: removed}, loss, chosen)
