"""The interval across which the last token of a sequence turns least.

Source: Gromov et al., "The Unreasonable Ineffectiveness of the Deeper Layers", arXiv 2403.17887,
equation 4: d(x_s, x_(s+n)) = arccos(cos(x_s, x_(s+n))) / pi at the last token, averaged over
sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ghosted_fast.selection.criteria.distances import mean_distances
from ghosted_fast.selection.criteria.request import (
    Request,
    Selection,
    best_interval,
    wanted_intervals,
)
from ghosted_fast.text.batches import Batch


def by_angular(request: Request) -> Selection:
    """Choose the interval with the lowest mean angular distance."""
    intervals = wanted_intervals(request)
    return best_interval(
        request, mean_distances(request, intervals, angles_of_last_tokens), "angular"
    )


def angles_of_last_tokens(batch: Batch, x: Tensor, y: Tensor) -> Tensor:
    """Return the angle in half turns between x and y at the last attended token of each row."""
    positions = torch.arange(x.shape[1], device=x.device) * batch.attention_mask
    last = positions.argmax(-1)
    rows = batch.attention_mask.any(-1).nonzero()[:, 0]
    ends = x[rows, last[rows]].double(), y[rows, last[rows]].double()
    return torch.cosine_similarity(*ends, dim=-1).clamp(-1.0, 1.0).acos() / torch.pi
