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
from ghosted_fast.improve.comparison import Comparison, MovedGhosts
from ghosted_fast.improve.gradients import check_gradients, frozen
from ghosted_fast.improve.pairs import check_pair
from ghosted_fast.improve.slopes import GhostSlope, mapped_tokens
from ghosted_fast.models.boundaries import starting_at, visit_boundaries
from ghosted_fast.models.built_whole import text_config_of
from ghosted_fast.models.families import decoder_layers, num_layers
from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.models.ghosted_layers import ghosts_of
from ghosted_fast.ops import divergence, local_divergence
from ghosted_fast.text.batches import Batch
from ghosted_fast.text.folds import in_passes, token_count
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


class Divergence(MovedGhosts):
    """Compares a ghosted model with the dense model that it comes from.

    Args:
        ghosted: The model with ghosts.
        dense: The dense model, of the same vocabulary and dtype.

    Raises:
        ArgumentError: The first model has no ghost, or an int8 one, or does not come from the
            second.
        UnsupportedModelError: The first model passes no gradients back.
    """

    def __init__(self, ghosted: Any, dense: Any) -> None:
        self._ghosted, self._dense = ghosted, dense
        ghosts = [m for m in ghosted.modules() if isinstance(m, GhostLinear)]
        if not ghosts:
            raise ArgumentError("expected a model with ghosts, got one without: nothing to correct")
        if any(ghost.quantization for ghost in ghosts):
            raise ArgumentError(
                "expected floating-point ghosts, got int8: quantize them afterwards"
            )
        check_gradients(ghosted)
        self._layers = num_layers(dense)
        self._vocabulary = int(text_config_of(dense.config).vocab_size)
        check_pair(ghosted, dense)
        _, removed = removal_record(ghosted.config, num_layers(ghosted))
        # Below the first removed layer both models are the same, and so is what they compute.
        placed = [index for index, _, _ in ghosts_of(decoder_layers(ghosted))]
        self._entry = min([*placed[:1], *removed[:1]]) if placed and removed else 0
        super().__init__(ghosts)

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
            for ghost, slope, gradient in zip(self.ghosts, slopes, gradients, strict=True):
                x, y = seen[ghost]
                with span("sums"):
                    slope.add(x, y.detach(), gradient, mapped_tokens(ghost, batch))
        for slope in slopes:
            slope.add_ranks()
        return slopes


class LoadedComparison(Comparison):
    """Compares two models in memory.

    Args:
        divergence: Of the two.
        train: Sequences to learn from.
        judges: Sequences to judge by.
    """

    def __init__(
        self, divergence: Divergence, train: Sequence[Batch], judges: Sequence[Batch]
    ) -> None:
        super().__init__(divergence, len(train))
        self._divergence, self._train = divergence, train
        self._held_out = divergence.held_out(in_passes(judges))

    def gradients(self, numbers: Sequence[int]) -> list[GhostSlope]:
        """Return the sums of each ghost over some training sequences, of all ranks."""
        return self._divergence.gradients(in_passes(self._train[number] for number in numbers))

    def value(self) -> float:
        """Return the mean divergence per attended held-out token, nats."""
        return self._divergence.value(self._held_out)

    def local_model(
        self, point: Sequence[Tensor], directions: Sequence[Sequence[Tensor]]
    ) -> tuple[float, Tensor, Tensor]:
        """Return the divergence, its slope and its curvature along some directions."""
        return local_model(self._divergence, self._held_out, point, directions)


def local_model(
    divergence: Divergence,
    held_out: Sequence[States],
    point: Sequence[Tensor],
    directions: Sequence[Sequence[Tensor]],
) -> tuple[float, Tensor, Tensor]:
    """Return the divergence, its slope and its curvature, see `Comparison.local_model`.

    Args:
        divergence: Of the ghosts.
        held_out: The states of this rank's text.
        point: Parameters of the ghosts, fp64.
        directions: Changes of them.
    """
    count = len(directions)
    slope = torch.zeros(count, dtype=torch.float64)
    curvature = torch.zeros(count, count, dtype=torch.float64)
    value = 0.0
    for states in held_out:
        dense, mask = divergence.dense_logits(states), states.batch.attention_mask
        moved = []
        for direction in directions:
            divergence.set_parameters(
                [old + change for old, change in zip(point, direction, strict=True)]
            )
            moved.append(divergence.logits(states))
        divergence.set_parameters(point)
        base = divergence.logits(states)
        rows = [logits.flatten(0, 1) for logits in (dense, base, *moved)]
        with span("local model"):
            found = local_divergence(rows[0], rows[1], rows[2:], mask.flatten().bool())
        value += float(found[0])
        slope += found[1].cpu()
        curvature += found[2].cpu()
    return mean_over_ranks(value, slope, curvature, [states.batch for states in held_out])


def mean_over_ranks(
    value: float, slope: Tensor, curvature: Tensor, batches: Iterable[Batch]
) -> tuple[float, Tensor, Tensor]:
    """Return means per attended token, over all ranks, of sums over this rank's batches.

    Args:
        value: Sum of the divergence.
        slope: That of its slope [k], fp64; it is used up, as the next one.
        curvature: That of its curvature [k, k], fp64.
        batches: What they are sums over.
    """
    counts = torch.tensor([value, token_count(batches)], dtype=torch.float64)
    distributed.add_up([slope, curvature, counts])
    return float(counts[0] / counts[1]), slope / counts[1], curvature / counts[1]


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

    handles = [ghost.register_forward_hook(hook) for ghost in ghosts]
    try:
        with frozen(model), torch.enable_grad():
            yield seen
    finally:
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
