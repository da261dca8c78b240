"""The speed of a grid's models: what was interrupted does not stay."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from ghosted_fast.grid import GridPlan, run_grid
from ghosted_fast.grid.state import STATE_FILE
from ghosted_fast.measure.speed import Run
from ghosted_fast.testing import random_tokens, tiny_model


@pytest.mark.slow
def test_a_speed_that_was_interrupted_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = itertools.count()

    def interrupted(self: Run, steps: int) -> float:
        if next(calls) == 30:
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr(Run, "decode", interrupted)
    speed = {"prompt_length": 4, "new_tokens": 2, "seconds": 5}
    plan = GridPlan(criteria=["streamline"], recoveries=["none"], speed=speed)
    tokens = [random_tokens(8, 24, seed) for seed in range(4)]
    texts = {"first": [random_tokens(6, 24, 90)]}
    with pytest.raises(KeyboardInterrupt):
        run_grid(tiny_model("llama"), tokens, texts, output=tmp_path, plan=plan, remove=[1])
    state = (tmp_path / STATE_FILE).read_text()
    assert '"key": ["cell"' in state and '"key": ["speed"' not in state
