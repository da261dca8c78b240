"""Greedy: again and again the layer without which the loss is lowest, with nothing in its place.

Source: Song et al., "SLEB: Streamlining LLMs through Redundancy Verification and Elimination of
Transformer Blocks", arXiv 2402.09025, algorithm 1 with metric 3 (equation 4): the loss of the model
as it has become, without the candidate.
"""

from __future__ import annotations

from ghosted_fast.fit.candidates import score_intervals
from ghosted_fast.selection.criteria.request import (
    Request,
    Selection,
    candidate_intervals,
    in_order,
)
from ghosted_fast.surgery.cut import prune_model


def by_sleb(request: Request) -> Selection:
    """Choose layers one after the other by the loss on held-out tokens.

    A layer's score is its loss when it was last a candidate: the loss after its removal, or what
    its removal would have led to in the last turn.
    """
    held_out = request.held_out()
    model = request.decoder.model
    alive = list(range(request.num_layers))
    order: list[int] = []
    scores = [0.0] * request.num_layers
    for _ in range(request.remove):
        singles = candidate_intervals(1, len(alive))
        nothing = [None] * len(alive)
        losses = score_intervals(model, held_out, singles, nothing, request.run.progress)
        for layer, loss in zip(alive, losses, strict=True):
            scores[layer] = loss
        best = min(range(len(alive)), key=lambda i: (request.rests(alive[i]), losses[i]))
        order.append(alive.pop(best))
        model = prune_model(request.decoder.model, order)
    return in_order(order, scores, request.remove, "sleb")
