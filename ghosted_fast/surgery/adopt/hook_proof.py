"""Ghosts in other people's forward hooks: proof of what a hook computes.

A hook is a function that nobody can read. What it can reach is known (`hook_search`); one that
reaches no matrix [d, d] is never run. Any other is run on random hidden states, and taken for a
ghost only if its answers are those of one of the matrices, in one of the four readings, within the
hook's own rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ghosted_fast.errors import ArgumentError
from ghosted_fast.surgery.adopt.readings import READINGS, Affine, Reading

# A hook rounds more than once: about four times the relative rms of rounding to its coarsest dtype.
_TOLERANCES = {torch.float16: 1e-3, torch.bfloat16: 6e-3}
_FP32_TOLERANCE = 1e-5
# Rows and magnitudes of the hidden states that hooks are tried on: a prompt, one token, a batch.
_PROBES = (((2, 3), 1.0), ((1, 1), 30.0), ((1, 16), 0.03))


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
        matrix: The matrix [d, d] that it holds.
        reading: What it does with it.
        bias: What it adds, [d], or None.
    """

    hook: Hook
    matrix: Tensor
    reading: Reading
    bias: Tensor | None

    def affine(self) -> Affine:
        """Return the map."""
        return Affine.read(self.matrix, self.reading, self.bias)


def prove(
    hook: Hook, matrices: list[Tensor], dtype: torch.dtype, device: torch.device
) -> Proof | None:
    """Return the map that a hook computes, shown by running it.

    The hook is run on random hidden states of the model's dtype. The bias is what it makes of zero.

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
    if device.type == "meta":
        raise _refusal(hook, "the layer's weights are not loaded", matrices)
    answers = _answers(hook, size, dtype, device)
    if isinstance(answers, str):
        raise _refusal(hook, answers, matrices)
    if all(x.dtype == y.dtype and torch.equal(x, y) for x, y in answers.pairs):
        return None
    if not all(torch.isfinite(y).all() for y in (answers.bias, *(y for _, y in answers.pairs))):
        raise _refusal(hook, "it returns NaN or infinity", matrices)
    errors = [
        (error, index, reading)
        for index, matrix in enumerate(matrices)
        for reading, error in _errors(answers, matrix).items()
    ]
    error, index, reading = min(errors, key=lambda item: item[0])
    if not error <= answers.tolerance:
        name = str(dtype).removeprefix("torch.")
        raise _refusal(
            hook,
            f"the nearest, {reading}, differs by {error:.1e} in {name} (at most "
            f"{answers.tolerance:.0e})",
            matrices,
        )
    return Proof(hook, matrices[index], reading, answers.bias if answers.bias.any() else None)


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


def _errors(answers: _Answers, matrix: Tensor) -> dict[Reading, float]:
    """Return the largest relative error of each reading; infinite if it is not a number."""
    wide = matrix.detach().to(answers.bias.device, torch.float64)
    largest = dict.fromkeys(READINGS, 0.0)
    for reading in READINGS:
        for x, y in answers.pairs:
            expected = reading.predict(x, wide, answers.bias)
            error = ((y.double() - expected).norm() / expected.norm()).item()
            largest[reading] = max(largest[reading], math.inf if math.isnan(error) else error)
    return largest


def _refusal(hook: Hook, why: str, matrices: list[Tensor]) -> ArgumentError:
    held = "a matrix" if len(matrices) == 1 else f"{len(matrices)} matrices"
    size = matrices[0].shape[0]
    return ArgumentError(
        f"expected {hook} to compute W x + b or x + M x + b of the hidden state alone, with W or M "
        f"(or its transpose) among what it holds ({held} [{size}, {size}]): {why}. Remove the hook "
        "and give its matrix to import_ghosts, or name the ghosts to swap with match="
    )
