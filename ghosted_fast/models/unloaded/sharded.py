"""Weights of decoder layers that are shared out: each rank keeps its part of every matrix.

Before a layer runs, forward or backward, its matrices are gathered; behind it their memory is given
back. So beside its part of all, a rank holds one layer at a time. Models that share memory
(`share_copy`) share the parts. Embeddings, the head, norms, biases and ghosts stay whole on every
rank.

Every layer of a pass is an exchange: all ranks must run as many passes, through the same layers in
the same order.

Source: Rajbhandari et al., "ZeRO", arXiv 1910.02054, stage 3; Zhao et al., "PyTorch FSDP", arXiv
2304.11277.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ghosted_fast import distributed
from ghosted_fast.errors import ArgumentError, UnsupportedModelError
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.models.quantized.loading import quantization_of

T = TypeVar("T")


class _Matrix:
    """One matrix in memory, which parameters of one model or several have as their value.

    Args:
        users: These parameters. They are given memory that can come and go.

    Attributes:
        users: As given.
        part: The bytes that this rank keeps.
    """

    def __init__(self, users: list[nn.Parameter]) -> None:
        self.users = users
        given = users[0].detach()
        own = torch.empty_like(given).copy_(given)
        for user in users:
            user.data = own
        self._device, self._nbytes = own.device, own.nbytes
        self._storage = own.untyped_storage()
        size = -(-own.nbytes // distributed.count())
        self._reach = size * distributed.count()
        start = size * distributed.index()
        self.part = self.grown()[start : start + size].clone()
        self.shrink()

    @property
    def is_whole(self) -> bool:
        """Whether all its bytes have memory."""
        return self._storage.nbytes() > 0

    @property
    def address(self) -> int:
        """Where they are."""
        return self._storage.data_ptr()

    def grown(self) -> Tensor:
        """Return its memory as bytes, with room for the parts of all ranks."""
        self._storage.resize_(self._reach)
        flat = torch.empty(0, dtype=torch.uint8, device=self._device)
        return flat.set_(self._storage, 0, (self._reach,), (1,))

    def shrink(self) -> None:
        """Give its memory back."""
        self._storage.resize_(0)

    def trim(self) -> None:
        """Give the room beyond its own bytes back."""
        self._storage.resize_(self._nbytes)


class _Saved(NamedTuple):
    """What autograd keeps of a matrix, and all that were whole beside it."""

    tensor: Tensor
    beside: list[_Matrix]


class _Shards:
    """The matrices of models.

    Args:
        models: Models that run on all ranks alike.
    """

    def __init__(self, models: Iterable[Any]) -> None:
        self._of: dict[int, _Matrix] = {}  # by the parameter's id
        self._whole: list[_Matrix] = []
        self._running = ExitStack()
        self._handles: list[Any] = []
        places: dict[tuple[Any, ...], list[nn.Parameter]] = {}
        for model in models:
            decoder = Decoder.of(model)
            for parameter in _matrices_of(decoder):
                place = parameter.data_ptr(), parameter.shape, parameter.stride()
                places.setdefault(place, []).append(parameter)
            for layer in decoder.layers:
                self._handles += [
                    layer.register_forward_pre_hook(self._before, prepend=True),
                    layer.register_forward_hook(self._behind, always_call=True),
                ]
        for users in places.values():
            self._take(users)

    def _take(self, users: list[nn.Parameter]) -> None:
        self._of |= dict.fromkeys(map(id, users), _Matrix(users))

    def _before(self, layer: nn.Module, _: Any) -> None:
        self._have(self._among(layer.parameters()))
        self._running.enter_context(saved_tensors_hooks(self._packed, self._unpacked))

    def _behind(self, *_: Any) -> None:
        self._running.close()
        self._have([])

    def _packed(self, tensor: Tensor) -> Tensor | _Saved:
        address = tensor.untyped_storage().data_ptr()
        is_here = any(matrix.address == address for matrix in self._whole)
        return _Saved(tensor, self._whole) if is_here else tensor

    def _unpacked(self, saved: Tensor | _Saved) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        if saved.beside is not self._whole:
            self._have(saved.beside)
        return saved.tensor

    def _among(self, parameters: Iterable[nn.Parameter]) -> list[_Matrix]:
        found = (self._of.get(id(parameter)) for parameter in parameters)
        return list(dict.fromkeys(matrix for matrix in found if matrix is not None))

    def _have(self, matrices: list[_Matrix]) -> None:
        """Have some matrices whole, and no others."""
        for matrix in self._whole:
            if matrix not in matrices:
                matrix.shrink()
        self._whole = matrices
        absent = [matrix for matrix in matrices if not matrix.is_whole]
        distributed.gather_parts([item.part for item in absent], [item.grown() for item in absent])

    @contextmanager
    def replacing(self, module: nn.Module) -> Iterator[None]:
        """Have the matrices of a module whole; those that take their places are shared out."""
        before = dict(module._parameters)
        self._have(self._among(module.parameters(recurse=False)))
        yield
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter is not before[name]:
                self._take([parameter])
        self._have([])

    @contextmanager
    def whole_on_first(self, model: nn.Module) -> Iterator[None]:
        """Have the matrices of a model whole on rank 0; the other ranks help, one by one."""
        kept = []
        for matrix in self._among(model.parameters()):
            self._have([matrix])
            if distributed.is_first():
                kept.append(matrix)
                self._whole = []
        self._have([])
        try:
            yield
        finally:
            for matrix in kept:
                matrix.shrink()

    def end(self) -> None:
        """Have all matrices whole for good."""
        for matrix in dict.fromkeys(self._of.values()):
            self._have([matrix])
            matrix.trim()
            self._whole = []
        for handle in self._handles:
            handle.remove()


# Of models that are sharded.
_SHARDS: WeakKeyDictionary[nn.Module, _Shards] = WeakKeyDictionary()


def shard_weights(*models: Any) -> None:
    """Share the matrices of the decoder layers of models out among the ranks, in place.

    The models can run then, on all ranks together, with gradients or without, be saved
    (`save_model`, on all ranks together) and be made whole again (`unshard_weights`); their weights
    cannot be read otherwise. In one process nothing is done.

    Args:
        models: Models that are the same on all ranks. What they share stays shared.

    Raises:
        ArgumentError, UnsupportedModelError: See `check_plain` and `check_shardable`.
    """
    for model in models:
        check_plain(model)
        check_shardable(model)
    if distributed.count() > 1:
        shards = _Shards(models)
        _SHARDS.update(dict.fromkeys(models, shards))


def unshard_weights(model: Any) -> None:
    """Make a model that was sharded whole again on every rank, and those that it was sharded with.

    All ranks call it together. One that is whole stays as it is.
    """
    shards = _SHARDS.get(model)
    if shards is None:
        return
    shards.end()
    for other in [item for item, of in _SHARDS.items() if of is shards]:
        del _SHARDS[other]


def is_sharded(model: Any) -> bool:
    """Return whether the ranks share out the weights of a model."""
    return model in _SHARDS


def turns_of(model: Any, items: Sequence[T]) -> Iterator[tuple[T, bool]]:
    """Yield what this rank runs a model on, and whether each counts.

    Args:
        model: A model, which all ranks run together if it is sharded.
        items: The same on all ranks; each counts on one of them.
    """
    if is_sharded(model):
        return distributed.my_turns(items)
    return ((item, True) for item in distributed.my_share(items))


def whole_on_first(model: Any) -> AbstractContextManager[None]:
    """Return a context in which rank 0 has a model whole; all ranks enter it together."""
    shards = _SHARDS.get(model)
    return nullcontext() if shards is None else shards.whole_on_first(model)


def replacing(model: Any, module: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which the weights of a module of a model are whole, to be replaced.

    The parameters that take their places are shared out as they were.
    """
    shards = _SHARDS.get(model)
    return nullcontext() if shards is None else shards.replacing(module)


def check_plain(model: Any) -> None:
    """Raise if the weights of a model are spread over processes.

    Raises:
        ArgumentError: By `shard_weights`.
        UnsupportedModelError: By torch: FSDP, or tensor parallel.
    """
    if is_sharded(model):
        raise ArgumentError(
            "expected a model with whole weights, got one that the ranks share out: make it whole "
            "first (ghosted_fast.unshard_weights)"
        )
    spread = (name for name, item in model.named_parameters() if type(item).__name__ == "DTensor")
    if name := next(spread, None):
        raise UnsupportedModelError(
            f"expected whole weights on every rank, got a DTensor in {name}, as fully_shard and "
            "tensor parallel make them: give the model as it was before, and let heal share its "
            "weights out (shard=True, --shard)"
        )


def check_shardable(model: Any) -> None:
    """Raise unless the ranks can share the weights of a model out.

    Raises:
        UnsupportedModelError: They are quantized.
    """
    kind = quantization_of(model.config)
    if kind is not None:
        raise UnsupportedModelError(
            f"expected plain weights for the ranks to share out, got weights quantized by {kind}: "
            "leave shard=True (--shard) away; they take a part of the memory already"
        )


def _matrices_of(decoder: Decoder) -> list[nn.Parameter]:
    """Return the matrices of decoder layers that nothing else uses, but for those of ghosts."""
    inside = [module for layer in decoder.layers for module in layer.modules()]
    within = set(inside)
    whole = [item for item in inside if isinstance(item, GhostLinear)]
    whole += [item for item in decoder.model.modules() if item not in within]
    kept = {id(item) for module in whole for item in module.parameters(recurse=False)}
    return [
        item
        for module in inside
        for item in module.parameters(recurse=False)
        if item.dim() > 1 and item.numel() and id(item) not in kept
    ]
