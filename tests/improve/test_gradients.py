"""Quantized models that pass no gradient back are refused before the long work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ghosted_fast.errors import UnsupportedModelError
from ghosted_fast.improve.gradients import check_gradients
from ghosted_fast.options import HealOptions, RunOptions
from ghosted_fast.pipeline import ghost_model
from ghosted_fast.testing import random_tokens, tiny_model

# An operator without a gradient, as those that extensions in C++ register.
LIBRARY = torch.library.Library("tests_of_gradients", "DEF")
LIBRARY.define("linear(Tensor x, Tensor weight) -> Tensor")
LIBRARY.impl("linear", lambda x, weight: x.detach() @ weight.detach().T, "CPU")
TEXTS = [random_tokens(4, 32, seed) for seed in range(8)]


class Kernel(nn.Linear):
    """A layer whose kernel knows no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(x)


class ZerosKernel(nn.Linear):
    """A layer whose kernel is such an operator: torch passes zeros back."""

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = torch.ops.tests_of_gradients.linear(x, self.weight)
        return made


class FailingKernel(nn.Linear):
    """A layer whose kernel fails where a gradient is wanted."""

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            raise NotImplementedError("no backward")
        return super().forward(x)


def quantized(kernel: type[nn.Module] | None = None) -> Any:
    model = tiny_model("llama", 6)
    model.config.quantization_config = {"quant_method": "mxfp4"}
    if kernel is not None:
        model.model.layers[4].mlp.down_proj.__class__ = kernel
    return model


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (Kernel, r"4\.mlp\.down_proj passes none"),
        (ZerosKernel, r"4\.mlp\.down_proj passes none"),
        (FailingKernel, "no backward"),
    ],
)
def test_corrections_are_refused_beforehand(kernel: type[nn.Module], reason: str) -> None:
    model = quantized(kernel)
    wanted = {name: item.requires_grad for name, item in model.named_parameters()}
    with pytest.raises(UnsupportedModelError, match=rf"by mxfp4 that does not \(.*{reason}.*=True"):
        ghost_model(model, TEXTS, removed=[2], run=RunOptions(corrections=1, progress=False))
    assert {name: item.requires_grad for name, item in model.named_parameters()} == wanted
    assert not any(module._forward_hooks for module in model.modules())
    without = RunOptions(corrections=0, progress=False)
    smaller, report = ghost_model(model, TEXTS, removed=[2], run=without)
    assert report.calibrated_in == "mxfp4" and smaller.config.num_hidden_layers == 5


def test_a_quantized_model_that_passes_gradients_back_is_not_refused() -> None:
    model = quantized()
    check_gradients(model)
    assert all(item.grad is None for item in model.parameters())


def test_a_model_that_is_not_quantized_is_not_looked_at() -> None:
    model = quantized(Kernel)
    del model.config.quantization_config
    check_gradients(model)


def test_where_nobody_asked_for_corrections_there_is_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = quantized(Kernel)
    smaller, report = ghost_model(model, TEXTS, removed=[2])
    assert smaller.config.num_hidden_layers == 5 and report.corrections == []
    assert "ghosts are not corrected: expected a model that passes gradients back" in caplog.text
    with pytest.raises(UnsupportedModelError):
        ghost_model(model, TEXTS, removed=[2], run=RunOptions(heal=HealOptions(rank=0)))
