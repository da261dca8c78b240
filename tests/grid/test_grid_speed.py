"""The speed of a grid's models: what it is measured on, and that no half of it stays."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from ghosted_fast.grid import GridPlan, run_grid
from ghosted_fast.grid.cells import stand_in
from ghosted_fast.grid.judge import operators_of
from ghosted_fast.grid.state import STATE_FILE
from ghosted_fast.measure.speed import Run
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.surgery.cut import remove_layers
from ghosted_fast.testing import random_tokens, tiny_model


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm_eps", [None, 1e-5])
def test_a_stand_in_computes_what_the_model_does(bias: bool, norm_eps: float | None) -> None:
    model = tiny_model("llama")
    ghosts = [GhostLinear(32, bias=bias, norm_eps=norm_eps), GhostLinear(32)]
    smaller = remove_layers(model, [1, 3, 4], ghosts)
    found = stand_in(Decoder.of(model), (1, 3, 4), operators_of(smaller))
    assert operators_of(found) == operators_of(smaller)
    sizes = [sum(p.numel() for p in item.parameters()) for item in (found, smaller)]
    assert sizes[0] == sizes[1] and len(found.model.layers) == 3


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
