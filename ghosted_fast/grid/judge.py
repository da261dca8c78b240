"""The worth of the models of a grid; what they have in common is computed once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from ghosted_fast.measure.perplexity import Perplexity, parts_of, perplexity_from
from ghosted_fast.models.boundaries import resume, visit_boundaries
from ghosted_fast.models.families import decoder_layers
from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.text.batches import Batch


class Judge:
    """Measures smaller models on the same texts.

    A model without the layers from s on is the dense one up to the input of layer s - 1 (that layer
    may hold an operator). The dense states there are computed once for all models in a row with
    the same s, and these are evaluated from there on.

    Args:
        model: The dense model.
        evaluations: Tokens, by the name of the text.
        accuracy: Measures a model's accuracy by task; None leaves it out.
        seed: Of the bootstrap.
    """

    def __init__(
        self,
        model: Any,
        evaluations: Mapping[str, Sequence[Batch]],
        accuracy: Callable[[Any], dict[str, float]] | None,
        seed: int,
    ) -> None:
        self._dense = model
        self._parts = {
            name: [part for batch in batches for part in parts_of(batch.to(model.device), model)]
            for name, batches in evaluations.items()
        }
        self._accuracy = accuracy
        self._seed = seed
        self._boundary = 0
        self._states: dict[str, list[Tensor]] = {}

    def __call__(self, model: Any, first_removed: int = 0) -> dict[str, Any]:
        """Return a model's perplexity on every text, its accuracy, its size and its operators.

        Args:
            model: In evaluation mode.
            first_removed: The lowest layer that it lacks; 0 for one that shares no layers.
        """
        began = time.perf_counter()
        self._share(first_removed - 1)
        losses = {name: _summary(self._perplexity(model, name)) for name in self._parts}
        accuracy = None if self._accuracy is None else self._accuracy(model)
        return {
            "perplexity": losses,
            "accuracy": accuracy,
            "layers": len(decoder_layers(model)),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "operators": operators_of(model),
            "seconds": {"judge": time.perf_counter() - began},
        }

    def _share(self, boundary: int) -> None:
        """Have the dense states at a boundary, those of the last one if it is the same."""
        if boundary == self._boundary:
            return
        self._boundary, self._states = boundary, {}
        if boundary < 1:
            return
        for name, parts in self._parts.items():
            self._states[name] = [_states_at(self._dense, part, boundary) for part in parts]

    def _perplexity(self, model: Any, name: str) -> Perplexity:
        parts = self._parts[name]
        if not self._states:
            logits_of: Callable[[Batch], Tensor] = partial(_logits, model)
        else:
            states = iter(self._states[name])

            def logits_of(batch: Batch) -> Tensor:
                return resume(model, batch, self._boundary, next(states))

        return perplexity_from(parts, logits_of, seed=self._seed)


def _states_at(model: Any, batch: Batch, boundary: int) -> Tensor:
    states: dict[int, Tensor] = {}
    visit_boundaries(model, batch, [boundary], states.__setitem__)
    return states[boundary]


def _logits(model: Any, batch: Batch) -> Tensor:
    return model(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits


def operators_of(model: nn.Module) -> list[str]:
    """Return the kinds of the operators that a smaller model computes in place of layers.

    They are "raw" or "normed", and "raw with bias" or "normed with bias".
    """
    ghosts = [module for module in model.modules() if isinstance(module, GhostLinear)]
    return sorted(
        ("raw" if ghost.norm_eps is None else "normed") + " with bias" * (ghost.bias is not None)
        for ghost in ghosts
    )


def _summary(found: Perplexity) -> dict[str, Any]:
    record = found.to_dict()
    del record["passage_losses"], record["passage_tokens"]
    return record
