"""Triton's interpreter with bf16 repaired, and a record of what the kernels touch.

Triton 3.9 keeps bf16 in the interpreter as raw uint16: `tl.dot` multiplies bit patterns, casts from
integers reinterpret, and casts from fp32 truncate. `repair` puts arithmetic on values there.

A pytest plugin (`-p ghosted_triton.interpreter`), so that it comes before any kernel: the
interpreter is chosen when a kernel is decorated.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton.language as tl
from ghosted_triton.checkout import use_kernels_of_this_checkout
from triton.runtime import interpreter

_Handle = interpreter.TensorHandle
_Builder = interpreter.InterpreterBuilder


def _values(handle: Any) -> np.ndarray:
    """Return a handle's numbers; bf16 as fp32."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle.data
    bits = np.ascontiguousarray(handle.data).view(np.uint16).astype(np.uint32) << 16
    return bits.view(np.float32).reshape(np.shape(handle.data))


def _handle(values: np.ndarray, dtype: Any) -> Any:
    """Return numbers as a handle of a type, rounded to nearest even."""
    scalar = dtype.scalar
    if scalar != tl.bfloat16:
        return _Handle(values.astype(interpreter._get_np_dtype(scalar)), scalar)
    wide = torch.from_numpy(np.array(values, dtype=np.float32))
    bits = wide.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    return _Handle(bits.reshape(np.shape(values)), scalar)


def _cast(self: Any, source: Any, dtype: Any, *_: Any, **__: Any) -> Any:
    return _handle(_values(source), dtype)


def _binary(operation: Callable[..., np.ndarray]) -> Callable[..., Any]:
    def apply(self: Any, left: Any, right: Any) -> Any:
        if left.dtype.scalar == tl.bfloat16:
            return _handle(operation(_values(left), _values(right)), left.dtype)
        return self.binary_op(left, right, operation)

    return apply


@dataclass
class Traffic:
    """What the launches inside `recording` touched.

    Attributes:
        addresses: Whether to keep what was touched; if not, products are not computed either.
        multiply_adds: Of all `tl.dot`.
        issued: Bytes of every access, by "load" or "store".
        launches: For each launch, the distinct pairs of bytes of each access.
    """

    addresses: bool
    multiply_adds: int = 0
    issued: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    launches: list[dict[str, list[np.ndarray]]] = field(default_factory=list)

    def distinct_bytes(self) -> int:
        """Return the bytes moved if each launch moves each byte it reads or writes once."""
        total = 0
        for launch in self.launches:
            for blocks in launch.values():
                if blocks:
                    total += 2 * len(np.unique(np.concatenate(blocks)))
        return total


_traffic: Traffic | None = None


def _truncated(values: np.ndarray) -> np.ndarray:
    """Return fp64 values as fp32, rounded towards zero."""
    nearest = values.astype(np.float32)
    away = np.abs(nearest.astype(np.float64)) > np.abs(values)
    return np.where(away, np.nextafter(nearest, np.float32(0.0)), nearest)


def _dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
    """Multiply as a tensor core does, at its worst: 16 products at a time, each sum truncated."""
    rows, inner = a.data.shape[-2:]
    if _traffic is not None:
        _traffic.multiply_adds += rows * inner * b.data.shape[-1]
        if not _traffic.addresses:
            return d
    left, right = _values(a).astype(np.float64), _values(b).astype(np.float64)
    total = d.data.astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, inner, 16):
            part = np.matmul(left[:, start : start + 16], right[start : start + 16])
            total = _truncated(total + part)
    return _Handle(total, d.dtype.scalar)


def _count(kind: str, pointers: Any, mask: Any) -> None:
    if _traffic is None:
        return
    size = max(1, pointers.dtype.scalar.element_ty.primitive_bitwidth // 8)
    touched = pointers.data[mask.data.astype(bool)].ravel()
    _traffic.issued[kind] += size * touched.size
    if not _traffic.addresses:
        return
    # Halves of a word: 8-bit accesses always come in pairs here.
    words = touched[:: 2 if size == 1 else 1] // 2
    offsets = np.arange(max(1, size // 2), dtype=words.dtype)
    words = np.unique((words[:, None] + offsets).ravel())
    _traffic.launches[-1][kind].append(words)


def _with_count(kind: str, original: Callable[..., Any]) -> Callable[..., Any]:
    if kind == "load":

        def load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
            _count(kind, pointers, mask)
            return original(self, pointers, mask, *rest)

        return load

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        _count(kind, pointers, mask)
        return original(self, pointers, value, mask, *rest)

    return store


def repair() -> None:
    """Give the interpreter the arithmetic of bf16, and the hooks of `recording`."""
    _Builder.cast_impl = _cast
    _Builder.create_fp_to_fp = _cast
    _Builder.create_dot = _dot
    for name, operation in {
        "fadd": np.add,
        "fsub": np.subtract,
        "fmul": np.multiply,
        "fdiv": np.divide,
    }.items():
        setattr(_Builder, f"create_{name}", _binary(operation))
    for kind, name in (("load", "create_masked_load"), ("store", "create_masked_store")):
        setattr(_Builder, name, _with_count(kind, getattr(_Builder, name)))
    executor = interpreter.GridExecutor
    original_call = executor.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _traffic is not None:
            _traffic.launches.append({"load": [], "store": []})
        return original_call(self, *args, **kwargs)

    executor.__call__ = call


@contextmanager
def recording(addresses: bool = False) -> Iterator[Traffic]:
    """Count the accesses and multiply-adds of the launches inside; see `Traffic`."""
    global _traffic
    _traffic = Traffic(addresses)
    try:
        yield _traffic
    finally:
        _traffic = None


repair()
use_kernels_of_this_checkout()
