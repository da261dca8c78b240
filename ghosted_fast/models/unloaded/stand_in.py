"""Random weights that are lent to a model on meta for as long as each of its modules computes.

What a cut would break shows with any weights, so the proofs of a cut (`Decoder.contract`,
`check_removable`) need not read those of the model, and never hold more than one layer's.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ghosted_fast.models.checked.usable import STAND_IN
from ghosted_fast.models.families import decoder_layers, decoder_of
from ghosted_fast.models.unloaded.opening import replace_tensors, tensors_on_meta

_BLOCK = 1_000_003  # no multiple of any row's length, so that rows differ
# Rows of an embedding or a head that a proof on a few tokens can do with.
_ROWS = 4096


@contextmanager
def stand_ins(model: Any) -> Iterator[None]:
    """Let a model on meta run, and copies of it that are made meanwhile.

    Each decoder layer is lent random ones when it is called, and they are taken back when the next
    one is. Other modules with weights of their own have theirs while they compute, those in the
    decoder all the time, embeddings and the head a few rows. They depend on the name that the
    module had in this model, so a copy whose layers are numbered anew computes with the same ones.

    Args:
        model: The model.
    """
    layers = list(decoder_layers(model))
    head, beside = model.get_output_embeddings(), set(decoder_of(model).modules())
    inside = {module for layer in layers for module in layer.modules()}
    lender = _Lender(head)
    with ExitStack() as stack:
        for name, module in model.named_modules():
            is_layer = module in layers
            if not is_layer and (module in inside or not _has_own(module)):
                continue
            vars(module)[STAND_IN] = name
            stack.callback(vars(module).pop, STAND_IN)
            if not is_layer and (module is head or module in beside):
                # For the whole time: models ask on which device these are, and some are cut too.
                lender.lend_beside(module)
                stack.callback(lender.take_back, module)
                continue
            lend = lender.lend if is_layer else lender.lend_own
            handles = [module.register_forward_pre_hook(lend)]
            if not is_layer:
                handles.append(module.register_forward_hook(lender.take_back, always_call=True))
            for handle in handles:
                stack.callback(handle.remove)
        stack.callback(lender.take_layer_back)
        yield


@functools.cache
def _random_block() -> Tensor:
    return torch.randn(_BLOCK, generator=torch.Generator().manual_seed(0))


class _Lender:
    """Lends and takes back. Its copies, in copies of the model, lend the same."""

    def __init__(self, head: nn.Module | None) -> None:
        self._head = head
        self._layer: nn.Module | None = None
        self._block = _random_block()
        self._lent: dict[nn.Module, dict[tuple[nn.Module, str], Tensor]] = {}
        self._padding: dict[nn.Module, int] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> _Lender:
        return self

    def lend(self, module: nn.Module, _: Any) -> None:
        """Lend weights to a layer, in the place of the last one."""
        if self._layer is not module:
            self.take_layer_back()
            self._layer = module
            self._lend(module, tensors_on_meta(module), None)

    def take_layer_back(self) -> None:
        """Leave the layer that has weights without memory again."""
        if self._layer is not None:
            self.take_back(self._layer)
        self._layer = None

    def lend_own(self, module: nn.Module, _: Any) -> None:
        """Lend weights to a module, not to those in it."""
        self._lend(module, _own(module), None)

    def lend_beside(self, module: Any) -> None:
        """Lend weights to a module, the first rows alone where it is an embedding or a head."""
        if (getattr(module, "padding_idx", None) or 0) >= _ROWS:
            self._padding[module] = module.padding_idx
            module.padding_idx = None
        many = isinstance(module, nn.Embedding) or module is self._head
        self._lend(module, _own(module), _ROWS if many else None)

    def take_back(self, module: Any, *_: Any) -> None:
        """Leave a module without memory again."""
        if module in self._padding:
            module.padding_idx = self._padding.pop(module)
        replace_tensors(module, self._lent.pop(module, {}))

    def _lend(
        self, unit: nn.Module, wanted: dict[tuple[nn.Module, str], Tensor], rows: int | None
    ) -> None:
        paths = {module: path for path, module in unit.named_modules()}
        made = {}
        for (module, name), tensor in wanted.items():
            shape = list(tensor.shape)
            if rows is not None and shape:
                shape[0] = min(shape[0], rows)
            value = self._values(f"{vars(unit)[STAND_IN]}.{paths[module]}.{name}", shape, tensor)
            made[module, name] = value
        self._lent[unit] = wanted
        replace_tensors(unit, made)

    def _values(self, name: str, shape: list[int], like: Tensor) -> Tensor:
        found = torch.zeros(shape, dtype=like.dtype)
        if like.is_floating_point():
            digest = hashlib.blake2b(name.encode(), digest_size=4).digest()
            start, flat, done = int.from_bytes(digest, "little") % _BLOCK, found.view(-1), 0
            while done < len(flat):
                part = self._block[start : start + len(flat) - done]
                flat[done : done + len(part)].copy_(part)
                start, done = 0, done + len(part)
            if len(shape) > 1:
                found.div_(shape[-1] ** 0.5)
            else:
                found.mul_(0.1).add_(0.0 if name.endswith("bias") else 1.0)
        if isinstance(like, nn.Parameter):
            return nn.Parameter(found, requires_grad=False)
        return found


def _own(module: nn.Module) -> dict[tuple[nn.Module, str], Tensor]:
    return {pair: item for pair, item in tensors_on_meta(module).items() if pair[0] is module}


def _has_own(module: nn.Module) -> bool:
    return any(pair[0] is module for pair in tensors_on_meta(module))
