"""Other people's operators: the four ways to read a matrix, and the ghost that computes the same.

A matrix [d, d] by itself does not say what it is. Codes store the full operator W = I + M or the
difference M, and apply it to rows as `x @ A.T` (what `nn.Linear` does) or as `x @ A`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ghosted_fast.models.ghost_linear import GhostLinear

Form = Literal["full", "delta"]
Layout = Literal["out-in", "in-out"]


class Reading(NamedTuple):
    """How a matrix A is meant.

    Attributes:
        form: "full" for y = A x, "delta" for y = x + A x.
        layout: "out-in" for A x as rows `x @ A.T`, "in-out" for `x @ A`.
    """

    form: Form
    layout: Layout

    def predict(self, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return what the matrix makes of hidden states [..., d], in fp64."""
        wide, operator = x.double(), matrix.double()
        y = wide @ (operator.mT if self.layout == "out-in" else operator)
        if self.form == "delta":
            y = wide + y
        return y if bias is None else y + bias.double()

    def __str__(self) -> str:
        """Return it as one writes it."""
        product = "x @ A.T" if self.layout == "out-in" else "x @ A"
        return f"y = {product}" if self.form == "full" else f"y = x + {product}"


READINGS = tuple(Reading(form, layout) for form in get_args(Form) for layout in get_args(Layout))


@dataclass(frozen=True, eq=False)
class Affine:
    """The map y = x + M x + b.

    Attributes:
        delta: M [d, d], [out, in], fp64.
        bias: b [d], fp64, or None.
    """

    delta: Tensor
    bias: Tensor | None = None

    @classmethod
    def read(cls, matrix: Tensor, reading: Reading, bias: Tensor | None = None) -> Affine:
        """Return the map that a matrix means.

        Args:
            matrix: A [d, d], of any floating-point dtype.
            reading: How it is meant.
            bias: b [d], or None.
        """
        delta = matrix.detach().to(torch.float64, copy=True)
        if reading.layout == "in-out":
            delta = delta.mT.contiguous()
        if reading.form == "full":
            delta.diagonal().sub_(1.0)
        return cls(delta, None if bias is None else bias.detach().double())

    def then(self, following: Affine) -> Affine:
        """Return the map that applies this one, then the following."""
        delta = self.delta + following.delta + following.delta @ self.delta
        bias = self.bias
        if bias is not None:
            bias = bias + following.delta @ bias
        if following.bias is not None:
            bias = following.bias if bias is None else bias + following.bias
        return Affine(delta, bias)

    def to_ghost(self, dtype: torch.dtype, device: torch.device) -> GhostLinear:
        """Return the ghost that computes the map, rounded once to the dtype."""
        size = self.delta.shape[0]
        ghost = GhostLinear(size, bias=self.bias is not None, device=device, dtype=dtype)
        with torch.no_grad():
            ghost.weight.copy_(self.delta)
            if ghost.bias is not None and self.bias is not None:
                ghost.bias.copy_(self.bias)
        return ghost
