"""The difference of two models' scores on the same samples, with an interval.

Most samples are right, or wrong, with both models. The others decide, and so the difference is
known far better than the two scores by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ghosted_fast.errors import ArgumentError
from ghosted_fast.measure.bootstrap import check_confidence, percentile_interval

_RESAMPLES = 10000


@dataclass(frozen=True)
class Difference:
    """A model's score less another's; `float()` gives `value`.

    Attributes:
        value: The mean over the sets of samples of the mean difference in each.
        low: Lower end of the bootstrap percentile interval.
        high: Upper end of it. Where no sample differs, both ends are 0: how often one would in more
            samples is not known then.
        num_samples: Samples of all sets.
        confidence: Of the interval.
    """

    value: float
    low: float
    high: float
    num_samples: int
    confidence: float

    def __float__(self) -> float:
        return self.value

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        return asdict(self)


def paired_difference(
    own: Sequence[Sequence[float]],
    other: Sequence[Sequence[float]],
    confidence: float = 0.95,
    seed: int = 0,
) -> Difference:
    """Compare two models, sample by sample.

    The interval is a percentile bootstrap that draws samples with what both models make of them,
    from each set as many as it has.

    Args:
        own: Of each set of samples the model's values, such as 1 where it is right, else 0.
        other: The other model's, of the same sets and samples.
        confidence: Of the interval, between 0 and 1.
        seed: Of the draws.

    Returns:
        The difference, the other's taken from the model's.

    Raises:
        ArgumentError: There is no sample in a set or no set, the samples are not as many, or the
            confidence is out of range.

    Source: Efron, "Bootstrap Methods: Another Look at the Jackknife", 1979.
    """
    check_confidence(confidence)
    counts = [[len(values) for values in model] for model in (own, other)]
    if counts[0] != counts[1] or not counts[0] or not all(counts[0]):
        raise ArgumentError(
            f"expected the same samples of both models, one at least in each set, got {counts[0]} "
            f"and {counts[1]} samples: measure both on the same tasks with the same limit"
        )
    generator = np.random.default_rng(seed)
    means, drawn = [], np.zeros(_RESAMPLES)
    for values, others in zip(own, other, strict=True):
        differences = np.asarray(values, dtype=np.float64) - np.asarray(others, dtype=np.float64)
        means.append(differences.mean())
        drawn += _drawn_means(differences, generator) / len(own)
    low, high = percentile_interval(drawn, confidence)
    return Difference(float(np.mean(means)), low, high, sum(counts[0]), confidence)


def _drawn_means(differences: Any, generator: np.random.Generator) -> Any:
    """Return the means of samples that are drawn anew from a set's [draws], fp64.

    How often each value is drawn is multinomial; there are few values.
    """
    values, counts = np.unique(differences, return_counts=True)
    drawn = generator.multinomial(differences.size, counts / differences.size, size=_RESAMPLES)
    return drawn @ values / differences.size
