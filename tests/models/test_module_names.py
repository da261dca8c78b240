"""Names and expressions for modules, in the settings of a quantization, follow the layers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import pytest
from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

from ghosted_fast.surgery.cut import prune_model
from ghosted_fast.testing import tiny_model


class Status(StrEnum):
    SAVED = "saved"


@dataclass
class Group:
    targets: list[str]
    status: Status = Status.SAVED


class Settings(QuantizationConfigMixin):
    """Settings of a quantization that hold objects, as those of several libraries do."""

    def __init__(self, **settings: Any) -> None:
        self.quant_method = QuantizationMethod.TORCHAO
        vars(self).update(settings)

    def to_dict(self) -> dict[str, Any]:
        return {name: str(value) for name, value in vars(self).items()}


def quantized(**settings: Any) -> Any:
    model = tiny_model("llama", 6)
    model.config.quantization_config = Settings(**settings)
    return model


# Layers 1 and 2 of 6 go.
EXPRESSIONS = {
    "re:.*lm_head": ["re:.*lm_head"],
    "model.layers.*.self_attn": ["model.layers.*.self_attn"],
    "*lm_head": ["*lm_head"],
    r"re:.*layers\.4\.mlp": [r"re:.*layers\.2\.mlp"],
    r"re:.*layers\.2\.mlp": [],
    r"re:model\.layers\.(1|4)\.mlp\.up_proj$": [r"re:model\.layers\.(2)\.mlp\.up_proj$"],
    r"+:.*layers\.[345]\..*up_proj": [r"+:model\.layers\.(1|2|3)\.mlp\.up_proj$"],
    r".*\.[02]\.mlp\.act_fn": [r"model\.layers\.(0)\.mlp\.act_fn$"],
    r"re:another\.layers\.3\.x": [r"re:another\.layers\.1\.x"],
    r"re:vision_tower\.layers\.3\.x": [r"re:vision_tower\.layers\.3\.x"],
}


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_expressions_mean_the_same_modules_after_a_cut(expression: str) -> None:
    model = quantized(
        ignore=["lm_head", expression],
        groups={"a": Group([expression])},
        dynamic={expression: {"bits": 8}},
    )
    found = prune_model(model, [1, 2]).config.quantization_config
    kept = EXPRESSIONS[expression]
    assert found.ignore == ["lm_head", *kept]
    assert found.groups["a"] == Group(kept) and type(found.groups["a"].status) is Status
    assert found.dynamic == {name: {"bits": 8} for name in kept}
    assert model.config.quantization_config.ignore == ["lm_head", expression]


def test_a_module_that_is_named_stands_for_its_weight() -> None:
    found = prune_model(quantized(ignore=["re:.*[14]\\.mlp"]), [1, 2]).config.quantization_config
    prefix = "re:model\\.layers\\.(2)\\.mlp"
    inside = ["", "\\.gate_proj", "\\.up_proj", "\\.down_proj"]
    assert found.ignore == [f"{prefix}{name}$" for name in inside]
