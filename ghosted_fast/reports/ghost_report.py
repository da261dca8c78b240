"""What `ghost_model` did, as a record, as JSON and as a page."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ghosted_fast.facts import (
    Budget,
    CorrectionFacts,
    HealingFacts,
    IntervalScore,
    healing_rows,
    layers_as_text,
    notebook_table,
)
from ghosted_fast.reports.page import write_report


@dataclass(frozen=True)
class GhostFacts:
    """What is known of one fitted ghost: the fields of `GhostSolution` and its form.

    Attributes:
        start: First removed layer.
        stop: The layer of the dense model that the ghost's output enters.
        features: "normed" or "raw".
        bias: Whether it has a bias.
        first_state: Whether the first token gets a constant state.
        fit_error: Share of the energy of y - x that is left on the tokens of the fit.
        held_out_error: The same on held-out folds, or None.
        condition: Estimated condition number of the factored matrix.
        damping: Absolute damping used.
        num_tokens: Tokens of the fit.
    """

    start: int
    stop: int
    features: str
    bias: bool
    first_state: bool
    fit_error: float
    held_out_error: float | None
    condition: float
    damping: float
    num_tokens: int


@dataclass(frozen=True)
class GhostReport:
    """What `ghost_model` did.

    Attributes:
        model: Name of the model, from its configuration.
        family: Its family.
        num_layers: Layers of the dense model.
        removed: The removed layers.
        criterion: The criterion that chose them, or None where they were given.
        recovery: What was put in their place.
        scores: The criterion's candidates.
        ghosts: One record per interval of the recovery "ghost"; none for the others.
        num_tokens: Calibration tokens.
        seconds: Wall-clock time of selection, calibration and solve, corrections and healing;
            for ghosts that are fitted in sequence the solve is part of the calibration.
        budget: The bound that the number of layers follows from, if one was given.
        corrections: What each correction of the ghosts did.
        healing: What the healing of the model did, or None.
        calibrated_in: What the weights of the model were quantized by, or None.
        spans: Where the time went: seconds and visits by names such as "correct/trials", which is
            a part of "correct".
    """

    model: str
    family: str
    num_layers: int
    removed: list[int]
    criterion: str | None
    recovery: str
    scores: list[IntervalScore]
    seconds: dict[str, float]
    ghosts: list[GhostFacts] = field(default_factory=list)
    num_tokens: int = 0
    budget: Budget | None = None
    corrections: list[CorrectionFacts] = field(default_factory=list)
    healing: HealingFacts | None = None
    calibrated_in: str | None = None
    spans: dict[str, dict[str, float]] = field(default_factory=dict)

    def _repr_html_(self) -> str:
        title = (
            f"{self.model}: {len(self.removed)} of {self.num_layers} layers removed, "
            f"{layers_as_text(self.removed)}"
        )
        rows: list[tuple[str, str]] = [
            ("layers", "given" if self.criterion is None else f"chosen by {self.criterion}"),
            ("in their place", self.recovery),
        ]
        for ghost in self.ghosts:
            error = "-" if ghost.held_out_error is None else f"{ghost.held_out_error:.4f}"
            place = layers_as_text(range(ghost.start, ghost.stop))
            rows.append((f"ghost for {place}", f"{ghost.features}, held-out error {error}"))
        if self.corrections:
            first, last = self.corrections[0], self.corrections[-1]
            taken = sum(item.accepted for item in self.corrections)
            said = f"{taken}, held-out divergence {first.before:.4f} to {last.after:.4f}"
            rows.append(("corrections", said))
        if self.healing is not None:
            rows += [(f"healing: {label}", said) for label, said in healing_rows(self.healing)]
        rows.append(("text", f"{self.num_tokens:,} tokens"))
        rows.append(("time", f"{sum(self.seconds.values()):,.0f} s"))
        return notebook_table(title, rows)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain lists, numbers and strings."""
        return asdict(self)

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the report: JSON for a name that ends in .json, else one HTML page.

        Args:
            path: The file to write; it appears whole or not at all.
            overwrite: Whether an existing file may be replaced.

        Raises:
            ArgumentError: The file exists and `overwrite` is not set.
            MissingExtraError: The page needs a package of the extra `report`.
        """
        write_report(path, self.to_dict(), overwrite=overwrite)
