"""Ghosts in other people's forward hooks: what a hook can reach, and proof of what it computes.

A hook is a function that nobody can read. What it can *reach* is known: matrices in its closure, in
the object it is bound to, among its arguments and defaults, and by the names of globals and of
attributes of the hooked module that its code mentions. A hook that reaches no matrix [d, d] is
never run. Any other is run on random hidden states, and taken for a ghost only if its answers are
those of one of the matrices, in one of the four readings, within the hook's own rounding.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ghosted_fast.affine import READINGS, Affine
from ghosted_fast.errors import ArgumentError

# A hook's rounding: at most three times the relative rms of rounding to its coarsest dtype.
_TOLERANCES = {torch.float16: 1e-3, torch.bfloat16: 6e-3}
_FP32_TOLERANCE = 1e-5
# Rows and magnitudes of the hidden states that hooks are tried on: a prompt, one token, a batch.
_PROBES = (((2, 3), 1.0), ((1, 1), 30.0), ((1, 16), 0.03))
_DEEPEST, _MOST_PARTS = 6, 4096
# A module with more tensors than a matrix, a bias and a scale is no operator.
_MOST_TENSORS = 3
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.ParameterList, nn.ParameterDict)


@dataclass(frozen=True, eq=False)
class Hook:
    """A hook on a module.

    Attributes:
        name: Name of the module in its model.
        module: The module.
        key: Key of the hook in the module's table.
        is_pre: Whether it is a forward pre-hook, which sees the input, or a forward hook.
    """

    name: str
    module: nn.Module
    key: int
    is_pre: bool

    @property
    def function(self) -> Any:
        """What is called."""
        return (self.module._forward_pre_hooks if self.is_pre else self.module._forward_hooks)[
            self.key
        ]

    def __str__(self) -> str:
        """Return a name that its owner knows."""
        function = self.function
        name = getattr(function, "__qualname__", type(function).__name__)
        kind = "forward pre-hook" if self.is_pre else "forward hook"
        return f"the {kind} {name!r} on {self.name!r}"

    def remove(self) -> None:
        """Take it off the module; a handle that its owner holds is then without effect."""
        module: Any = self.module
        kind = "_forward_pre_hooks" if self.is_pre else "_forward_hooks"
        for table in (kind, f"{kind}_with_kwargs", f"{kind}_always_called"):
            getattr(module, table, {}).pop(self.key, None)

    def run(self, x: Tensor, in_tuple: bool = False) -> Tensor:
        """Return what it makes of hidden states [..., d].

        Args:
            x: The hidden states; a copy is passed on.
            in_tuple: Whether the layer returns them as the first entry of a tuple.

        Raises:
            ArgumentError: It does not return hidden states as it was given them.
        """
        x = x.clone()
        with torch.no_grad():
            y = self._run_pre(x) if self.is_pre else self._run_behind(x, in_tuple)
        if not isinstance(y, Tensor) or y.shape != x.shape:
            raise ArgumentError(f"it does not return hidden states {list(x.shape)}")
        return y

    def _run_pre(self, x: Tensor) -> Any:
        with_kwargs = self.key in self.module._forward_pre_hooks_with_kwargs
        result = self.function(self.module, (x,), *(({},) if with_kwargs else ()))
        if with_kwargs and result is not None:
            result = result[0]
        if result is None:
            return x
        return result[0] if isinstance(result, tuple) else result

    def _run_behind(self, x: Tensor, in_tuple: bool) -> Any:
        with_kwargs = self.key in self.module._forward_hooks_with_kwargs
        # A ghost has only the layer's output to go by: the input it is shown is another.
        inputs: tuple[Any, ...] = ((torch.ones_like(x),), *(({},) if with_kwargs else ()))
        rest = object()
        output: Any = (x, rest) if in_tuple else x
        result = self.function(self.module, *inputs, output)
        result = output if result is None else result
        if not in_tuple:
            return result
        if not isinstance(result, tuple | list) or len(result) != 2 or result[1] is not rest:
            raise ArgumentError("it does not return the rest of the layer's tuple")
        return result[0]


def hooks_of(name: str, module: nn.Module, is_pre: bool) -> list[Hook]:
    """Return the forward hooks or pre-hooks of a module, in the order they run."""
    table = module._forward_pre_hooks if is_pre else module._forward_hooks
    return [Hook(name, module, key, is_pre) for key in table]


def matrices_of(hook: Hook, size: int) -> list[Tensor]:
    """Return the floating-point matrices [size, size] that a hook can reach.

    Args:
        hook: The hook; it is not run.
        size: Width d of the hidden state.
    """
    return list(_Search(hook.module, size).look(hook.function))


class _Search:
    """A walk through what a hook holds that meets every object once."""

    def __init__(self, module: nn.Module, size: int) -> None:
        self.module, self.size = module, size
        self.seen: set[int] = set()

    def look(self, value: Any, depth: int = 0) -> Iterator[Tensor]:
        """Yield the matrices in an object, and in what it holds."""
        if depth > _DEEPEST or id(value) in self.seen:
            return
        self.seen.add(id(value))
        if not isinstance(value, Tensor):
            for part in islice(self._parts(value), _MOST_PARTS):
                yield from self.look(part, depth + 1)
        elif value.shape == (self.size, self.size) and value.is_floating_point():
            yield from () if value.is_meta else (value,)

    def _parts(self, value: Any) -> Iterable[Any]:
        if isinstance(value, nn.Module):
            return self._of_module(value)
        if isinstance(value, list | tuple):
            return value
        if isinstance(value, dict):
            return value.values()
        if isinstance(value, functools.partial):
            return value.func, *value.args, *value.keywords.values()
        if isinstance(value, MethodType):
            return value.__self__, value.__func__
        if isinstance(value, FunctionType):
            return self._of_function(value)
        if isinstance(value, type | ModuleType):
            return ()
        # Any other object: what it keeps, and what runs when it is called.
        called = inspect.getattr_static(type(value), "__call__", None)
        return *getattr(value, "__dict__", {}).values(), called

    def _of_module(self, module: nn.Module) -> Iterator[Any]:
        if operator := operator_in(module, self.size):
            yield from operator
            return
        yield from (*module._parameters.values(), *module._buffers.values())
        for child in module._modules.values():
            if isinstance(child, _CONTAINERS):
                yield child
            elif child is not None:
                yield from operator_in(child, self.size)

    def _of_function(self, function: FunctionType) -> Iterator[Any]:
        for cell in function.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # not filled yet
                continue
        yield from function.__defaults__ or ()
        yield from (function.__kwdefaults__ or {}).values()
        module: Any = self.module
        places = (module._modules, module._parameters, module._buffers, vars(module))
        for name in _names_in(function.__code__):
            for place in (*places, function.__globals__):
                if name in place:
                    yield place[name]


def operator_in(module: nn.Module, size: int) -> tuple[Tensor, ...]:
    """Return the matrix [size, size] of a module that is an operator: it has one, and little more.

    Args:
        module: Any module.
        size: Width d of the hidden state.

    Returns:
        The matrix, alone, or nothing.
    """
    tensors = []
    for tensor in (*module.parameters(), *module.buffers()):
        tensors.append(tensor)
        if len(tensors) > _MOST_TENSORS:
            return ()
    square = [tensor for tensor in tensors if tensor.shape == (size, size)]
    return (square[0],) if len(square) == 1 else ()


def _names_in(code: CodeType) -> set[str]:
    """Return the names and texts in a function's code, and in the functions it makes."""
    names = {*code.co_names}
    for constant in code.co_consts:
        if isinstance(constant, str):
            names.add(constant)
        elif isinstance(constant, CodeType):
            names |= _names_in(constant)
    return names


@dataclass(frozen=True)
class _Answers:
    """What a hook answered: pairs of x and y, and y where x is zero."""

    pairs: list[tuple[Tensor, Tensor]]
    bias: Tensor

    @property
    def tolerance(self) -> float:
        dtypes = {tensor.dtype for pair in self.pairs for tensor in pair}
        return max(_TOLERANCES.get(dtype, _FP32_TOLERANCE) for dtype in dtypes)


class Proof(NamedTuple):
    """What a hook computes.

    Attributes:
        hook: The hook.
        map: The map.
        matrix: The matrix it is made of, as the hook holds it.
    """

    hook: Hook
    map: Affine
    matrix: Tensor


def prove(
    hook: Hook, matrices: list[Tensor], dtype: torch.dtype, device: torch.device
) -> Proof | None:
    """Return the map that a hook computes, shown by running it.

    The hook is run on random hidden states of the model's dtype and, where it takes them, of fp32,
    which tell the readings apart better. The bias is what it makes of zero.

    Args:
        hook: The hook.
        matrices: What `matrices_of` found, at least one.
        dtype: Dtype of the model's hidden states.
        device: Where the hooked layer runs.

    Returns:
        What it computes; None for a hook that leaves hidden states as they are.

    Raises:
        ArgumentError: The hook changes hidden states in another way.
    """
    size = matrices[0].shape[0]
    own = _answers(hook, size, dtype, device)
    if isinstance(own, str):
        raise _refusal(hook, own, matrices)
    if all(torch.equal(x, y) for x, y in own.pairs):
        return None
    if not all(torch.isfinite(y).all() for y in (own.bias, *(y for _, y in own.pairs))):
        raise _refusal(hook, "it returns NaN or infinity", matrices)
    wide = own if dtype == torch.float32 else _answers(hook, size, torch.float32, device)
    judged = own if isinstance(wide, str) else wide
    choices = [(matrix, reading) for matrix in matrices for reading in READINGS]
    errors = [_error(judged, *choice) for choice in choices]
    matrix, reading = choices[min(range(len(errors)), key=errors.__getitem__)]
    error = _error(own, matrix, reading)
    if not error <= own.tolerance:
        name = str(dtype).removeprefix("torch.")
        raise _refusal(
            hook,
            f"the nearest, {reading}, differs by {error:.1e} in {name} (at most "
            f"{own.tolerance:.0e})",
            matrices,
        )
    bias = judged.bias if judged.bias.any() else None
    return Proof(hook, Affine.read(matrix, reading, bias), matrix)


def _answers(hook: Hook, size: int, dtype: torch.dtype, device: torch.device) -> _Answers | str:
    """Return a hook's answers, or why it gives none."""
    generator = torch.Generator().manual_seed(0)
    states = [scale * torch.randn(*rows, size, generator=generator) for rows, scale in _PROBES]
    inputs = [state.to(device, dtype) for state in states]
    why = ""
    for in_tuple in (False,) if hook.is_pre else (False, True):
        try:
            pairs = [(x, hook.run(x, in_tuple)) for x in inputs]
            bias = hook.run(torch.zeros_like(inputs[0]), in_tuple)[0, 0]
        except ArgumentError as error:
            why = str(error)
        except Exception as error:  # somebody else's code may raise anything
            why = why or f"it raised {type(error).__name__}: {error}"
        else:
            return _Answers(pairs, bias)
    return why


def _error(answers: _Answers, matrix: Tensor, reading: Any) -> float:
    """Return the largest relative error of a reading; infinite if it is not a number."""
    largest = 0.0
    for x, y in answers.pairs:
        expected = reading.predict(x, matrix.to(x.device), answers.bias)
        error = ((y.double() - expected).norm() / expected.norm()).item()
        largest = max(largest, error) if error == error else float("inf")
    return largest


def _refusal(hook: Hook, why: str, matrices: list[Tensor]) -> ArgumentError:
    held = "a matrix" if len(matrices) == 1 else f"{len(matrices)} matrices"
    size = matrices[0].shape[0]
    return ArgumentError(
        f"expected {hook} to compute W x + b or x + M x + b of the hidden state alone, with W or M "
        f"(or its transpose) among what it holds ({held} [{size}, {size}]): {why}. Remove the hook "
        "and give its matrix to import_ghosts, or name the ghosts to swap with match="
    )
