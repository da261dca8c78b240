"""Again and again the layer that turns the state least, in the model whose sizes are made up for.

Each time a layer is gone, the size of the stream behind it is made up for (see the recovery of the
same name), and the block influence of all layers that are left is measured anew. Influence is an
angle; the sizes matter since they say how much of the stream a later layer can turn.

Source: Chen et al., "Prune&Comp: Free Lunch for Layer-Pruned LLMs via Iterative Pruning with
Magnitude Compensation", arXiv 2507.18212, with the metric CosSim (BI), and its code.
"""

from __future__ import annotations

import math

from ghosted_fast.fit.ratios import ChannelRatios
from ghosted_fast.fit.walk import walk
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.selection.criteria.distances import Distances, one_minus_cosine
from ghosted_fast.selection.criteria.request import (
    Request,
    Selection,
    candidate_intervals,
    in_order,
)
from ghosted_fast.surgery.cut import prune_model
from ghosted_fast.surgery.scaling import check_divisible, divide_branches


def by_prunecomp(request: Request) -> Selection:
    """Choose layers one after the other by block influence, the model compensated.

    A layer's score is its influence when it was last a candidate.
    """
    request.text.hold()
    model = request.decoder.model
    alive = list(range(request.num_layers))
    scales: dict[int, float] = {}
    scores = [0.0] * request.num_layers
    for _ in range(request.remove):
        influences, ratios = _measured(model, request)
        for layer, influence in zip(alive, influences, strict=True):
            scores[layer] = influence
        best = min(range(len(alive)), key=lambda i: (request.rests(alive[i]), influences[i]))
        scales[alive.pop(best)] = ratios[best]
        model = prune_model(request.decoder.model, list(scales))
        below = [[scales[gone] for gone in scales if gone < layer] for layer in alive]
        divide_branches(model, [math.prod(items) for items in below])
    return in_order(list(scales), scores, request.remove, "prunecomp")


def check_prunecomp(decoder: Decoder, remove: int) -> None:
    """Raise unless the sizes of a model's states can be made up for, see `check_divisible`."""
    check_divisible(decoder)


def _measured(model: object, request: Request) -> tuple[list[float], list[float]]:
    """Return each layer's block influence, and by how much it makes the stream larger."""
    decoder = Decoder.of(model)
    singles = candidate_intervals(1, decoder.num_layers)
    influences = [Distances(pair, one_minus_cosine) for pair in singles]
    ratios = [ChannelRatios(decoder, pair) for pair in singles]
    walk(
        decoder,
        request.text,
        [*influences, *ratios],
        title="comparing",
        progress=request.run.progress,
    )
    return [item.mean() for item in influences], [float(item.mean().mean()) for item in ratios]
