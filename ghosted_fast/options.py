"""How ghosts are fitted: the options that every door takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from ghosted_fast.errors import ArgumentError

Input = Literal["normed", "hidden"]


TokenWeight = Literal["inverse_energy", "capped", "uniform"]


FirstState = Literal["auto", "on", "off"]


@dataclass(frozen=True)
class GhostOptions:
    """How ghosts are fitted.

    Attributes:
        input: "normed" for y = x + M (x / rms(x)), "hidden" for y = x + M x.
        token_weight: "inverse_energy" for about 1 / mean(y^2) per token, "uniform" for 1, "capped"
            for about 1 / max(mean(y^2), 4 times the energy of a usual token).
        first_state: Whether the first attended token of a sequence gets a constant state: "on",
            "off", or "auto": where it predicts that token better than the linear map does.
        bias: Whether to fit an additive bias.
        damping: Absolute damping, or "auto" for the one that held-out folds prefer.
        folds: Folds of the statistics; sequence i belongs to fold i modulo this.
    """

    input: Input = "normed"
    token_weight: TokenWeight = "capped"
    first_state: FirstState = "auto"
    bias: bool = False
    damping: float | Literal["auto"] = "auto"
    folds: int = 4

    def __post_init__(self) -> None:
        for name, choices in (
            ("input", get_args(Input)),
            ("token_weight", get_args(TokenWeight)),
            ("first_state", get_args(FirstState)),
        ):
            if getattr(self, name) not in choices:
                raise ArgumentError(
                    f"expected {name} to be one of {', '.join(choices)}, "
                    f"got {getattr(self, name)!r}"
                )
        if self.folds < 2:
            raise ArgumentError(f"expected folds >= 2, got {self.folds}")
