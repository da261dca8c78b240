"""vLLM gives what transformers gives, for every architecture in the plug-in's tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.tiny_engines import ghosted, losses, random_text
from support.vllm_families import CASES, Case

from ghosted_fast.models.runtime_classes import named_base_of
from ghosted_fast.serving.vllm import NATIVE, THROUGH_TRANSFORMERS

IDS = [name.removesuffix("ForCausalLM") for name, _ in CASES]


def test_every_architecture_is_tried() -> None:
    assert {name for name, _ in CASES} == {*NATIVE, *THROUGH_TRANSFORMERS}


@pytest.mark.parametrize(("architecture", "case"), CASES, ids=IDS)
def test_families(serve: Callable[..., Any], architecture: str, case: Case) -> None:
    from support.vllm_engine import PROMPT, check

    model = ghosted(case.model(), case.removed, **case.ghosts)
    base: Any = named_base_of(type(model))
    assert base.__name__ == architecture
    if not case.only_bf16:
        check(model, serve(model, **case.engine))
        return
    text = PROMPT + random_text(24)
    found = torch.tensor(serve(model, dtype="bfloat16", **case.engine).losses(text))
    exact, dense = losses(model, text), losses(case.model(), text)
    # The median: rounding may choose another expert for a token.
    apart = (found - exact).abs().median()
    assert apart < 0.1 * (exact - dense).abs().median()  # what the cut and its ghosts change
