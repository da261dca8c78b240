"""Layers out of groups of layers that compute alike: one of each group, then of the most redundant.

1. S_ij is the mean over tokens of cos(x_i, x_j), with x_i the state that enters layer i.
2. The locality is RLS = -log2 of the mean of S above its diagonal. It decides how many groups there
   are: 2 from 1.0 on, 3 from 0.7 on, else 4.
3. The layers are grouped by spectral clustering of (S + 1) / 2.
4. A layer's redundancy is the mean of S to the others of its group, the removed ones included. Of
   each group, from below, the most redundant layer goes; then again and again the most redundant
   layer of the group whose remaining layers have the highest mean of S among one another.

The first and the last layer stay. Spectral clustering is that of the published code (scikit-learn's
with its defaults): the leading eigenvectors of the normalised affinity, without its diagonal, each
layer's divided by the root of its degree, and k-means. Here k-means begins at many starts that a
seed gives, so the groups are those of its lowest sum of squares; where scikit-learn's ten starts
miss it, they are others.

Source: Yun et al., "Locality-Aware Redundancy Pruning for LLM Depth Compression" (LoRP), arXiv
2605.27786, equations 3 to 11, and its code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import numpy.typing as npt

from ghosted_fast.errors import ArgumentError
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.selection.criteria.distances import mean_distances, one_minus_cosine
from ghosted_fast.selection.criteria.request import Request, Selection, in_order

Matrix = npt.NDArray[np.float64]
# From which locality on there are how many groups, the highest first.
_GROUPS = ((1.0, 2), (0.7, 3))
_MOST_GROUPS = 4
# k-means runs, and steps of one; layers are few.
_STARTS, _STEPS = 100, 100


def by_lorp(request: Request) -> Selection:
    """Choose layers by their redundancy within groups of layers."""
    layers = request.num_layers
    similar = np.eye(layers)
    for item in mean_distances(request, list(combinations(range(layers), 2)), one_minus_cosine):
        similar[item.start, item.stop] = similar[item.stop, item.start] = 1.0 - item.score
    groups = cluster(similar, number_of_groups(locality(similar)))
    resting = [layer for layer in range(layers) if request.rests(layer)]
    order = removal_order(similar, groups, resting)
    scores = [1.0 - value for value in redundancies(similar, groups)]
    return in_order(order, scores, request.remove, "lorp")


def check_lorp(decoder: Decoder, remove: int) -> None:
    """Raise ArgumentError unless so many layers lie between the first and the last."""
    layers = decoder.num_layers
    if remove > layers - 2:
        raise ArgumentError(
            f"expected remove in 1..{layers - 2} with the criterion 'lorp', which keeps the first "
            f"and the last of {layers} layers, got {remove}: choose another criterion"
        )


def locality(similar: Matrix) -> float:
    """Return -log2 of the mean similarity of two layers; infinite where that is not above 0."""
    mean = float(similar[np.triu_indices(len(similar), k=1)].mean())
    return -math.log2(mean) if mean > 0.0 else math.inf


def number_of_groups(found: float) -> int:
    """Return how many groups of layers there are, by the locality."""
    return next((count for least, count in _GROUPS if found >= least), _MOST_GROUPS)


def cluster(similar: Matrix, count: int) -> list[list[int]]:
    """Return groups of layers by spectral clustering, by their lowest layer.

    Args:
        similar: Mean cosines [layers, layers], fp64.
        count: How many groups; no more than there are layers.
    """
    affinity = (similar + 1.0) / 2.0
    np.fill_diagonal(affinity, 0.0)
    roots = np.sqrt(affinity.sum(0))
    _, vectors = np.linalg.eigh(affinity / np.outer(roots, roots))
    labels = _k_means(vectors[:, -count:] / roots[:, None], min(count, len(similar)))
    groups = [[int(layer) for layer in np.flatnonzero(labels == label)] for label in set(labels)]
    return sorted(groups)


def redundancies(similar: Matrix, groups: Sequence[Sequence[int]]) -> list[float]:
    """Return each layer's mean similarity to the others of its group, 0 where it has none."""
    found = [0.0] * len(similar)
    for members in groups:
        for layer in members:
            others = [similar[layer, other] for other in members if other != layer]
            found[layer] = float(np.mean(others)) if others else 0.0
    return found


def removal_order(
    similar: Matrix, groups: Sequence[Sequence[int]], resting: Sequence[int] = ()
) -> list[int]:
    """Return all layers but the first and the last in the order in which they are removed.

    Args:
        similar: Mean cosines [layers, layers].
        groups: Layers of each group, the groups by their lowest layer.
        resting: Layers of which the text tells nothing; each goes as the last of its group.
    """
    redundant, kept = redundancies(similar, groups), (0, len(similar) - 1)
    waiting = [
        sorted(set(members) - set(kept), key=lambda i: (i in resting, -redundant[i], i))
        for members in groups
    ]
    order = [queue.pop(0) for queue in waiting if queue]
    while any(waiting):
        # max() takes the first of equals: the lower group.
        chosen = max(
            (place for place, queue in enumerate(waiting) if queue),
            key=lambda place: _left(similar, [i for i in groups[place] if i not in order]),
        )
        order.append(waiting[chosen].pop(0))
    return order


def _left(similar: Matrix, remaining: Sequence[int]) -> float:
    """Return the mean similarity of two of the layers that a group still has."""
    pairs = [similar[pair] for pair in combinations(remaining, 2)]
    return float(np.mean(pairs)) if pairs else -math.inf


def _k_means(points: Matrix, count: int) -> npt.NDArray[np.int64]:
    """Return the group [points] of each point, by Lloyd's steps from k-means++ starts, the best.

    Source: Arthur and Vassilvitskii, "k-means++: The Advantages of Careful Seeding" (2007).
    """
    draw = np.random.default_rng(0)
    best, labels = math.inf, np.zeros(len(points), dtype=np.int64)
    for _ in range(_STARTS):
        centres = _spread(points, count, draw)
        for _ in range(_STEPS):
            away = ((points[:, None] - centres[None]) ** 2).sum(-1)
            nearest = away.argmin(1)
            moved = np.stack(
                [
                    points[nearest == place].mean(0) if (nearest == place).any() else centres[place]
                    for place in range(count)
                ]
            )
            if np.array_equal(moved, centres):
                break
            centres = moved
        total = float(away.min(1).sum())
        # The same groups, summed in another order, are no better ones.
        if total < best * (1.0 - 1e-9):
            best, labels = total, nearest
    return labels


def _spread(points: Matrix, count: int, draw: np.random.Generator) -> Matrix:
    """Return points to begin at: each drawn in proportion to its distance from those before."""
    centres = [points[draw.integers(len(points))]]
    while len(centres) < count:
        away = np.min([((points - centre) ** 2).sum(-1) for centre in centres], axis=0)
        total = away.sum()
        chances = away / total if total > 0 else None
        centres.append(points[draw.choice(len(points), p=chances)])
    return np.stack(centres)
