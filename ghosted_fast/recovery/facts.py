"""What a report says of the operators of gaps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ghosted_fast.options import GhostOptions
from ghosted_fast.recovery.collector import Patch
from ghosted_fast.reports.ghost_report import GhostFacts
from ghosted_fast.statistics.sample import Interval
from ghosted_fast.text.calibration_text import CalibrationText


def fitted_facts(
    gaps: Sequence[Interval],
    patches: Sequence[Patch],
    options: GhostOptions,
    text: CalibrationText,
) -> dict[str, Any]:
    """Return what the report says of the fit."""
    facts = []
    for (start, stop), patch in zip(gaps, patches, strict=True):
        solution = patch.solution
        if solution is None or patch.ghost is None:
            continue
        facts.append(
            GhostFacts(
                start=start,
                stop=stop,
                features="raw" if patch.ghost.norm_eps is None else "normed",
                bias=options.bias,
                first_state=patch.ghost.first_state is not None,
                fit_error=solution.fit_error,
                held_out_error=solution.held_out_error,
                condition=solution.condition,
                damping=solution.damping,
                num_tokens=solution.num_tokens,
            )
        )
    if facts:
        return {"ghosts": facts, "num_tokens": max(item.num_tokens for item in facts)}
    return {"num_tokens": text.num_tokens}
