"""Find the first attended token of every sequence in a batch."""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any

import torch
from torch import Tensor


def first_attended(
    tokens: Tensor,
    attention_mask: Any = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
) -> Tensor | None:
    """Mark the tokens that are the first attended one of their sequence.

    With a mask over past and current tokens, that is the first token the mask lets through, and any
    token at position 0 (packed sequences start there). Without one, or with masks that are already
    prepared for attention, it is the token at position 0; where no positions are given either, it
    is the first of all, if the cache is empty. Padding at position 0 may be marked when the masks
    are prepared: nothing attends to it.

    Args:
        tokens: Token ids [B, T] or embeddings [B, T, d] of the current step.
        attention_mask: [B, past + T], or a prepared mask (a tensor of four dimensions, or a dict).
        position_ids: [B, T] or [1, T], or [axes, B, T] where pictures have places of their own.
        past_key_values: A transformers cache; its length may be an int or a tensor.

    Returns:
        Bool [B, T], or None if it is known without looking that there is no such token.
    """
    batch, length = tokens.shape[:2]
    if position_ids is not None and position_ids.dim() == 3:
        position_ids = position_ids.amax(0)  # positions in time, height and width
    past = 0 if past_key_values is None else past_key_values.get_seq_length()
    past_is_known = not isinstance(past, Tensor)
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        end = longest = attention_mask.shape[1]
        if past_is_known:
            end = min(end, past + length)
        if not past_is_known or end == past + length:
            attended = attention_mask[:, :end] != 0
            current = attended[:, end - length :]
            if past_is_known and past == 0 and position_ids is not None and end < longest:
                # A mask of more tokens than there are: the positions say whether others came
                # before, which not every cache counts.
                return current & (position_ids == 0)
            seen = attended[:, : end - length].sum(1, keepdim=True)
            first = (seen + current.cumsum(1)) == 1
            return current & (first if position_ids is None else first | (position_ids == 0))
    if past_is_known and past > 0 and (attention_mask is None or position_ids is None):
        return None
    if position_ids is None:
        at_start = (torch.arange(length, device=tokens.device) + past == 0)[None]
    else:
        at_start = position_ids == 0
    return at_start.expand(batch, length).contiguous()


class FirstTokens:
    """Where a model leaves the mark of first tokens for ghosts that no argument reaches."""

    def __init__(self) -> None:
        self.mark: Tensor | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle without the mark, which belongs to one forward pass."""
        return (FirstTokens, ())

    def on(self, device: torch.device) -> Tensor | None:
        """Return the mark on a device."""
        return None if self.mark is None else self.mark.to(device)


def marked_at(base: Any, owner: Any) -> tuple[Any, bool]:
    """Return which module marks the first tokens, and whether its layers can be handed the mark.

    Args:
        base: The base model: what is called with the tokens.
        owner: The module that runs the layers: the base itself, or deep inside it.
    """
    same = type(getattr(owner, "config", base.config)) is type(base.config)
    reads = same and not {"input_ids", "inputs_embeds"}.isdisjoint(parameters_of(type(owner)))
    return (owner, hands_on(owner)) if reads else (base, False)


def mark_of(names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Name the arguments of a forward pass, in place, and return the mark of its first tokens.

    Args:
        names: The parameters of the forward pass, in order.
        args: Its arguments without a name.
        kwargs: Its named arguments; `args` are added.
    """
    kwargs.update(zip(names, args, strict=False))
    tokens = kwargs.get("input_ids")
    if tokens is None:
        tokens = kwargs.get("inputs_embeds")
    state = kwargs.get("cache_params", kwargs.get("state"))
    if tokens is None or _goes_on(state):
        return None
    known = ("attention_mask", "position_ids", "past_key_values")
    return first_attended(tokens, **{name: kwargs.get(name) for name in known})


def _goes_on(state: Any) -> bool:
    """Return whether the state of a recurrent model has seen tokens."""
    if state is None:
        return False
    offset = getattr(state, "seqlen_offset", None)
    if offset is not None:
        return bool(offset > 0)
    seen = getattr(state, "has_previous_state", True)
    return bool(seen() if callable(seen) else seen)


def parameters_of(base: Any) -> list[str]:
    """Return the names of what a class's forward pass takes."""
    return [name for name in inspect.signature(base.forward).parameters if name != "self"]


def hands_on(owner: Any) -> bool:
    """Return whether a keyword that a module does not know reaches the layers it runs.

    Its source says so: what a loop goes through is called with `**kwargs`.
    """
    try:
        source = inspect.getsource(inspect.unwrap(type(owner).forward))
    except (OSError, TypeError):
        return True
    nodes = list(ast.walk(ast.parse(textwrap.dedent(source))))
    loops = [node.target for node in nodes if isinstance(node, ast.For)]
    items = {name.id for loop in loops for name in ast.walk(loop) if isinstance(name, ast.Name)}
    return any(
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in items
        and any(keyword.arg is None for keyword in node.keywords)
        for node in nodes
    )
