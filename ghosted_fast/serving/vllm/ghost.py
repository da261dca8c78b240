"""A ghost as a vLLM module, and decoder layers that carry it.

Between most of vLLM's layers the hidden state is a sum of two, h + r, which the next fused
add-and-norm takes. A ghost leaves x and what it adds to x in their place, so its own addition costs
nothing. Other layers hand on the state itself, and so do their ghosts.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import ColumnParallelLinear

from ghosted_fast.errors import UnsupportedModelError
from ghosted_fast.models.runtime_classes import maker, subclass_for
from ghosted_fast.ops import ghost_apply, stream_sum

Stream = tuple[Tensor, Tensor]
_POSITIONS = ("positions", "position_ids")


class FloatGhost(ColumnParallelLinear):
    """A floating-point ghost; its rows are shared among the ranks of tensor parallelism.

    Args:
        size: Width d of the hidden state.
        record: The ghost's entry in the saved configuration.
        prefix: Name of the module in the checkpoint.
    """

    def __init__(self, size: int, record: dict[str, Any], prefix: str) -> None:
        super().__init__(
            size,
            size,
            bias=False,
            skip_bias_add=True,  # added here
            gather_output=True,
            prefix=prefix,
            return_bias=False,
        )
        self.norm_eps: float | None = record["norm_eps"]
        for name in ("bias", "first_state"):
            vector = nn.Parameter(torch.empty(size), requires_grad=False)
            self.register_parameter(name, vector if record[name] else None)

    def split(self, x: Tensor, positions: Tensor | None) -> Stream:
        """Return what the ghost adds, and what it is added to, each [tokens, d].

        Args:
            x: Hidden state [tokens, d].
            positions: Position of each token in its sequence, [tokens] or [axes, tokens]; None
                only without a state for first tokens.
        """
        features = x
        if self.norm_eps is not None:
            wide = x.float()
            unit = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.norm_eps)
            features = (wide * unit).to(x.dtype)
        if self.bias is not None:
            x = x + self.bias
        if self.first_state is not None:
            first = _is_first(positions)[:, None]
            features = torch.where(first, 0.0, features)
            x = torch.where(first, self.first_state, x)
        return self(features), x


class Int8Ghost(nn.Module):
    """A ghost whose weight is int8 with a scale per row; every rank holds all of it.

    Args:
        size: Width d of the hidden state.
        record: The ghost's entry in the saved configuration.
    """

    def __init__(self, size: int, record: dict[str, Any]) -> None:
        super().__init__()
        self.norm_eps: float | None = record["norm_eps"]

        def empty(*shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)

        self.weight = empty(size, size, dtype=torch.int8)
        self.scale = empty(size, dtype=torch.float32)
        self.bias = empty(size) if record["bias"] else None
        self.first_state = empty(size) if record["first_state"] else None

    def split(self, x: Tensor, positions: Tensor | None) -> Stream:
        """Return zeros and the ghost's output, each [tokens, d]; see `FloatGhost.split`."""
        y = ghost_apply(
            x,
            self.weight,
            self.bias,
            self.scale,
            norm_eps=self.norm_eps,
            first_state=self.first_state,
            is_first=None if self.first_state is None else _is_first(positions),
        )
        return torch.zeros_like(y), y


def _is_first(positions: Any) -> Tensor:
    """Return the marks of first tokens, [tokens].

    By position: right for prompts that are read in parts, or partly found in the cache.
    """
    first: Tensor = positions == 0
    return first if first.ndim == 1 else first.all(0)


def make_ghost(size: int, record: dict[str, Any], prefix: str) -> FloatGhost | Int8Ghost:
    """Return the empty ghost that an entry of a saved configuration describes."""
    if record["quantization"] == "int8":
        return Int8Ghost(size, record)
    return FloatGhost(size, record, prefix)


def attach_ghost(layer: nn.Module, side: str, ghost: Any, whole: bool = False) -> None:
    """Give a vLLM decoder layer a ghost before its input or behind its output, in place.

    Args:
        layer: A layer that is called with the hidden states, and with the residual and the
            positions if it takes them.
        side: "input" or "output".
        ghost: A ghost of `make_ghost`.
        whole: Whether the layers hand on the state itself although they take a residual.

    Raises:
        UnsupportedModelError: The ghost has a state for first tokens, and the layer is not told
            where they are.
    """
    names = inspect.signature(layer.forward).parameters
    told = any(
        name in _POSITIONS or parameter.kind is parameter.VAR_KEYWORD
        for name, parameter in names.items()
    )
    if ghost.first_state is not None and not told:
        raise UnsupportedModelError(
            f"a ghost with a state for first tokens cannot be served by vLLM in a "
            f"{type(layer).__name__}, which is not told the positions of its tokens: fit the model "
            "again with `ghosted-fast fit --first-state off`, or serve it with transformers"
        )
    layer.__class__ = subclass_for("vllm_layer", type(layer))
    vars(layer)["in_two"] = "residual" in names and not whole
    for attribute in ("ghost", "input_ghost"):
        if attribute not in layer._modules:
            layer.register_module(attribute, None)
    setattr(layer, "ghost" if side == "output" else "input_ghost", ghost)


@maker("vllm_layer")
def _ghosted_layer_class(base: Any) -> type:
    """Make the class of a family's layers with ghosts."""
    names = tuple(inspect.signature(base.forward).parameters)[1:]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        values = {**dict(zip(names, args, strict=False)), **kwargs}
        positions = values.get("positions", values.get("position_ids"))
        if self.input_ghost is not None:
            x = values["hidden_states"]
            if self.in_two and values["residual"] is not None:
                x = stream_sum(x, values["residual"])
            values["hidden_states"] = stream_sum(*self.input_ghost.split(x, positions))
            if self.in_two:
                values["residual"] = None
        output = base.forward(self, **values)
        if self.ghost is None:
            return output
        if isinstance(output, Tensor):
            return stream_sum(*self.ghost.split(output, positions))
        hidden, rest, *others = output
        if rest is None or not self.in_two:
            return (stream_sum(*self.ghost.split(hidden, positions)), rest, *others)
        return (*self.ghost.split(stream_sum(hidden, rest), positions), *others)

    return type(base.__name__, (base,), {"__module__": base.__module__, "forward": forward})
