"""What healing refuses, before the work: options, pairs of models, weights without gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.healed_models import SMALL, fitted, healed, text
from torch import Tensor, nn

from ghosted_fast.errors import (
    ArgumentError,
    CalibrationError,
    NonFiniteError,
    UnsupportedModelError,
)
from ghosted_fast.improve import healing
from ghosted_fast.improve.healing import heal
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.models.families import decoder_layers
from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.options import HealOptions, RunOptions
from ghosted_fast.pipeline import ghost_model
from ghosted_fast.surgery.cut import prune_model
from ghosted_fast.testing import tiny_model


@pytest.mark.parametrize(
    ("field", "value"),
    [("rank", -1), ("learning_rate", 0.0), ("tokens", 0), ("minutes", 0.0), ("tokens_per_step", 0)],
)
def test_options_out_of_range(field: str, value: float) -> None:
    with pytest.raises(ArgumentError, match=f"expected {field} >"):
        HealOptions(**{field: value})  # type: ignore[arg-type]


def test_rank_is_a_number_or_full() -> None:
    with pytest.raises(ArgumentError, match='expected rank to be a number or "full"'):
        HealOptions(rank="half")  # type: ignore[arg-type]
    steps = [HealOptions(rank=rank).step_size for rank in (0, 32, "full")]
    assert steps == [1e-3, 1e-3, 2e-4]
    assert HealOptions(rank="full", learning_rate=3e-4).step_size == 3e-4


def test_nan_before_the_first_step() -> None:
    dense = tiny_model("llama")
    smaller = fitted(dense)
    assert Decoder.of(smaller).contract  # plain tokens were looked at by then
    with torch.no_grad():
        smaller.lm_head.weight = nn.Parameter(torch.full_like(smaller.lm_head.weight, math.nan))
    with pytest.raises(NonFiniteError, match="finite predictions before healing"):
        healed(smaller, dense)


class Kernel(nn.Linear):
    """A map whose kernel knows no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(x)


def test_what_cannot_be_healed_is_refused_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*_: Any, **__: Any) -> None:
        raise AssertionError("work was done")

    monkeypatch.setattr(healing.Exit, "states", work)
    dense = tiny_model("llama")
    smaller = fitted(dense)
    with pytest.raises(CalibrationError, match="held-out tokens"):
        heal(smaller, dense, text(1), HealOptions(**SMALL))
    for other, message in (
        (tiny_model("llama", 5), "expected the dense model"),
        (tiny_model("llama", dtype=torch.bfloat16), "both models in one dtype, got .*float32"),
    ):
        with pytest.raises(ArgumentError, match=message):
            healed(smaller, other)
    with pytest.raises(ArgumentError, match="expected the dense model"):
        healed(dense, prune_model(dense, [1]))
    quantized = fitted(dense)
    for module in quantized.modules():
        if isinstance(module, GhostLinear):
            module.quantize()
    with pytest.raises(ArgumentError, match="got int8: heal the model first"):
        healed(quantized, dense)
    kernel = fitted(dense)
    decoder_layers(kernel)[1].mlp.down_proj.__class__ = Kernel
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp\.down_proj, a Kernel"):
        healed(kernel, dense)
    packed = prune_model(dense, [1])
    packed.config.quantization_config = {"quant_method": "mxfp4"}
    with pytest.raises(UnsupportedModelError, match=r"quantized by mxfp4.*rank=0"):
        healed(packed, dense)
    with pytest.raises(UnsupportedModelError, match="quantized by mxfp4: leave shard=True"):
        heal(packed, dense, text(), HealOptions(rank=0), shard=True)
    with pytest.raises(ArgumentError, match="expected a number as the rank to share the weights"):
        heal(fitted(dense), dense, text(), HealOptions(rank="full"), shard=True)
    float8 = prune_model(dense, [1])
    weight = decoder_layers(float8)[0].mlp.up_proj.weight
    decoder_layers(float8)[0].mlp.up_proj.weight = nn.Parameter(
        weight.detach().to(torch.float8_e4m3fn), requires_grad=False
    )
    with pytest.raises(UnsupportedModelError, match=r"float8_e4m3fn in .*0\.mlp\.up_proj"):
        healed(float8, dense)


def test_pipeline_refuses_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = tiny_model("llama")
    decoder_layers(dense)[1].mlp.down_proj.__class__ = Kernel
    monkeypatch.setattr("ghosted_fast.pipeline.choose_layers", None)
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp\.down_proj, a Kernel"):
        ghost_model(dense, text(), removed=[1], run=RunOptions(heal=HealOptions(**SMALL)))
