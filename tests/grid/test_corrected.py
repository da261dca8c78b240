"""Rows of rivals whose operators get the same corrections as the ghost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ghosted_fast.grid import GridPlan, corrected, run_grid
from ghosted_fast.improve.correction import correct_ghosts
from ghosted_fast.measure.perplexity import perplexity
from ghosted_fast.options import RunOptions
from ghosted_fast.pipeline import ghost_model
from ghosted_fast.recovery import RECOVERIES
from ghosted_fast.testing import random_tokens, tiny_model
from ghosted_fast.text.batches import iterate_batches

WITH_OPERATOR = [name for name, recovery in RECOVERIES.items() if recovery.has_operator]


def calibration() -> list[torch.Tensor]:
    return [random_tokens(8, 24, seed) for seed in range(4)]


@pytest.mark.slow
def test_rivals_are_corrected_as_the_ghost_is(tmp_path: Path) -> None:
    assert {"nbl", "linearpatch-d", "ghost-paper", "ghost"} <= set(WITH_OPERATOR)
    model, text = tiny_model("llama"), [random_tokens(6, 24, 90)]
    recoveries = [*WITH_OPERATOR, *(corrected(1, name) for name in WITH_OPERATOR)]
    plan = GridPlan(criteria=["streamline"], recoveries=recoveries)
    found = run_grid(model, calibration(), {"text": text}, [2], tmp_path, plan=plan)
    rows = {row["recovery"]: row for row in found.rows}
    batches = list(iterate_batches(calibration()))
    for name in WITH_OPERATOR:
        row = rows[f"{name} + 1 corrections"]
        run = RunOptions(corrections=0)
        smaller, _ = ghost_model(
            model, calibration(), removed=row["removed"], recovery=name, run=run
        )
        facts = correct_ghosts(smaller, model, batches, 1)
        exact = perplexity(smaller, text).value
        assert row["perplexity"]["text"]["value"] == pytest.approx(exact, rel=1e-5)
        assert row["corrections"] == sum(item.accepted for item in facts)
        assert rows[name]["published"] == (name != "ghost") and not row["published"]
