"""What healing trains: low-rank factors of linear maps or all of them, and ghosts; and how it ends.

A map W gets factors B [out, rank] and A [rank, in]: its output becomes W x + B (A x). The weights
that a pruned model shares with the dense one are never written; folded, a map has a weight of its
own, W + B A, rounded once. A ghost is trained whole, and so are the maps if asked for; where all
shall stay apart from the model, a ghost has factors of its own.

Source: Hu et al., "LoRA", arXiv 2106.09685.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ghosted_fast.errors import UnsupportedModelError
from ghosted_fast.models.families import decoder_layers, hidden_size
from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.models.unloaded.sharded import replacing
from ghosted_fast.options import Rank

# Up to this width of a model its matrices take the whole learning rate.
_WIDTH = 576
_FOLDABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class MapFactors:
    """The factors of one linear map.

    Args:
        name: The map's name in the model.
        module: An `nn.Linear`, or what computes as one (a `Conv1D` of transformers has its weight
            transposed).
        rank: Columns of B and rows of A.
        generator: Of A, whose entries are normal with variance 1 / in; B is zero.
    """

    def __init__(self, name: str, module: nn.Module, rank: int, generator: torch.Generator) -> None:
        self.name, self.module = name, module
        self.is_transposed = not isinstance(module, nn.Linear)
        weight: Any = module.weight
        self.b, self.a = _drawn(*_sizes(module), rank, weight.device, generator)

    def added(self, x: Tensor) -> Tensor:
        """Return B (A x), in the dtype of x [..., in]."""
        return functional.linear(functional.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))

    @torch.no_grad()
    def fold(self) -> None:
        """Give the map a weight of its own that holds the factors' product, rounded once."""
        weight: Any = self.module.weight
        change = self.b.double() @ self.a.double()
        whole = weight.double() + (change.mT if self.is_transposed else change)
        self.module.weight = nn.Parameter(
            whole.to(weight.dtype), requires_grad=weight.requires_grad
        )


class GhostFactors:
    """The factors of a ghost's weight.

    Args:
        name: The ghost's name in the model.
        ghost: A floating-point ghost.
        rank: Columns of B and rows of A.
        generator: As in `MapFactors`.
    """

    is_transposed = False

    def __init__(
        self, name: str, ghost: GhostLinear, rank: int, generator: torch.Generator
    ) -> None:
        self.name, self.module = name, ghost
        size = ghost.hidden_size
        self.b, self.a = _drawn(size, size, rank, ghost.weight.device, generator)

    def weight(self) -> Tensor:
        """Return M + B A, rounded to the ghost's dtype; autograd reaches the factors."""
        own = self.module.weight.detach()
        return cast(Tensor, _rounded(own.float() + self.b @ self.a, own.dtype))


def _drawn(
    rows: int, columns: int, rank: int, device: torch.device, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return B [rows, rank], zero, and A [rank, columns], drawn; fp32."""
    drawn = torch.randn(rank, columns, generator=generator) / math.sqrt(columns)
    b = torch.zeros(rows, rank, device=device)
    return b.requires_grad_(), drawn.to(device).requires_grad_()


def _sizes(module: Any) -> tuple[int, int]:
    """Return the sizes of a linear map's output and input."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    columns, rows = module.weight.shape
    return rows, columns


class Trained:
    """All that is trained of a model: factors of its maps, and its ghosts.

    Args:
        model: The model with ghosts or without.
        rank: Rank of the factors of the linear maps in its decoder layers; 0 for none, so that the
            ghosts alone are trained; "full" for whole weights in the place of factors.
        seed: Of the factors.
        apart: Whether ghosts get factors too, so that none of the model's parameters is trained.

    Attributes:
        apart: As given.
        factors: Of each map, in the order of the model's modules.
        num_maps: Linear maps that are trained, by factors or whole.
        ghosts: The floating-point ghosts.
        ghost_factors: Of each ghost where all stays apart, else empty.

    Raises:
        UnsupportedModelError: There is nothing to train.
    """

    def __init__(self, model: nn.Module, rank: Rank, seed: int, apart: bool = False) -> None:
        self.apart, self._model = apart, model
        generator = torch.Generator().manual_seed(seed)
        found = _linear_maps(model) if rank else []
        self.num_maps = len(found)
        named = [
            (name, module)
            for name, module in model.named_modules()
            if isinstance(module, GhostLinear) and module.quantization is None
        ]
        self.ghosts = [ghost for _, ghost in named]
        self.factors: list[MapFactors] = []
        self.ghost_factors: list[GhostFactors] = []
        # Of modules, the parameters that are trained whole.
        self._whole: list[tuple[nn.Module, str]] = []
        if rank == "full":
            self._whole = [(module, "weight") for _, module in found]
        else:
            self.factors = [MapFactors(name, item, rank, generator) for name, item in found]
            if apart:
                self.ghost_factors = [
                    GhostFactors(name, ghost, rank, generator) for name, ghost in named
                ]
        if not apart:
            self._whole += [(ghost, name) for ghost in self.ghosts for name in _names(ghost)]
        if not found and not self.ghosts:
            raise UnsupportedModelError(
                "expected a model with ghosts or with linear maps in its decoder layers, got one "
                "with neither: there is nothing that healing could train"
            )
        # The parameters themselves round at every use; steps are taken on these.
        self._masters = [
            module.get_parameter(name).detach().to(torch.float32, copy=True).requires_grad_()
            for module, name in self._whole
        ]

    @property
    def parameters(self) -> list[Tensor]:
        """What steps are taken on, fp32: B and A of each map, weight and bias of each ghost.

        Apart, B and A of each ghost in the place of its weight and bias; with rank "full" the
        weight of each map in the place of B and A.
        """
        factors: list[MapFactors | GhostFactors] = [*self.factors, *self.ghost_factors]
        return [part for item in factors for part in (item.b, item.a)] + self._masters

    @property
    def rate_shares(self) -> list[float]:
        """Which share of the learning rate each of `parameters` takes, in their order.

        A step of Adam moves each entry of a matrix by the same amount, and the matrix's output by
        that times the number of its inputs. So in a model wider than `_WIDTH` the steps of factors
        and of whole weights fall with the width, and those of ghosts, whose weights are a
        least-squares optimum already, with its square.

        Source: Yang et al., "Tensor Programs V", arXiv 2203.03466, for Adam; the square:
        measurement.
        """
        share = min(1.0, _WIDTH / hidden_size(self._model))
        apart = 2 * (len(self.factors) + len(self.ghost_factors)) * [share]
        whole = [
            share**2 if isinstance(module, GhostLinear) else share for module, _ in self._whole
        ]
        return apart + whole

    @torch.no_grad()
    def move_to(self, point: Sequence[Tensor]) -> None:
        """Give `parameters` other values, in their order."""
        for parameter, value in zip(self.parameters, point, strict=True):
            parameter.copy_(value)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the model compute with what is trained; autograd reaches `parameters`."""
        handles = [
            item.module.register_forward_hook(
                lambda _, args, output, item=item: output + item.added(args[0])
            )
            for item in self.factors
        ]
        places = [*self._whole, *((item.module, "weight") for item in self.ghost_factors)]
        originals = [module._parameters[name] for module, name in places]
        used = [
            *(
                _rounded(master, module.get_parameter(name).dtype)
                for master, (module, name) in zip(self._masters, self._whole, strict=True)
            ),
            *(item.weight() for item in self.ghost_factors),
        ]
        try:
            self._put(places, used)
            yield
        finally:
            self._put(places, originals)
            for handle in handles:
                handle.remove()

    def _put(self, places: Iterable[tuple[nn.Module, str]], tensors: Iterable[Any]) -> None:
        """Give modules other parameters, and no ghost a packed copy of those that it had."""
        for (module, name), tensor in zip(places, tensors, strict=True):
            module._parameters[name] = tensor
        for ghost in self.ghosts:
            ghost.forget_packed()

    def fold(self) -> None:
        """Give the model parameters of its own that hold all that was trained."""
        for item in self.factors:
            with replacing(self._model, item.module):
                item.fold()
        own = []
        for master, (module, name) in zip(self._masters, self._whole, strict=True):
            old = module.get_parameter(name)
            rounded = master.detach().to(old.dtype)
            own.append(nn.Parameter(rounded, requires_grad=old.requires_grad))
        self._put(self._whole, own)


class _Rounding(torch.autograd.Function):
    """A cast whose gradient stays in fp32's precision where it arrives in it."""

    @staticmethod
    def forward(_: Any, value: Tensor, dtype: torch.dtype) -> Tensor:
        return value.to(dtype)

    @staticmethod
    def backward(_: Any, *gradients: Any) -> Any:
        return gradients[0].float(), None


def _rounded(master: Tensor, dtype: torch.dtype) -> Any:
    return _Rounding.apply(master, dtype) if dtype != master.dtype else master


def _names(ghost: GhostLinear) -> list[str]:
    """Return the names of what is trained of a ghost: its weight, and its bias where there is."""
    return ["weight"] if ghost.bias is None else ["weight", "bias"]


def _linear_maps(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the linear maps of the decoder layers, by their names in the model.

    A map whose weight other modules use too, as tied weights are, is left out: a weight of its own
    would untie it.
    """
    uses = Counter(
        id(weight) for module in model.modules() for weight in module.parameters(recurse=False)
    )
    names = {module: name for name, module in model.named_modules()}
    maps: dict[nn.Module, str] = {}
    for layer in decoder_layers(model):
        for module in layer.modules():
            weight = getattr(module, "weight", None)
            known = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
            alone = isinstance(weight, Tensor) and uses[id(weight)] < 2
            if known and alone and _maps_rows(module):
                maps[module] = names[module]
    return [(name, module) for module, name in maps.items()]


@torch.no_grad()
def _maps_rows(module: Any) -> bool:
    """Return whether a module's output is W x.

    Some families build a router on `nn.Linear`, which returns its choices too, or a map of groups.
    """
    if type(module).forward is nn.Linear.forward or module.weight.dtype not in _FOLDABLE:
        return True
    try:
        made = module(_row_of_zeros(module))
    except Exception:  # whatever the family's own code asks for
        return False
    return isinstance(made, Tensor) and made.shape == (1, _sizes(module)[0])


def _row_of_zeros(module: Any) -> Tensor:
    """Return one input of a linear map, in the dtype and on the device of its weight."""
    return module.weight.new_zeros(1, _sizes(module)[1])


def check_trainable(model: nn.Module, apart: bool = False) -> None:
    """Raise unless factors of a model's linear maps can be trained, and folded into its weights.

    Each map is given a row of zeros, to see whether it passes a gradient back.

    Args:
        model: The model.
        apart: Whether they are not folded, so that the weights may be packed.

    Raises:
        UnsupportedModelError: A map does not, or its weight is not floating point; the message
            names the first such map.
    """
    for name, module in _linear_maps(model):
        weight: Any = module.weight
        if weight.dtype not in _FOLDABLE or weight.dim() != 2:
            if apart:  # packed: `check_gradients` watches such a map at work
                continue
            raise UnsupportedModelError(
                f"expected floating-point weights to fold factors into, got {weight.dtype} in "
                f"{name}: heal the model in bf16 and quantize it afterwards, keep the factors "
                "apart (adapter=), or train the ghosts alone (rank=0)"
            )
        if reason := _why_no_gradient(module):
            raise UnsupportedModelError(
                f"expected linear maps that pass gradients back, got {name}, a "
                f"{type(module).__name__}, that does not ({reason}): load the model with plain "
                "linear layers"
            )


def _why_no_gradient(module: Any) -> str:
    """Return why a linear map passes no gradient back, "" if it does."""
    x = _row_of_zeros(module).requires_grad_()
    try:
        with torch.enable_grad():
            torch.autograd.grad(module(x).sum(), x)
    except RuntimeError as error:
        return str(error).split("\n")[0]
    return ""
