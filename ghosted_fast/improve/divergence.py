"""How far a ghosted model's predictions are from the dense model's, and what each ghost can do.

The divergence is the mean over attended tokens of KL(dense || ghosted) of the next-token
distributions. With g_t its gradient at a ghost's output for token t, the gradient by the ghost's
operator is the sum of g_t f(x_t)^T: one forward and backward pass through the surviving layers
above the first gap, in which no parameter needs a gradient.

Source: ours; KL(p || q) of softmax logits has the gradient q - p.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ghosted_fast import distributed
from ghosted_fast.checkpoint.record import removal_record
from ghosted_fast.errors import ArgumentError
from ghosted_fast.improve.gradients import check_gradients
from ghosted_fast.improve.pairs import check_pair
from ghosted_fast.improve.slopes import GhostSlope
from ghosted_fast.models.boundaries import starting_at, visit_boundaries
from ghosted_fast.models.built_whole import text_config_of
from ghosted_fast.models.families import decoder_layers, num_layers
from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.models.ghosted_layers import ghosts_of
from ghosted_fast.ops import divergence
from ghosted_fast.text.batches import Batch
from ghosted_fast.text.folds import token_count
from ghosted_fast.timing.spans import span

# Bytes of dense logits that are kept for text that is looked at again and again.
_KEPT_LOGITS = 1 << 31


@dataclass(frozen=True)
class States:
    """What is kept of a dense forward pass: little, and all that a comparison needs.

    Attributes:
        batch: The tokens.
        entry: Hidden states [batch, length, d] at the boundary where the ghosted model is resumed,
            or None where it runs from the tokens.
        exit: Hidden states of the dense model behind its last layer.
        logits: The dense model's, where they are kept.
    """

    batch: Batch
    entry: Tensor | None
    exit: Tensor
    logits: Tensor | None = None


class Divergence:
    """Compares a ghosted model with the dense model that it comes from.

    Args:
        ghosted: The model with ghosts.
        dense: The dense model, of the same vocabulary and dtype.

    Attributes:
        ghosts: The ghosts, in the order of the model's modules.
        device: Where tokens go.
        parameters: Weight, and bias where there is one, of each ghost in turn.

    Raises:
        ArgumentError: The first model has no ghost, or an int8 one, or does not come from the
            second.
        UnsupportedModelError: The first model passes no gradients back.
    """

    def __init__(self, ghosted: Any, dense: Any) -> None:
        self._ghosted, self._dense = ghosted, dense
        self.ghosts = [m for m in ghosted.modules() if isinstance(m, GhostLinear)]
        if not self.ghosts:
            raise ArgumentError("expected a model with ghosts, got one without: nothing to correct")
        if any(ghost.quantization for ghost in self.ghosts):
            raise ArgumentError(
                "expected floating-point ghosts, got int8: quantize them afterwards"
            )
        check_gradients(ghosted)
        self.device = self.ghosts[0].weight.device
        self._layers = num_layers(dense)
        self._vocabulary = int(text_config_of(dense.config).vocab_size)
        check_pair(ghosted, dense)
        _, removed = removal_record(ghosted.config, num_layers(ghosted))
        # Below the first removed layer both models are the same, and so is what they compute.
        placed = [index for index, _, _ in ghosts_of(decoder_layers(ghosted))]
        self._entry = min([*placed[:1], *removed[:1]]) if placed and removed else 0
        self.parameters: list[Tensor] = []
        for ghost in self.ghosts:
            ghost.unshare()  # `set_parameters` writes into them
            self.parameters += [ghost.weight] if ghost.bias is None else [ghost.weight, ghost.bias]

    def states(self, batch: Batch) -> States:
        """Run the dense model on a batch and keep what a comparison needs."""
        found: dict[int, Tensor] = {}
        wanted = [self._layers] if self._entry == 0 else [self._entry, self._layers]
        with span("dense model"):
            visit_boundaries(self._dense, batch, wanted, found.__setitem__)
        # Copies made out of inference mode, which autograd can take.
        entry = found[self._entry].clone() if self._entry else None
        return States(batch, entry, found[self._layers].clone())

    def held_out(self, batches: Iterable[Batch]) -> list[States]:
        """Return the states of text that is looked at many times, with logits as far as they fit.

        Args:
            batches: The text, which the ranks share.
        """
        found: list[States] = []
        room = _KEPT_LOGITS
        for batch in distributed.my_share(batches):
            states = self.states(batch)
            room -= states.exit.element_size() * batch.input_ids.numel() * self._vocabulary
            found.append(replace(states, logits=self.dense_logits(states)) if room >= 0 else states)
        return found

    def dense_logits(self, states: States) -> Tensor:
        """Return the dense model's logits [batch, length, vocabulary]."""
        if states.logits is not None:
            return states.logits
        with torch.no_grad(), span("dense head"):
            return _run(self._dense, states.batch, self._layers, states.exit)

    def logits(self, states: States) -> Tensor:
        """Return the ghosted model's logits [batch, length, vocabulary], without gradients."""
        with torch.inference_mode(), span("ghosted model"):
            return _run(self._ghosted, states.batch, self._entry, states.entry)

    def value(self, held_out: Sequence[States]) -> float:
        """Return the mean divergence per attended token, nats.

        Args:
            held_out: The states of this rank's text; the mean is that over all ranks.
        """
        found = sum(
            divergence_sum(self.dense_logits(item), self.logits(item), item.batch.attention_mask)
            for item in held_out
        )
        tokens = token_count(item.batch for item in held_out)
        sums = torch.tensor([found, tokens], dtype=torch.float64)
        distributed.add_up([sums])
        return float(sums[0] / sums[1])

    def gradients(self, batches: Iterable[Batch]) -> list[GhostSlope]:
        """Sum the gradients at the ghosts over batches, which the ranks share.

        Returns:
            The sums of each ghost.

        Raises:
            NonFiniteError: A state or a gradient is NaN or infinite.
        """
        slopes = [GhostSlope(ghost) for ghost in self.ghosts]
        for batch in distributed.my_share(batches):
            states = self.states(batch)
            with span("ghosted model"), _watched(self._ghosted, self.ghosts) as seen:
                logits = _run(self._ghosted, batch, self._entry, states.entry)
            dense = self.dense_logits(states)
            away = divergence_gradient(dense, logits, batch.attention_mask)
            outputs = [seen[ghost][1] for ghost in self.ghosts]
            with span("backward"):
                gradients = torch.autograd.grad(logits, outputs, away)
            attended = batch.attention_mask.bool()
            for ghost, slope, gradient in zip(self.ghosts, slopes, gradients, strict=True):
                x, y = seen[ghost]
                mapped = attended
                if ghost.first_state is not None:  # the first token's output is a constant
                    mapped = attended & ~batch.is_first
                with span("sums"):
                    slope.add(x, y.detach(), gradient, mapped)
        for slope in slopes:
            slope.add_ranks()
        return slopes

    def parameters64(self) -> list[Tensor]:
        """Return copies of the ghosts' parameters, fp64."""
        return [parameter.detach().double() for parameter in self.parameters]

    @torch.no_grad()
    def set_parameters(self, point: Sequence[Tensor]) -> None:
        """Set the ghosts' parameters, rounded to their dtype."""
        for parameter, value in zip(self.parameters, point, strict=True):
            parameter.copy_(value)

    def synchronise(self) -> None:
        """Give all ranks the ghosts of rank 0, to the bit."""
        if distributed.count() > 1:
            self.set_parameters(distributed.from_first(self.parameters64(), self.device))


def _run(model: Any, batch: Batch, boundary: int, hidden: Tensor | None) -> Tensor:
    """Return a model's logits, given the states at a boundary unless it is 0; autograd may look."""
    with nullcontext() if hidden is None else starting_at(model, boundary, hidden):
        output = model(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    return output.logits


@contextmanager
def _watched(
    model: nn.Module, ghosts: Sequence[GhostLinear]
) -> Iterator[dict[GhostLinear, tuple[Tensor, Tensor]]]:
    """Record each ghost's input and output, and let autograd start at the outputs, nowhere else."""
    seen: dict[GhostLinear, tuple[Tensor, Tensor]] = {}

    def hook(ghost: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        seen[ghost] = (args[0].detach(), output)
        return output

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handles = [ghost.register_forward_hook(hook) for ghost in ghosts]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            yield seen
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for handle in handles:
            handle.remove()


def divergence_sum(dense: Tensor, ghosted: Tensor, attention_mask: Tensor) -> float:
    """Return the sum over attended tokens of KL(dense || ghosted), nats.

    Args:
        dense: Logits [batch, length, vocabulary].
        ghosted: Likewise.
        attention_mask: [batch, length]; 0 marks padding, whose logits may be anything.
    """
    with span("divergence"):
        found, _ = divergence(*_rows(dense, ghosted, attention_mask))
        return float(found.sum())


def divergence_gradient(dense: Tensor, ghosted: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the gradient of `divergence_sum` by the ghosted logits, like these.

    It is softmax(ghosted) - softmax(dense), and 0 for padding.
    """
    with span("divergence"):
        _, gradient = divergence(*_rows(dense, ghosted, attention_mask), gradient=True)
        assert gradient is not None
        return gradient.view(ghosted.shape)


def _rows(dense: Tensor, ghosted: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return dense.flatten(0, 1), ghosted.flatten(0, 1), attention_mask.flatten().bool()
