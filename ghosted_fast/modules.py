"""GhostLinear, the module that stands in for removed layers, and other people's ghosts made one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ghosted_fast import _native
from ghosted_fast.derived import bases_of, derive, maker
from ghosted_fast.errors import ArgumentError, UnknownFamilyError, UnsupportedModelError
from ghosted_fast.families import decoder_layers
from ghosted_fast.ops.ghost import ghost_apply
from ghosted_fast.ops.packing import PACKED_DTYPES, pack_weight

_INT8_LIMIT = 127.0
# How far a module's output may be from a form it is taken to compute, relative to that output.
_PROBE_TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


class _Packed:
    """A packed weight, and the state of the tensor that it was made of.

    The tensor's memory is kept alive, so that no other weight can come to lie at its address.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = pack_weight(weight)
        self._source = weight.detach()
        self._address, self._version = weight.data_ptr(), weight._version

    def stands_for(self, weight: Tensor) -> bool:
        return weight.data_ptr() == self._address and weight._version == self._version


class GhostLinear(nn.Module):
    """The ghost y = x + f(x) @ weight.T + bias, with f(x) = x or x / sqrt(mean(x^2) + norm_eps).

    A new ghost has zero weights: it is the identity.

    On the processor a ghost without gradients keeps a packed copy of a bf16 or fp32 weight
    (`pack_weight`), made on first use and made anew when the weight was changed in place or
    replaced. A change that PyTorch does not count, through `weight.data`, needs `forget_packed()`.

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
            self._weight_for(x),
            self.bias,
            self.scale,
            norm_eps=self.norm_eps,
            first_state=first_state,
            is_first=None if first_state is None else is_first,
        )

    def _weight_for(self, x: Tensor) -> Tensor:
        """Return the weight, packed where that serves this call."""
        weight = self.weight
        if (
            torch.compiler.is_compiling()
            or not weight.is_cpu
            or weight.dtype not in PACKED_DTYPES
            or weight.dtype != x.dtype
            or (torch.is_grad_enabled() and (weight.requires_grad or x.requires_grad))
            or weight.is_inference()  # its changes are not counted
            or _native.extension() is None
        ):
            return weight
        packed = self._packed
        if packed is None or not packed.stands_for(weight):
            packed = self._packed = _Packed(weight)
        return packed.weight

    def forget_packed(self) -> None:
        """Drop the packed copy of the weight; the next use on the processor makes a new one."""
        self._packed = None

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


def swap_ghosts(
    model: nn.Module, match: Callable[[str, nn.Module], bool] | Iterable[str] | None = None
) -> list[str]:
    """Turn ghosts that are made of `nn.Linear` into `GhostLinear`, in place.

    Two forms are known: an `nn.Linear` [d, d] that is the full operator y = W x + b, and a module
    around a single such layer that computes y = W x + b or y = x + W x + b, alone or as a tuple of
    one. Which form a module has is found by running it on random input. Each module goes on
    computing what it computed, keeps its hooks, and stays the same object, so that code which holds
    it (a forward hook, a wrapper) needs no change.

    Args:
        model: The model that holds the ghosts.
        match: Which modules are ghosts: their names, or a function of name and module. None takes
            those with "ghost" in their name or class name, and those that stand among the decoder
            layers; attention and MLP projections are never taken unless they are named.

    Returns:
        The names of the swapped modules. Without `match`, modules of no known form are left alone.

    Raises:
        ArgumentError: A module that `match` names does not exist or has no known form.
    """
    modules = dict(model.named_modules())
    if match is None or callable(match):
        chosen = match or _looks_like_ghost(model)
        names = [name for name, module in modules.items() if name and chosen(name, module)]
    else:
        names = list(match)
        unknown = [name for name in names if name not in modules]
        if unknown:
            raise ArgumentError(f"expected names of modules of the model, got {unknown}")
    swapped: list[str] = []
    for name in names:
        inside = any(name.startswith(f"{outer}.") for outer in swapped)
        if inside or isinstance(modules[name], GhostLinear):
            continue
        if _swap(modules[name]):
            swapped.append(name)
        elif match is not None:
            raise ArgumentError(
                f"expected {name!r} to be a square nn.Linear, or a module that returns W x + b or "
                f"x + W x + b with one such layer inside, got {modules[name]}"
            )
    return swapped


def _looks_like_ghost(model: nn.Module) -> Callable[[str, nn.Module], bool]:
    try:
        layers = list(decoder_layers(model))
    except (TypeError, UnknownFamilyError, UnsupportedModelError):
        layers = []
    linear = {id(layer) for layer in layers if _linear_inside(layer) is not None}
    if len(linear) == len(layers):
        linear = set()

    def chosen(name: str, module: nn.Module) -> bool:
        own_name = name.rpartition(".")[2] + type(module).__name__
        return "ghost" in own_name.lower() or id(module) in linear

    return chosen


def _linear_inside(module: nn.Module) -> nn.Linear | None:
    """Return the square layer that a module is, or that is all it consists of."""
    parts = [part for part in module.modules() if part._parameters or part._buffers]
    if len(parts) != 1 or not isinstance(parts[0], nn.Linear) or square_size(parts[0]) is None:
        return None
    is_direct = parts[0] is module or parts[0] in module._modules.values()
    return parts[0] if is_direct else None


def _swap(module: nn.Module) -> bool:
    """Swap one module if it has a known form, and return whether it has."""
    linear = _linear_inside(module)
    if linear is None or linear.weight.is_meta:
        return False
    if type(module).forward is nn.Linear.forward:
        _become_ghost(linear, residual=False)
        return True
    if module is linear:
        return False
    form = _probe(module, linear)
    if form is None:
        return False
    residual, in_tuple = form
    child = next(name for name, part in module._modules.items() if part is linear)
    _become_ghost(linear, residual)
    vars(module).update(_swapped_child=child, _swapped_in_tuple=in_tuple)
    module.__class__ = derive("swapped", type(module))
    return True


def _probe(module: nn.Module, linear: nn.Linear) -> tuple[bool, bool] | None:
    """Return whether a module adds its input, and whether it returns a tuple; None if neither."""
    weight = linear.weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, linear.in_features, generator=generator)
    x = x.to(device=weight.device, dtype=weight.dtype)
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            output, product = module.forward(x), linear.forward(x).float()
    except (TypeError, ValueError, AttributeError, RuntimeError):
        return None  # A module that takes other arguments, or another shape, is no ghost.
    finally:
        module.train(was_training)
    in_tuple = isinstance(output, tuple) and len(output) == 1
    y = output[0] if in_tuple else output
    if not isinstance(y, Tensor) or y.shape != x.shape:
        return None
    for residual in (True, False):
        expected = x.float() + product if residual else product
        error = (y.float() - expected).norm()
        if error <= _PROBE_TOLERANCES.get(weight.dtype, 1e-4) * expected.norm():
            return residual, in_tuple
    return None


def _become_ghost(linear: Any, residual: bool) -> None:
    """Turn a linear layer into a ghost that is the same object, with the same hooks."""
    fresh = vars(GhostLinear.from_linear(linear, residual))
    kept = {name: value for name, value in vars(linear).items() if "hook" in name}
    training = linear.training
    vars(linear).clear()
    vars(linear).update({**fresh, **kept, "training": training})
    linear.__class__ = GhostLinear


@maker("swapped")
def _swapped_class(base: Any) -> type:
    """Make the class of modules around a ghost that used to be a linear layer."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        hidden_states = args[0] if args else next(iter(kwargs.values()))
        y = self.get_submodule(self._swapped_child)(hidden_states)
        return (y,) if self._swapped_in_tuple else y

    return type(
        base.__name__,
        bases_of(base),
        {"__module__": base.__module__, "__qualname__": base.__qualname__, "forward": forward},
    )
