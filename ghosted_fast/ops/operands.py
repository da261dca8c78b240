"""What the operators take: one type for each, which knows what it demands of itself.

The compiled operators check the same in fewer words. The public functions check on their error
alone, so that a caller sees a TypeError or an ArgumentError and the check costs nothing while all
is well.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, SupportsIndex

import torch
from torch import Tensor
from torch.nn import Parameter

from ghosted_fast.errors import ArgumentError
from ghosted_fast.ops.packing import PACKED_DTYPES, packed_shape

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Operands(Protocol):
    """What all of them are: a tuple whose first entry is a tensor, in the order of the schema."""

    def check(self) -> None:
        """Check that they fit together.

        Raises:
            TypeError: A dtype does not fit.
            ArgumentError: A shape, a device, or the combination does not fit.
        """

    def __iter__(self) -> Iterator[Any]: ...

    def __getitem__(self, index: SupportsIndex, /) -> Any: ...


def needs_gradient(operands: Operands) -> bool:
    """Return whether a gradient with respect to one of the operands is wanted."""
    return torch.is_grad_enabled() and any(
        isinstance(operand, Tensor) and operand.requires_grad for operand in operands
    )


class GramOperands(NamedTuple):
    """The operands of `gram_update`; see there."""

    x: Tensor
    y: Tensor | None = None
    token_weight: Tensor | None = None
    norm_eps: float | None = None
    delta: bool = False
    gram: Tensor | None = None
    cross: Tensor | None = None
    moments: Tensor | None = None

    def check(self) -> None:
        """Check that they fit together; see `Operands`."""
        op = "gram_update"
        x, y, token_weight, norm_eps, delta, gram, cross, moments = self
        _check_float(op, "x", x)
        if x.dim() != 2:
            raise ArgumentError(
                f"{op}: expected x of shape [tokens, hidden_size], got {list(x.shape)}; "
                "use x.reshape(-1, hidden_size)"
            )
        num_tokens, hidden_size = x.shape
        if norm_eps is not None and not norm_eps > 0.0:
            raise ArgumentError(f"{op}: expected norm_eps > 0 or None, got {norm_eps}")
        if y is not None:
            _check_float(op, "y", y)
            if y.dim() != 2 or y.shape[0] != num_tokens:
                raise ArgumentError(
                    f"{op}: expected y of shape [{num_tokens}, outputs], got {list(y.shape)}"
                )
            if y.shape[1] != hidden_size and (delta or moments is not None):
                raise ArgumentError(
                    f"{op}: expected y of shape {list(x.shape)} for delta or moments, "
                    f"got {list(y.shape)}"
                )
        elif cross is not None or delta:
            raise ArgumentError(f"{op}: expected y for cross or delta, got None; pass y")
        if token_weight is not None:
            _check_dtype(op, "token_weight", token_weight, torch.float32)
            _check_shape(op, "token_weight", token_weight, [num_tokens])
        for name, output, shape in (
            ("gram", gram, [hidden_size, hidden_size]),
            ("cross", cross, [hidden_size, 0 if y is None else y.shape[1]]),
            ("moments", moments, [3, hidden_size]),
        ):
            if output is not None:
                _check_dtype(op, name, output, torch.float64)
                _check_shape(op, name, output, shape)
                if not output.is_contiguous():
                    raise ArgumentError(
                        f"{op}: expected a contiguous {name}, got strides {list(output.stride())}; "
                        f"pass {name}.contiguous()"
                    )
        read: dict[str, Tensor | None] = {"x": x, "y": y, "token_weight": token_weight}
        sums: dict[str, Tensor | None] = {"gram": gram, "cross": cross, "moments": moments}
        _check_device(
            op, x, **{name: item for name, item in {**read, **sums}.items() if name != "x"}
        )
        _check_apart(op, read, sums)


class GhostOperands(NamedTuple):
    """The operands of `ghost_apply`; see there."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None
    norm_eps: float | None = None
    first_state: Tensor | None = None
    is_first: Tensor | None = None

    def check(self) -> None:
        """Check that they fit together; see `Operands`."""
        op = "ghost_apply"
        x, weight, bias, scale, norm_eps, first_state, is_first = self
        _check_float(op, "x", x)
        if x.dim() == 0:
            raise ArgumentError(f"{op}: expected x of shape [..., hidden_size], got a scalar")
        hidden_size = x.shape[-1]
        if weight.dtype == torch.int8:
            if scale is None:
                raise ArgumentError(
                    f"{op}: expected scale with an int8 weight, got None; pass scale"
                )
            _check_dtype(op, "scale", scale, torch.float32)
            _check_shape(op, "scale", scale, [hidden_size])
        else:
            _check_dtype(op, "weight", weight, x.dtype)
            if scale is not None:
                raise ArgumentError(
                    f"{op}: expected no scale with a weight in {weight.dtype}, got one; "
                    "scale is for int8 weights"
                )
        if weight.dim() == 4:
            _check_packed(op, weight, hidden_size)
        else:
            _check_shape(op, "weight", weight, [hidden_size, hidden_size])
        if norm_eps is not None and not norm_eps > 0.0:
            raise ArgumentError(f"{op}: expected norm_eps > 0 or None, got {norm_eps}")
        if (first_state is None) != (is_first is None):
            given, missing = ("is_first", "first_state")[:: 1 if first_state is None else -1]
            raise ArgumentError(
                f"{op}: expected first_state and is_first together, got {given} alone; "
                f"pass {missing}"
            )
        for name, vector in (("bias", bias), ("first_state", first_state)):
            if vector is not None:
                _check_float(op, name, vector)
                _check_shape(op, name, vector, [hidden_size])
        if is_first is not None:
            _check_dtype(op, "is_first", is_first, torch.bool)
            _check_shape(op, "is_first", is_first, list(x.shape[:-1]))
        _check_device(
            op, x, weight=weight, bias=bias, scale=scale, first_state=first_state, is_first=is_first
        )


class SolveOperands(NamedTuple):
    """The operands of `ghost_solve`; see there."""

    gram: Tensor
    cross: Tensor
    damping: float

    def check(self) -> None:
        """Check that they fit together; see `Operands`."""
        op = "ghost_solve"
        gram, cross, damping = self
        _check_dtype(op, "gram", gram, torch.float64)
        _check_dtype(op, "cross", cross, torch.float64)
        if gram.dim() != 2 or gram.shape[0] != gram.shape[1]:
            raise ArgumentError(f"{op}: expected a square gram, got shape {list(gram.shape)}")
        if cross.dim() != 2 or cross.shape[0] != gram.shape[0]:
            raise ArgumentError(
                f"{op}: expected cross of shape [{gram.shape[0]}, outputs], got {list(cross.shape)}"
            )
        _check_device(op, gram, "gram", cross=cross)
        if not 0.0 <= damping < float("inf"):
            raise ArgumentError(f"{op}: expected a finite damping >= 0, got {damping}")


class DivergenceOperands(NamedTuple):
    """The operands of `divergence`; see there. `first` to `third` are moved rows."""

    dense: Tensor
    smaller: Tensor
    counted: Tensor | None = None
    wants_gradient: bool = False
    first: Tensor | None = None
    second: Tensor | None = None
    third: Tensor | None = None

    @property
    def moved(self) -> list[Tensor]:
        """The moved rows that there are."""
        return [rows for rows in (self.first, self.second, self.third) if rows is not None]

    @property
    def num_sums(self) -> int:
        """How many numbers a row gives: its divergence, k slopes and half of a k x k curvature."""
        count = len(self.moved)
        return 1 + count + count * (count + 1) // 2

    def check(self) -> None:
        """Check that they fit together; see `Operands`."""
        op = "divergence"
        dense, smaller, counted, *_ = self
        _check_float(op, "smaller", smaller)
        if smaller.dim() != 2 or smaller.shape[1] == 0:
            raise ArgumentError(
                f"{op}: expected smaller of shape [rows, words], got {list(smaller.shape)}"
            )
        others = {"dense": dense, **{f"moved[{i}]": rows for i, rows in enumerate(self.moved)}}
        for name, rows in others.items():
            _check_dtype(op, name, rows, smaller.dtype)
            _check_shape(op, name, rows, list(smaller.shape))
        if counted is not None:
            _check_dtype(op, "counted", counted, torch.bool)
            _check_shape(op, "counted", counted, [len(smaller)])
        _check_device(op, smaller, "smaller", **others, counted=counted)


def _check_float(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{op}: expected {name} in bfloat16, float16 or float32, got {tensor.dtype}; "
            f"cast it with {name}.float()"
        )


def _check_dtype(op: str, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise TypeError(
            f"{op}: expected {name} in {dtype}, got {tensor.dtype}; cast it with {name}.to({dtype})"
        )


def _check_shape(op: str, name: str, tensor: Tensor, shape: list[int]) -> None:
    if list(tensor.shape) != shape:
        raise ArgumentError(f"{op}: expected {name} of shape {shape}, got {list(tensor.shape)}")


def _check_device(op: str, x: Tensor, name_of_x: str = "x", /, **others: Tensor | None) -> None:
    _check_storage(op, name_of_x, x)
    for name, tensor in others.items():
        if tensor is not None:
            _check_storage(op, name, tensor)
        if tensor is not None and tensor.device != x.device:
            raise ArgumentError(
                f"{op}: expected {name} on {x.device}, got {tensor.device}; move it there"
            )


def _check_storage(op: str, name: str, tensor: Tensor) -> None:
    """Raise unless all of a tensor lies in its storage; those that stand for others are trusted."""
    if torch.compiler.is_compiling():
        return
    if type(tensor) not in (Tensor, Parameter) or tensor.device.type != "cpu" or not tensor.numel():
        return
    reach = sum((n - 1) * k for n, k in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + reach + 1) * tensor.element_size()
    held = tensor.untyped_storage().nbytes()
    if held < needed:
        raise ArgumentError(
            f"{op}: expected {name} with all of its numbers in memory, got a storage of {held} "
            f"bytes for shape {list(tensor.shape)}; load or copy it anew"
        )


def _check_apart(op: str, read: dict[str, Tensor | None], sums: dict[str, Tensor | None]) -> None:
    """Raise if a sum would be written over what is read, or over another sum."""
    if torch.compiler.is_compiling():
        return
    seen: dict[str, tuple[int, int]] = {}
    for name, tensor in {**read, **sums}.items():
        if tensor is None or type(tensor) not in (Tensor, Parameter):
            continue
        if tensor.is_meta or not tensor.numel():
            continue
        reach = sum((n - 1) * k for n, k in zip(tensor.shape, tensor.stride(), strict=True))
        begin = tensor.data_ptr()
        end = begin + (reach + 1) * tensor.element_size()
        if name in sums:
            for other, (first, last) in seen.items():
                if begin < last and first < end:
                    raise ArgumentError(
                        f"{op}: expected {name} in memory of its own, got some of that of {other}; "
                        "pass another tensor"
                    )
        seen[name] = begin, end


def _check_packed(op: str, weight: Tensor, hidden_size: int) -> None:
    if weight.dtype not in PACKED_DTYPES or weight.device.type != "cpu":
        raise ArgumentError(
            f"{op}: expected a packed weight in bfloat16 or float32 on cpu, got {weight.dtype} on "
            f"{weight.device}; pass the weight as [out, in]"
        )
    _check_shape(op, "packed weight", weight, packed_shape(hidden_size, weight.dtype))
