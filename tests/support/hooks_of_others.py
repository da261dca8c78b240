"""Hooks that apply an operator, in every way in which others write and register them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ghosted_fast.testing import random_tokens

SIZE = 32
GLOBAL: dict[str, Tensor] = {}


def operator(seed: int = 0, size: float = 0.3) -> Tensor:
    """Return W = I + M [d, d] in fp32; |M x| is about `size` times |x|."""
    generator = torch.Generator().manual_seed(seed)
    return torch.eye(SIZE) + size * torch.randn(SIZE, SIZE, generator=generator) / SIZE**0.5


@torch.no_grad()
def logits(model: Any) -> Tensor:
    output: Tensor = model(random_tokens(2, 7), use_cache=False).logits
    return output


class Published(nn.Module):
    """An operator as rows have it: x @ W in fp32, back in the dtype of x."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x.to(torch.float32), self.weight).to(x.dtype)


class Called:
    """An object that is a hook."""

    def __init__(self, weight: Tensor) -> None:
        self.held = {"weights": [None, weight]}

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return (output.float() @ self.held["weights"][1].T).to(output.dtype)


class Owner:
    """An object with a method that is a hook, and with much else."""

    def __init__(self, weight: Tensor) -> None:
        self.ghosts, self.name, self.module = {3: weight}, "owner", nn.Linear(8, 8)

    def behind(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return (output.float() @ self.ghosts[3].T).to(output.dtype)

    def inner(self) -> Any:
        return lambda module, inputs, output: self.behind(module, inputs, output)


class HookModule(nn.Module):
    """A module that is a hook."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.gain = nn.Parameter(torch.ones(3))

    def forward(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return (output.float() @ self.weight.T).to(output.dtype)


def with_weight(module: nn.Module, inputs: Any, output: Tensor, weight: Tensor) -> Tensor:
    return (output.float() @ weight.T).to(output.dtype)


def from_globals(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return (output.float() @ GLOBAL["W"].T).to(output.dtype)


def published(layer: nn.Module, weight: Tensor) -> None:
    """Hook a layer as the published code does: the operator is a child of the layer."""
    layer.ghosted_layer = Published(weight.T.contiguous())

    def hook(module: Any, inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (module.ghosted_layer(output[0]), *output[1:])
        return module.ghosted_layer(output)

    layer.register_forward_hook(hook)


def closure(layer: nn.Module, weight: Tensor) -> None:
    def make(inner: Tensor) -> Callable[..., Tensor]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            return (output.float() @ inner.T).to(output.dtype)

        return hook

    layer.register_forward_hook(make(weight))


def wrapped(layer: nn.Module, weight: Tensor) -> None:
    @functools.wraps(with_weight)
    def hook(*arguments: Any) -> Tensor:
        return with_weight(*arguments, weight)

    layer.register_forward_hook(hook)


def delta(layer: nn.Module, weight: Tensor) -> None:
    change = weight - torch.eye(SIZE)

    def hook(module: nn.Module, inputs: Any, output: Tensor, change: Tensor = change) -> Tensor:
        return (output.float() + output.float() @ change.T).to(output.dtype)

    layer.register_forward_hook(hook)


def delta_of_rows(layer: nn.Module, weight: Tensor) -> None:
    change = weight.double().T - torch.eye(SIZE)
    layer.register_forward_hook(lambda _, __, y: (y + y.double() @ change).to(y.dtype))


def in_place(layer: nn.Module, weight: Tensor) -> None:
    change = weight - torch.eye(SIZE)

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        output.add_((output.float() @ change.T).to(output.dtype))

    layer.register_forward_hook(hook)


def with_kwargs(layer: nn.Module, weight: Tensor) -> None:
    def hook(module: Any, args: Any, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        return (output.float() @ weight.T).to(output.dtype)

    layer.register_forward_hook(hook, with_kwargs=True)


def partial(layer: nn.Module, weight: Tensor) -> None:
    layer.register_forward_hook(functools.partial(with_weight, weight=weight))


def global_name(layer: nn.Module, weight: Tensor) -> None:
    GLOBAL["W"] = weight
    layer.register_forward_hook(from_globals)


def by_number(layer: nn.Module, weight: Tensor) -> None:
    layer.register_buffer("patch_3", weight)
    layer.register_forward_hook(
        lambda module, _, y: (y.float() @ getattr(module, f"patch_{1 + 2}").T).to(y.dtype)
    )


HOOKS: list[Callable[[nn.Module, Tensor], Any]] = [
    published,
    closure,
    wrapped,
    delta,
    delta_of_rows,
    in_place,
    with_kwargs,
    partial,
    global_name,
    by_number,
    lambda layer, weight: layer.register_forward_hook(Called(weight)),
    lambda layer, weight: layer.register_forward_hook(Owner(weight).behind),
    lambda layer, weight: layer.register_forward_hook(Owner(weight).inner()),
    lambda layer, weight: layer.register_forward_hook(HookModule(weight)),
]
NAMES = [getattr(hook, "__name__", "") for hook in HOOKS]
NAMES[-4:] = ["object", "method", "held object", "module"]
