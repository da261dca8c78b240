"""What the operators demand of their arguments, in one wording for every backend.

The compiled operators check the same; on their error the wrappers come here, so that a caller sees
a TypeError or an ArgumentError and the check costs nothing while all is well.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ghosted_fast.errors import ArgumentError
from ghosted_fast.ops.packing import PACKED_DTYPES, packed_shape

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Weights that stand for scale[i] * weight[i], row by row.
SCALED_DTYPES = {torch.int8: "an int8", torch.float8_e4m3fn: "a float8_e4m3fn"}


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


def _check_device(op: str, x: Tensor, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            raise ArgumentError(
                f"{op}: expected {name} on {x.device}, got {tensor.device}; move it there"
            )


def check_gram_update(
    x: Tensor,
    y: Tensor | None,
    token_weight: Tensor | None,
    norm_eps: float | None,
    delta: bool,
    gram: Tensor | None,
    cross: Tensor | None,
    moments: Tensor | None,
) -> None:
    """Check the arguments of `gram_update`.

    Raises:
        TypeError: A dtype does not fit.
        ArgumentError: A shape, a device, or the combination does not fit.
    """
    op = "gram_update"
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
    _check_device(op, x, y=y, token_weight=token_weight, gram=gram, cross=cross, moments=moments)


def _check_packed(op: str, weight: Tensor, hidden_size: int) -> None:
    if weight.dtype not in PACKED_DTYPES or weight.device.type != "cpu":
        raise ArgumentError(
            f"{op}: expected a packed weight in bfloat16 or float32 on cpu, got {weight.dtype} on "
            f"{weight.device}; pass the weight as [out, in]"
        )
    _check_shape(op, "packed weight", weight, packed_shape(hidden_size, weight.dtype))


def check_ghost_apply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    norm_eps: float | None,
    first_state: Tensor | None,
    is_first: Tensor | None,
    op: str = "ghost_apply",
) -> None:
    """Check the arguments of `ghost_apply`.

    Raises:
        TypeError: A dtype does not fit.
        ArgumentError: A shape, a device, or the combination does not fit.
    """
    _check_float(op, "x", x)
    if x.dim() == 0:
        raise ArgumentError(f"{op}: expected x of shape [..., hidden_size], got a scalar")
    hidden_size = x.shape[-1]
    if weight.dtype in SCALED_DTYPES:
        if scale is None:
            kind = SCALED_DTYPES[weight.dtype]
            raise ArgumentError(f"{op}: expected scale with {kind} weight, got None; pass scale")
        _check_dtype(op, "scale", scale, torch.float32)
        _check_shape(op, "scale", scale, [hidden_size])
    else:
        _check_dtype(op, "weight", weight, x.dtype)
        if scale is not None:
            raise ArgumentError(
                f"{op}: expected no scale with a weight in {weight.dtype}, got one; "
                "scale is for int8 and float8_e4m3fn weights"
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
            f"{op}: expected first_state and is_first together, got {given} alone; pass {missing}"
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


def check_ghost_apply_rms_norm(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    eps: float,
    bias: Tensor | None,
    scale: Tensor | None,
    norm_eps: float | None,
    first_state: Tensor | None,
    is_first: Tensor | None,
) -> None:
    """Check the arguments of `ghost_apply_rms_norm`.

    Raises:
        TypeError: A dtype does not fit.
        ArgumentError: A shape, a device, or the combination does not fit.
    """
    op = "ghost_apply_rms_norm"
    check_ghost_apply(x, weight, bias, scale, norm_eps, first_state, is_first, op)
    _check_dtype(op, "norm_weight", norm_weight, x.dtype)
    _check_shape(op, "norm_weight", norm_weight, [x.shape[-1]])
    _check_device(op, x, norm_weight=norm_weight)
    if not eps >= 0.0:
        raise ArgumentError(f"{op}: expected eps >= 0, got {eps}")


def check_ghost_solve(gram: Tensor, cross: Tensor, damping: float) -> None:
    """Check the arguments of `ghost_solve`.

    Raises:
        TypeError: A dtype does not fit.
        ArgumentError: A shape, a device, or the damping does not fit.
    """
    op = "ghost_solve"
    _check_dtype(op, "gram", gram, torch.float64)
    _check_dtype(op, "cross", cross, torch.float64)
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1]:
        raise ArgumentError(f"{op}: expected a square gram, got shape {list(gram.shape)}")
    if cross.dim() != 2 or cross.shape[0] != gram.shape[0]:
        raise ArgumentError(
            f"{op}: expected cross of shape [{gram.shape[0]}, outputs], got {list(cross.shape)}"
        )
    _check_device(op, gram, cross=cross)
    if not 0.0 <= damping < float("inf"):
        raise ArgumentError(f"{op}: expected a finite damping >= 0, got {damping}")
