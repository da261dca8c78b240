"""Old names end with an error that says the new one."""

from __future__ import annotations

from typing import Any

import pytest

import ghosted_fast as gf
from ghosted_fast.errors import ArgumentError
from ghosted_fast.testing import random_tokens, tiny_model


@pytest.mark.parametrize(
    ("function", "old", "new"),
    [
        (gf.ghost_model, {"num_layers": 2}, "remove"),
        (gf.ghost_model, {"max_perplexity_increase": 0.1}, r"remove=PerplexityBound"),
        (gf.ghost_model, {"min_decode_speedup": 1.2}, r"remove=SpeedBound"),
        (gf.ghost_model, {"input": "hidden"}, r"features.*GhostOptions"),
        (gf.ghost_model, {"bias": True}, r"options=GhostOptions"),
        (gf.ghost_model, {"corrections": 0}, r"run=RunOptions"),
        (gf.ghost_model, {"inplace": True}, r"run=RunOptions"),
        (gf.ghost_model, {"refine": 48}, r"heal, a field of run=RunOptions"),
        (gf.ghost_model, {"refine_state": "s"}, r"heal, a field of run=RunOptions"),
        (gf.RunOptions, {"refine": 48}, r"heal, a HealOptions"),
        (gf.RunOptions, {"refine_state": "s"}, "heal_state"),
        (gf.select_layers, {"num_layers": 2}, "remove"),
        (gf.select_layers, {"beam": 2}, r"run=RunOptions"),
        (gf.run_grid, {"num_layers": [2]}, "remove"),
        (gf.run_grid, {"criteria": ["ghost"]}, r"plan=GridPlan"),
        (gf.GhostOptions, {"input": "normed"}, "features"),
    ],
)
def test_arguments(function: Any, old: dict[str, Any], new: str) -> None:
    (name,) = old
    with pytest.raises(TypeError, match=rf"{function.__name__}\(\) has no '{name}': it is .*{new}"):
        function(**old)


def test_values_and_functions() -> None:
    with pytest.raises(ArgumentError, match=r"be one of normed, raw, auto, got 'hidden'"):
        gf.GhostOptions(features="hidden")  # type: ignore[arg-type]
    with pytest.raises(AttributeError, match="has no 'compare_grid': it is 'run_grid' now"):
        _ = gf.compare_grid  # type: ignore[attr-defined]
    for old, new in (("refine_ghosts", "heal"), ("RefinementOptions", "HealOptions")):
        with pytest.raises(AttributeError, match=f"has no {old!r}: it is {new!r} now"):
            getattr(gf, old)
    with pytest.raises(TypeError, match=r"which layers to remove is `removed`"):
        gf.ghost_model(tiny_model("llama"), [random_tokens(1, 8)], [1, 2])  # type: ignore[arg-type]
