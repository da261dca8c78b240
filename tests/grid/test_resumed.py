"""A grid that was killed anywhere goes on to the same results, to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ghosted_fast.grid import GridPlan, run_grid
from ghosted_fast.options import RunOptions
from ghosted_fast.testing import random_tokens, tiny_model

# What is measured, not computed.
MEASURED = ("seconds", "peak_memory", "machine")


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in MEASURED}
    return [without_times(item) for item in value] if isinstance(value, list) else value


@pytest.mark.slow
def test_a_killed_grid_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    model = tiny_model("llama", 4)
    text = [random_tokens(4, 32, seed=i) for i in range(4)]
    judged = {"a": [random_tokens(4, 32, seed=99)]}
    plan = GridPlan(criteria=("ghost", "streamline"), recoveries=("none", "ghost"))

    def results(folder: Path) -> Any:
        run_grid(model, text, judged, [1, 2], folder, plan=plan, run=RunOptions())
        return without_times(json.loads((folder / "results.json").read_text()))

    expected = results(tmp_path / "whole")
    lines = (tmp_path / "whole" / "state.jsonl").read_text().splitlines(keepends=True)
    for count in (2, 4, len(lines) - 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        (folder / "state.jsonl").write_text("".join(lines[:count]) + lines[count][:20])
        assert results(folder) == expected
