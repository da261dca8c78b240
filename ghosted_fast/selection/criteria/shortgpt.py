"""The layers that turn the hidden state least, one by one.

Source: Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
arXiv 2403.03853, equation 1: the block influence of layer i is the mean over tokens of
1 - cos(x_i, x_(i+1)).
"""

from __future__ import annotations

from ghosted_fast.selection.criteria.distances import mean_distances, one_minus_cosine
from ghosted_fast.selection.criteria.request import (
    Request,
    Selection,
    candidate_intervals,
    in_order,
)


def by_shortgpt(request: Request) -> Selection:
    """Choose the layers of the lowest block influence."""
    singles = candidate_intervals(1, request.num_layers)
    scores = [item.score for item in mean_distances(request, singles, one_minus_cosine)]
    order = sorted(range(request.num_layers), key=lambda i: (request.rests(i), scores[i]))
    return in_order(order, scores, request.remove, "shortgpt")
