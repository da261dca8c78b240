"""Options of how long is measured: until something is known, or the time is spent.

See `input_args` for what a group is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import typer

from ghosted_fast.cli._shared import values
from ghosted_fast.cli._shared.verb import usage_error

SecondsOption = Annotated[
    float, typer.Option("--seconds", help="When to stop at the latest, of each measurement.")
]


@dataclass(frozen=True, kw_only=True)
class PrecisionArgs:
    """How precisely, and how long."""

    title: ClassVar = "How precisely"
    precision: Annotated[
        float,
        typer.Option(
            "--precision",
            parser=values.parse_precision,
            metavar="SHARE",
            help="Half of the interval of a ratio at which it is known, such as 0.5%.",
        ),
    ] = 0.02
    seconds: SecondsOption = 60.0

    def __post_init__(self) -> None:
        if not 0 < self.seconds < float("inf"):
            raise usage_error(f"expected seconds above 0, got {self.seconds:g}", "--seconds")
