"""What a run is asked for: how many layers go, how ghosts are fitted, how much work it may take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ghosted_fast.errors import ArgumentError, check_above, check_at_least, renamed

Features = Literal["normed", "raw", "auto"]
TokenWeight = Literal["inverse_energy", "capped", "uniform"]
FirstState = Literal["auto", "on", "off"]
Damping = float | Literal["auto"]
Corrections = int | Literal["auto"]
Rank = int | Literal["full"]

DEFAULT_SCORE_TOKENS = 2048
DEFAULT_BEAM = 16


@renamed(input='features ("normed", or "raw" for what was "hidden")')
@dataclass(frozen=True)
class GhostOptions:
    """How ghosts are fitted.

    Attributes:
        features: What the matrix is applied to: "normed" for y = x + M (x / rms(x)), "raw" for
            y = x + M x, "auto" for the one with the lower error on the held-out fold, gap by gap.
            That takes the sums of both: about twice the memory, and twice the time of statistics
            and solves. llama.cpp serves normed ghosts alone.
        token_weight: "inverse_energy" for about 1 / mean(y^2) per token, "uniform" for 1, "capped"
            for about 1 / max(mean(y^2), 4 times the energy of a usual token).
        first_state: Whether the first attended token of a sequence gets a constant state: "on",
            "off", or "auto": where it predicts that token better than the linear map does.
        bias: Whether to fit an additive bias.
        damping: Absolute damping, or "auto" for the one that held-out folds prefer.
        folds: Folds of the statistics; sequence i belongs to fold i modulo this.
        sequential: Whether, with several gaps, each ghost is fitted on the states that the ghosts
            below it give, see `fit_in_sequence`. Otherwise all are fitted on the dense model's
            states.

    Raises:
        ArgumentError: A field has no such value.
    """

    features: Features = "normed"
    token_weight: TokenWeight = "capped"
    first_state: FirstState = "auto"
    bias: bool = False
    damping: Damping = "auto"
    folds: int = 4
    sequential: bool = True

    def __post_init__(self) -> None:
        for name, choices in (
            ("features", get_args(Features)),
            ("token_weight", get_args(TokenWeight)),
            ("first_state", get_args(FirstState)),
        ):
            if getattr(self, name) not in choices:
                raise ArgumentError(
                    f"expected {name} to be one of {', '.join(choices)}, "
                    f"got {getattr(self, name)!r}"
                )
        check_at_least(2, folds=self.folds)


@dataclass(frozen=True)
class HealOptions:
    """How a model is healed.

    Attributes:
        tokens: Tokens to learn from at most; None for all that there are.
        rank: Rank of the factors of each linear map; 0 trains the ghosts alone, "full" the ghosts
            and the whole weights of the maps, which takes 28 bytes of memory for each.
        learning_rate: Of Adam's steps; > 0. It falls to nothing over the last three tenths.
            Models wider than 576 take 576/width of it, their ghosts the square of that. None for
            1e-3, or 2e-4 for whole weights.
        tokens_per_step: Tokens of each step.
        held_out_tokens: Tokens that the model is judged on.
        minutes: When to end at the latest, but for the first step; None for no limit.
        seed: Of the factors, and of the order of the text.

    Raises:
        ArgumentError: A field is out of range.
    """

    tokens: int | None = None
    rank: Rank = 32
    learning_rate: float | None = None
    tokens_per_step: int = 1024
    held_out_tokens: int = 4096
    minutes: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank != "full":
            if isinstance(self.rank, str):
                raise ArgumentError(f'expected rank to be a number or "full", got {self.rank!r}')
            check_at_least(0, rank=self.rank)
        check_at_least(
            1, tokens_per_step=self.tokens_per_step, held_out_tokens=self.held_out_tokens
        )
        if self.learning_rate is not None:
            check_above(0, learning_rate=self.learning_rate)
        if self.tokens is not None:
            check_at_least(1, tokens=self.tokens)
        if self.minutes is not None:
            check_above(0, minutes=self.minutes)

    @property
    def step_size(self) -> float:
        """The learning rate, given or not."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 2e-4 if self.rank == "full" else 1e-3


@renamed(refine="heal, a HealOptions(...)", refine_state="heal_state")
@dataclass(frozen=True)
class RunOptions:
    """How much work a run does, where it works, and what it shows.

    Attributes:
        score_tokens: Held-out tokens that candidates are scored on, see `select_layers`.
        beam: Sets of layers that race in the criterion "ghost-search".
        corrected_candidates: So many of the best candidates of the criteria "ghost" and
            "ghost-search" are compared again with two corrections each, and the best of these is
            taken; 0 or 1 for no second look. "ghost-search" has four to look at.
        corrections: How many steps fitted ghosts take towards the dense model's predictions, an int
            or "auto"; see `correct_ghosts`. In a sweep each usually reads the layers above the
            first gap four times.
        heal: How the model is healed after the corrections; None for not at all. See `heal`.
        heal_state: File that the healing is kept in, so that it can go on after it was killed.
        memory_budget: Bytes that statistics may take; several passes are made where they would take
            more. None for half of the free memory.
        device: What computes, where the model is given as a folder or hub id: "cpu", "cuda". One
            that is in memory stays where it is.
        memory: Bytes that all of a run may take, where the model is given as a folder or hub id; it
            is swept through layer by layer where it would take more. Of the device's memory, if it
            has its own. None for four fifths of what is free.
        state: Folder that a sweep keeps its states in, so that it can go on after it was killed.
            None for a temporary one, if any is needed.
        inplace: Whether to cut the given model. Default: a new one that shares its weights.
        progress: Whether to show progress bars on stderr.

    Raises:
        ArgumentError: A field has no such value.
    """

    score_tokens: int = DEFAULT_SCORE_TOKENS
    beam: int = DEFAULT_BEAM
    corrected_candidates: int = 0
    corrections: Corrections = "auto"
    heal: HealOptions | None = None
    heal_state: str | Path | None = None
    memory_budget: int | None = None
    device: str = "cpu"
    memory: int | None = None
    state: str | Path | None = None
    inplace: bool = False
    progress: bool = False

    def __post_init__(self) -> None:
        check_corrections(self.corrections)
        check_at_least(1, beam=self.beam, score_tokens=self.score_tokens)
        check_at_least(0, corrected_candidates=self.corrected_candidates)
        if self.memory is not None:
            check_at_least(1, memory=self.memory)


def check_corrections(corrections: Any) -> None:
    """Raise unless a number of corrections is an int >= 0 or "auto".

    Raises:
        ArgumentError: It is not.
    """
    is_count = isinstance(corrections, int) and not isinstance(corrections, bool)
    if corrections != "auto" and not (is_count and corrections >= 0):
        raise ArgumentError(
            f'expected corrections to be an int >= 0 or "auto", got {corrections!r}'
        )


@dataclass(frozen=True)
class Count:
    """Remove so many layers; a criterion chooses which.

    Attributes:
        layers: How many, in 1..layers of the model - 1.
    """

    layers: int


@dataclass(frozen=True)
class Layers:
    """Remove these layers.

    Attributes:
        removed: Their indices, ascending.
    """

    removed: tuple[int, ...]


@dataclass(frozen=True)
class PerplexityBound:
    """Remove as many layers as can go within a bound on quality.

    Attributes:
        max_increase: The perplexity on held-out calibration tokens, before any corrections, stays
            within this share above the dense model's: 0.1 for 10%. Where a model is swept through,
            each number of layers that is tried reads the layers above its lowest gap once more.

    Raises:
        ArgumentError: It is not above 0.
    """

    max_increase: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.max_increase) and self.max_increase > 0):
            raise ArgumentError(
                f"expected max_increase above 0, such as 0.1 for 10%, got {self.max_increase}"
            )


@dataclass(frozen=True)
class SpeedBound:
    """Remove as few layers as a bound on speed needs.

    Attributes:
        min_speedup: Decoding is at least this many times as fast as the dense model's, measured
            here: 1.3.

    Raises:
        ArgumentError: It is not above 1.
    """

    min_speedup: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.min_speedup) and self.min_speedup > 1):
            raise ArgumentError(
                f"expected min_speedup above 1, such as 1.3, got {self.min_speedup}"
            )


Bound = PerplexityBound | SpeedBound
HowMany = Count | Layers | Bound


def how_many(remove: int | Bound | None, removed: Sequence[int] | None) -> HowMany:
    """Return what two arguments, of which one must be given, ask for.

    Args:
        remove: How many layers to remove, or a bound that their number follows from.
        removed: Which layers to remove.

    Raises:
        ArgumentError: Both are given, or neither.
        TypeError: `remove` is neither a number nor a bound.
    """
    if (remove is None) == (removed is None):
        got = "neither" if remove is None else "both"
        raise ArgumentError(
            "expected either remove (how many layers to remove, or a bound) or removed (which "
            f"layers), got {got}"
        )
    if removed is not None:
        return Layers(tuple(removed))
    if isinstance(remove, Bound):
        return remove
    if isinstance(remove, bool) or not isinstance(remove, int):
        raise TypeError(
            "expected remove to be an int, a PerplexityBound or a SpeedBound, got "
            f"{type(remove).__name__}; which layers to remove is `removed`"
        )
    return Count(remove)
