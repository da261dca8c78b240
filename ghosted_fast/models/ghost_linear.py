"""GhostLinear, the module that stands in for removed layers."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ghosted_fast.errors import ArgumentError, CheckpointError
from ghosted_fast.ops import ghost_apply
from ghosted_fast.ops.crossings import is_faster_packed
from ghosted_fast.ops.packing import PACKED_DTYPES, pack_weight

_INT8_LIMIT = 127.0
# Words of a weight that are looked at for changes; less than a microsecond.
_SAMPLES = 8


class _Packed:
    """A packed weight, and the state of the tensor that it was made of.

    The tensor's memory is kept alive, so that no other weight can come to lie at its address. A few
    words of it are remembered too: a merged adapter writes through `weight.data`, which PyTorch
    does not count, and changes all of it.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = pack_weight(weight)
        self._source = weight.detach()
        self._address, self._version = weight.data_ptr(), weight._version
        ends = zip(weight.shape, weight.stride(), strict=True)
        reach = 1 + sum((size - 1) * stride for size, stride in ends)
        words = reach * weight.itemsize // 8 if self._address else 0
        self._words = [
            ctypes.c_uint64.from_address(self._address + 8 * (words * place // _SAMPLES))
            for place in range(_SAMPLES if words else 0)
        ]
        self._values = [word.value for word in self._words]

    def stands_for(self, weight: Tensor) -> bool:
        is_there = weight.data_ptr() == self._address and weight._version == self._version
        return is_there and [word.value for word in self._words] == self._values


class GhostLinear(nn.Module):
    """The ghost y = x + f(x) @ weight.T + bias, with f(x) = x or x / sqrt(mean(x^2) + norm_eps).

    A new ghost has zero weights: it is the identity.

    On the processor a ghost without gradients keeps a packed copy of a bf16 or fp32 weight
    (`pack_weight`) where that is read faster. It is made on first use, and anew when the weight was
    changed in place or replaced. A change of few numbers that PyTorch does not count, through
    `weight.data`, needs `forget_packed()`; one of the whole weight, as of a merged adapter, is
    seen.

    Args:
        hidden_size: Width d of the hidden state.
        bias: Whether there is a bias [d].
        norm_eps: Epsilon of the normed form, None for f(x) = x.
        first_state: Whether there is a state [d] that replaces the output of first tokens.
        device: Device of the parameters.
        dtype: Floating-point dtype of the parameters: the dtype of the hidden state.

    Attributes:
        weight: [d, d], [out, in]; int8 once quantized.
        bias: [d] or None.
        scale: [d] fp32, the factor of each int8 row; None for a ghost that is not quantized.
        first_state: [d] or None.
    """

    _packed: _Packed | None = None

    def __init__(
        self,
        hidden_size: int,
        bias: bool = False,
        norm_eps: float | None = None,
        first_state: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if hidden_size < 1:
            raise ArgumentError(f"expected hidden_size >= 1, got {hidden_size}")
        if norm_eps is not None and not norm_eps >= 0.0:
            raise ArgumentError(f"expected norm_eps >= 0 or None, got {norm_eps}")
        self.hidden_size = hidden_size
        self.norm_eps = None if norm_eps is None else float(norm_eps)

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape, device=device, dtype=dtype))

        self.weight: Tensor = zeros(hidden_size, hidden_size)
        self.register_parameter("bias", zeros(hidden_size) if bias else None)
        self.register_parameter("first_state", zeros(hidden_size) if first_state else None)
        self.register_buffer("scale", None)
        self.bias: Tensor | None
        self.first_state: Tensor | None
        self.scale: Tensor | None

    def forward(self, x: Tensor, is_first: Tensor | None = None) -> Tensor:
        """Return the hidden state behind the gap.

        Args:
            x: Hidden state [..., d] before the gap, of the dtype of the ghost.
            is_first: Bool [...]: True at the first attended token of each sequence, where the
                output is `first_state`. None where there is no such token, as in decoding.

        Returns:
            y [..., d], contiguous, of the dtype of x.
        """
        first_state = None if is_first is None else self.first_state
        return ghost_apply(
            x,
            self._weight_for(x, first_state is None),
            self.bias,
            self.scale,
            norm_eps=self.norm_eps,
            first_state=first_state,
            is_first=None if first_state is None else is_first,
        )

    def _weight_for(self, x: Tensor, is_plain: bool) -> Tensor:
        """Return the weight, packed where that serves this call."""
        weight = self.weight
        is_plain = is_plain and self.bias is None and self.norm_eps is None
        if (
            torch.compiler.is_compiling()
            or not weight.is_cpu
            or weight.dtype not in PACKED_DTYPES
            or weight.dtype != x.dtype
            or (torch.is_grad_enabled() and (weight.requires_grad or x.requires_grad))
            or weight.is_inference()  # its changes are not counted
            or not is_faster_packed(
                weight.dtype, self.hidden_size, x.numel() // self.hidden_size, is_plain
            )
        ):
            return weight
        packed = self._packed
        if packed is None or not packed.stands_for(weight):
            packed = self._packed = _Packed(weight)
        return packed.weight

    def check_values(self, name: str) -> None:
        """Raise unless all numbers are such as a ghost can have.

        Args:
            name: What the message calls the ghost.

        Raises:
            CheckpointError: One is NaN or infinite, or a scale is not above 0.
        """
        tensors = {"weight": self.weight, "bias": self.bias, "first_state": self.first_state}
        for part, tensor in {**tensors, "scale": self.scale}.items():
            if tensor is None or tensor.is_meta or not tensor.is_floating_point():
                continue
            good = torch.isfinite(tensor)
            if part == "scale":
                good &= tensor > 0.0
            if not bool(good.all()):
                expected = "finite numbers above 0" if part == "scale" else "finite numbers"
                got = tensor.detach().flatten()[(~good).flatten()][0].item()
                raise CheckpointError(
                    f"expected {expected} in the {part} of {name}, got {got}: the file is damaged, "
                    "copy or save the model again"
                )

    def forget_packed(self) -> None:
        """Drop the packed copy of the weight; the next use on the processor makes a new one."""
        self._packed = None

    def unshare(self) -> None:
        """Give the parameters memory of their own, before values are written into it.

        A model made by `share_copy` has the ghosts of another one until then.
        """
        for parameter in self.parameters(recurse=False):
            parameter.data = parameter.data.clone()

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled and copied: all but the packed copy."""
        return {**vars(self), "_packed": None}

    @property
    def quantization(self) -> str | None:
        """Storage of the weight: None (floating point) or "int8"."""
        return None if self.scale is None else "int8"

    def quantize(self, kind: str = "int8") -> GhostLinear:
        """Store the weight with one scale per row, in place.

        Args:
            kind: "int8": round(weight / scale) with scale = max|row| / 127. The bias and the first
                state stay as they are.

        Returns:
            The ghost itself.

        Raises:
            ArgumentError: `kind` is unknown, or the weight is not finite.
        """
        if kind != "int8":
            raise ArgumentError(f"expected kind 'int8', got {kind!r}")
        if self.scale is not None:
            return self
        weight = self.weight.detach().float()
        largest = weight.abs().amax(dim=1)
        if not weight.is_meta and not torch.isfinite(largest).all():
            raise ArgumentError("expected a finite weight to quantize, got NaN or infinity")
        scale = torch.where(largest > 0.0, largest / _INT8_LIMIT, 1.0)
        rounded = (weight / scale[:, None]).round().clamp(-_INT8_LIMIT, _INT8_LIMIT)
        del self.weight
        self.register_buffer("weight", rounded.to(torch.int8))
        self.scale = scale
        return self

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, residual: bool = True, norm_eps: float | None = None
    ) -> GhostLinear:
        """Build the ghost that computes what a linear layer does.

        Args:
            linear: A square layer.
            residual: True if the layer is used as y = x + linear(x), False for y = linear(x). The
                identity is then subtracted in fp32, and the difference rounded to the layer's
                dtype.
            norm_eps: Epsilon, if the layer takes in the normed hidden state.

        Returns:
            A new ghost on the same device, of the same dtype.

        Raises:
            ArgumentError: The layer is not square, or not floating point.
        """
        size = square_size(linear)
        if size is None:
            raise ArgumentError(f"expected a square floating-point nn.Linear, got {linear}")
        if norm_eps is not None and not residual:
            raise ArgumentError(
                "expected residual=True with norm_eps: the full operator of a normed input is no "
                "ghost, since the ghost adds the hidden state as it is"
            )
        ghost = cls(
            size,
            bias=linear.bias is not None,
            norm_eps=norm_eps,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        with torch.no_grad():
            ghost.weight.copy_(linear.weight if residual else without_identity(linear.weight))
            if ghost.bias is not None:
                ghost.bias.copy_(linear.bias)
        return ghost

    def extra_repr(self) -> str:
        """Describe the ghost in `print(model)`."""
        norm = "" if self.norm_eps is None else f", norm_eps={self.norm_eps:g}"
        stored = "" if self.quantization is None else f", quantization={self.quantization}"
        return (
            f"{self.hidden_size}, bias={self.bias is not None}, "
            f"first_state={self.first_state is not None}{norm}{stored}"
        )

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> GhostLinear:
        """Move or cast as any module, but keep the scale of an int8 weight in fp32."""
        scale = self.scale
        super()._apply(fn, recurse)
        if scale is not None and self.scale is not None and self.scale.dtype != torch.float32:
            self.scale = scale.to(self.scale.device)
        return self


def square_size(linear: nn.Module) -> int | None:
    """Return d if a module is an `nn.Linear` with a floating-point weight [d, d], else None."""
    if not isinstance(linear, nn.Linear) or linear.in_features != linear.out_features:
        return None
    return linear.in_features if linear.weight.is_floating_point() else None


def without_identity(weight: Tensor) -> Tensor:
    """Return weight - I [d, d], subtracted in fp32 (fp64 for fp64) and rounded once."""
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    wide.diagonal().sub_(1.0)
    return wide.to(weight.dtype)
