"""The interval whose ghosted model has the lowest loss: the recovery is part of the choice.

Source: ours. The ghosts are those of Yun et al., arXiv 2605.15491.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ghosted_fast.facts import IntervalScore
from ghosted_fast.fit.candidates import score_intervals
from ghosted_fast.fit.collect import collect_statistics
from ghosted_fast.fit.ghosts import fit_candidates
from ghosted_fast.fit.memory_budget import default_memory_budget, passes_within
from ghosted_fast.models.gap import Gap
from ghosted_fast.selection.corrected import check_second_look, corrected_losses
from ghosted_fast.selection.criteria.request import Request, Selection
from ghosted_fast.statistics.interval import IntervalStatistics
from ghosted_fast.text.batches import Batch

# What is left after as many tokens as other criteria use differs by less than the noise of those.
TOKENS_FOR_THE_BEST = 4


def by_ghost(request: Request) -> Selection:
    """Score every interval of the length on held-out tokens, its ghost in place.

    The candidates race over up to four times `score_tokens`. Of `corrected_candidates`, the best
    ones, that with the lowest loss after corrections is taken.
    """
    decoder, options, progress = request.decoder, request.options, request.run.progress
    intervals = request.intervals(request.remove)
    if request.run.corrected_candidates > 1:
        check_second_look(decoder, request.training())
    budget = request.run.memory_budget or default_memory_budget(decoder.device)
    groups = passes_within(intervals, decoder.hidden_size, options, budget)
    held_out = request.held_out(TOKENS_FOR_THE_BEST)
    keep = max(1, request.run.corrected_candidates)
    scores: list[IntervalScore] = []
    finalists: list[tuple[float, Gap]] = []
    chosen: IntervalStatistics | None = None
    for group in groups:
        statistics = collect_statistics(decoder, request.text, group, options, progress)
        ghosts = fit_candidates(decoder, statistics, options, progress)
        losses = score_intervals(decoder, held_out, group, ghosts, progress, keep)
        scores += [IntervalScore(*pair, loss) for pair, loss in zip(group, losses, strict=True)]
        lowest = min(range(len(group)), key=losses.__getitem__)
        if not finalists or losses[lowest] < finalists[0][0]:
            chosen = statistics[lowest]
        gaps = (Gap(*pair, ghost) for pair, ghost in zip(group, ghosts, strict=True))
        finalists += zip(losses, gaps, strict=True)
        finalists = sorted(finalists, key=lambda item: item[0])[:keep]
    if len(finalists) > 1:
        scores, finalists = _looked_at_again(request, held_out, scores, finalists)
    loss, best = finalists[0]
    if chosen is not None and chosen.start != best.start:
        chosen = None  # of the others none is kept, for their memory
    removed = list(range(best.start, best.stop))
    return Selection(removed, scores, "ghost", {request.remove: removed}, loss, chosen)


def _looked_at_again(
    request: Request,
    held_out: Sequence[Batch],
    scores: Sequence[IntervalScore],
    finalists: Sequence[tuple[float, Gap]],
) -> tuple[list[IntervalScore], list[tuple[float, Gap]]]:
    """Return scores that tell of corrections, and the finalists, the best with them first."""
    gaps = [[gap] for _, gap in finalists]
    losses = corrected_losses(
        request.decoder, request.training(), held_out, gaps, request.run.progress
    )
    found = {gap.start: loss for (_, gap), loss in zip(finalists, losses, strict=True)}
    scores = [replace(item, corrected=found.get(item.start)) for item in scores]
    return scores, sorted(finalists, key=lambda item: found[item[1].start])
