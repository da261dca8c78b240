"""What a hook can reach without being run: the matrices in what it holds and in what it names.

That is its closure, the object it is bound to or is, its arguments and defaults, and the globals
and the attributes of the hooked module whose names its code mentions.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator
from itertools import islice
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

_DEEPEST, _MOST_PARTS = 6, 4096
# A module with more tensors than a matrix, a bias and a scale is no operator.
_MOST_TENSORS = 3
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.ParameterList, nn.ParameterDict)


def matrices_of(function: Any, module: nn.Module, size: int) -> list[Tensor]:
    """Return the floating-point matrices [size, size] that a hook can reach.

    Args:
        function: The hook, anything that can be called; it is not run.
        module: The module that it is registered on, which it is handed when it runs.
        size: Width d of the hidden state.
    """
    return list(_Search(module, size).look(function))


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
        names, texts = _names_in(function.__code__)
        yield from (function.__globals__[name] for name in names if name in function.__globals__)
        module: Any = self.module
        for place in (module._modules, module._parameters, module._buffers, vars(module)):
            for name, value in place.items():
                if name in names or name.startswith(texts):  # getattr(module, f"ghost_{i}")
                    yield value


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


def _names_in(code: CodeType) -> tuple[set[str], tuple[str, ...]]:
    """Return the names in a function's code and in the functions it makes, and the longer texts."""
    names = {*code.co_names}
    texts = {text for text in code.co_consts if isinstance(text, str) and len(text) > 2}
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inner_names, inner_texts = _names_in(constant)
            names |= inner_names
            texts.update(inner_texts)
    return names, tuple(texts)
