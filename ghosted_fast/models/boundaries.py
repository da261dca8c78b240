"""Hidden states at layer boundaries: capture them in a forward pass, resume a pass from them.

Boundary b is the input of layer b; boundary `num_layers` is the output of the last layer, which the
final norm takes in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ghosted_fast.models.contract import Returned, as_returned, hidden_state, state_in, with_state
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.text.batches import Batch

# Maps hidden states [batch, length, hidden_size] to others.
Operator = Callable[[Tensor], Tensor]
# Layers that are left out, (start, stop, operator): the operator maps the states that enter layer
# `start` to those that enter `stop`; None leaves them as they are.
LeftOut = tuple[int, int, Operator | None]


@dataclass(frozen=True, eq=False)
class Begun:
    """Where a batch has come to, in the whole model and in the one without some of its layers.

    Attributes:
        boundary: The boundary, above the layers that are left out.
        whole: The whole model's states there [batch, length, hidden_size].
        smaller: Those of the model without the layers.
    """

    boundary: int
    whole: Tensor
    smaller: Tensor


class _LastBoundaryReached(Exception):
    """Ends a forward pass whose remaining layers nobody looks at."""


def visit_boundaries(
    model: Any,
    batch: Batch,
    boundaries: Sequence[int],
    visit: Callable[[int, Tensor], None],
    gradients: bool = False,
) -> None:
    """Run the layers on a batch and hand over the hidden states at some boundaries, in order.

    The pass ends at the last of the boundaries: later layers and the head are not computed.

    Args:
        model: A causal language model, its base model, or a view of it.
        batch: The tokens.
        boundaries: Boundaries to visit, each in 0..num_layers.
        visit: Called with the boundary and the hidden states [batch, length, hidden_size].
        gradients: Whether autograd records the pass.
    """
    decoder = Decoder.of(model)
    layers = decoder.layers
    wanted, last = frozenset(boundaries), max(boundaries)
    resting = decoder.contract.resting

    def reached(boundary: int, hidden: Tensor) -> None:
        if boundary in wanted:
            visit(boundary, hidden)
        if boundary == last:
            raise _LastBoundaryReached
        if boundary in resting:  # what enters a layer that does not run enters the next one too
            reached(boundary + 1, hidden)

    def before_first(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        reached(0, hidden_state(args, kwargs))

    def after(index: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            reached(index + 1, state_in(output))

        return hook

    handles = [layers[0].register_forward_pre_hook(before_first, with_kwargs=True)]
    handles += [layer.register_forward_hook(after(i)) for i, layer in enumerate(layers)]
    base = getattr(decoder.model, "base_model", decoder.model)
    try:
        with torch.enable_grad() if gradients else torch.inference_mode():
            base(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    except _LastBoundaryReached:
        pass
    finally:
        for handle in handles:
            handle.remove()


def visit_intervals(
    model: Any,
    batch: Batch,
    intervals: Sequence[tuple[int, int]],
    visit: Callable[[int, Tensor, Tensor], None],
    gaps: Sequence[LeftOut] = (),
    begun: Begun | None = None,
) -> None:
    """Run the layers on a batch and hand over both ends of each interval.

    A hidden state is held only until the last interval that starts there is served.

    Args:
        model: A causal language model, its base model, or a view of it.
        batch: The tokens.
        intervals: Pairs of boundaries (start, stop), start < stop.
        visit: Called with the interval's index and the states at its start and its stop.
        gaps: Layers that are left out on the way to the starts; the stops are those of the whole
            model all the same. Each ends below every start.
        begun: Where to begin; the layers below are not computed. None for at the bottom.
    """
    decoder = Decoder.of(model)
    last_stop = {start: max(e for s, e in intervals if s == start) for start, _ in intervals}
    states: dict[int, Tensor] = {}
    if gaps:
        with (
            leaving_out(decoder, gaps)
            if begun is None
            else starting_at(decoder, begun.boundary, begun.smaller)
        ):
            visit_boundaries(decoder, batch, list(last_stop), states.__setitem__)

    def reached(boundary: int, hidden: Tensor) -> None:
        for index, (start, stop) in enumerate(intervals):
            if stop == boundary:
                visit(index, states[start], hidden)
        for start in [start for start in states if last_stop[start] <= boundary]:
            del states[start]
        if boundary in last_stop and not gaps:
            states[boundary] = hidden

    wanted = [stop for _, stop in intervals] if gaps else [b for pair in intervals for b in pair]
    with nullcontext() if begun is None else starting_at(decoder, begun.boundary, begun.whole):
        visit_boundaries(decoder, batch, wanted, reached)


class _PassThrough(nn.Module):
    """Stands in for a layer that is not computed; answers for its attributes."""

    def __init__(
        self, layer: nn.Module, returns: Returned | None, operator: Operator | None
    ) -> None:
        super().__init__()
        object.__setattr__(self, "_layer", layer)
        self._returns, self._operator = returns, operator

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_layer"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = hidden_state(args, kwargs)
        if self._operator is not None:
            hidden = self._operator(hidden)
        return as_returned(hidden, self._returns, kwargs)


def resume(
    model: Any,
    batch: Batch,
    boundary: int,
    hidden: Tensor,
    gaps: Sequence[LeftOut] = (),
) -> Tensor:
    """Return the logits that follow from given hidden states at a boundary.

    Only the layers from the boundary on, the final norm and the head are computed.

    Args:
        model: A causal language model, or a view of it.
        batch: The tokens that the hidden states belong to (for masks and positions).
        boundary: In 1..num_layers.
        hidden: [batch, length, hidden_size], in the model's dtype.
        gaps: Layers above the boundary that are left out.

    Returns:
        Logits [batch, length, vocabulary], in the model's dtype.
    """
    decoder = Decoder.of(model)
    with starting_at(decoder, boundary, hidden), leaving_out(decoder, gaps), torch.inference_mode():
        output = decoder.model(
            batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        )
    return output.logits


@contextmanager
def starting_at(model: Any, boundary: int, hidden: Tensor) -> Iterator[None]:
    """Run the model with given hidden states at a boundary.

    The layers below are not computed, unless those above use more of them: their keys and values,
    or a second state.

    Args:
        model: A causal language model, its base model, or a view of it.
        boundary: In 1..num_layers.
        hidden: The states [batch, length, hidden_size].
    """
    decoder = Decoder.of(model)
    if boundary == decoder.num_layers or not decoder.uses_layers_below:
        with leaving_out(decoder, [(0, boundary, lambda _: hidden)]):
            yield
        return

    def give(_: nn.Module, __: Any, output: Any) -> Any:
        return with_state(output, hidden)

    below = max(set(range(boundary)) - decoder.contract.resting)
    handle = decoder.layers[below].register_forward_hook(give)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def leaving_out(model: Any, gaps: Sequence[LeftOut]) -> Iterator[None]:
    """Run the model without some of its layers, which are put back afterwards.

    Args:
        model: A causal language model, its base model, or a view of it.
        gaps: The layers that are left out.
    """
    decoder = Decoder.of(model)
    layers, contract = decoder.layers, decoder.contract
    originals = {index: layers[index] for start, stop, _ in gaps for index in range(start, stop)}
    try:
        for start, stop, operator in gaps:
            running = [index for index in range(start, stop) if index not in contract.resting]
            for index in running:
                layers[index] = _PassThrough(
                    originals[index],
                    contract.returns[index],
                    operator if index == running[-1] else None,
                )
        yield
    finally:
        for index, module in originals.items():
            layers[index] = module
