"""How much each token counts in a fit."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ghosted_fast.options import GhostOptions
from ghosted_fast.statistics.gram import (
    mean_square,
)
from ghosted_fast.text.batches import Batch

# Of "capped" weights: the multiple of the median energy from which on a token counts less.
_USUAL_ENERGIES = 4.0


_MIN_EXPONENT, _MAX_EXPONENT = -60, 60


def token_weights(
    x: Tensor,
    y: Tensor,
    options: GhostOptions,
    norm_eps: float | None,
    energy_floor: float | None = None,
) -> Tensor:
    """Return the weight of each token in the fit.

    "inverse_energy" is 1 / mean(y^2), moved by at most a factor of 2 so that the scale of a row in
    the Gram, sqrt(w) or sqrt(w) / rms(x), is a power of two: exact in bf16. "capped" is the same
    with an energy of `energy_floor` at least.

    Args:
        x: States that enter the ghost [..., d].
        y: States that it should give [..., d].
        options: How the ghosts are fitted.
        norm_eps: Epsilon of the rms for normed ghosts, None for the others.
        energy_floor: As in `IntervalStatistics`; None for none.

    Returns:
        Weights [...], fp32, above zero.
    """
    if options.token_weight == "uniform":
        return torch.ones(x.shape[:-1], device=x.device)
    energy = mean_square(y)
    if energy_floor is not None:
        energy = energy.clamp_min(energy_floor)  # NaN stays
    unit = torch.ones_like(energy)
    if norm_eps is not None:
        # In fp64 the weights are off by their own rounding alone: the kernels then see which power
        # of two a row's scale is meant to be, and multiply once, not three times.
        unit = mean_square(x, torch.float64) + norm_eps
    # A row that is not finite keeps a plain weight, so that the accumulator sees and reports it.
    usable = torch.isfinite(energy) & torch.isfinite(unit) & (energy > 0) & (unit > 0)
    exponent = torch.where(usable, -0.5 * (energy.log2() + unit.log2()), 0.0).round()
    power = exponent.clamp(_MIN_EXPONENT, _MAX_EXPONENT).to(torch.int32)
    power_of_four = ((2 * power + 127) << 23).view(torch.float32)
    return torch.where(usable, unit * power_of_four, 1.0).float()


def energy_floor(batch: Batch, y: Tensor) -> float:
    """Return the `IntervalStatistics.energy_floor` that the text's first batch decides.

    Args:
        batch: The tokens.
        y: States that leave the gap [batch, length, d].
    """
    attended = batch.attention_mask.bool()
    row = int(attended.any(1).int().argmax())
    usual = float(mean_square(y[row])[attended[row].to(y.device)].nanmedian())
    return _USUAL_ENERGIES * usual if math.isfinite(usual) else 0.0
