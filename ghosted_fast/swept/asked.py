"""What is asked of a sweep: whether it can be done, and what it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ghosted_fast.errors import ArgumentError, CalibrationError
from ghosted_fast.fit.sweep.correcting import Correcting
from ghosted_fast.fit.sweep.heats import Heats
from ghosted_fast.fit.sweep.plan import SweepPlan, Work, plan_sweep
from ghosted_fast.fit.sweep.shape import Shape
from ghosted_fast.fit.sweep.tokens import held_out_tokens, tokens_of
from ghosted_fast.fit.sweep.trying import Trying
from ghosted_fast.improve.correction import (
    DEFAULT_HELD_OUT_TOKENS,
    DEFAULT_TOKENS,
    FEWEST_FOR_AUTO,
    most_steps,
)
from ghosted_fast.measure.system import device_named, free_memory
from ghosted_fast.models.unloaded.opening import Unloaded
from ghosted_fast.options import (
    Count,
    GhostOptions,
    HowMany,
    Layers,
    PerplexityBound,
    RunOptions,
    SpeedBound,
)
from ghosted_fast.recovery import RECOVERIES
from ghosted_fast.recovery.swept import check_swept_recovery
from ghosted_fast.selection.criteria import CRITERIA
from ghosted_fast.selection.criteria.ghost import TOKENS_FOR_THE_BEST
from ghosted_fast.selection.how_many import numbers_tried
from ghosted_fast.selection.select import check_layer_count
from ghosted_fast.selection.swept import check_swept
from ghosted_fast.surgery.cut import removed_intervals
from ghosted_fast.text.batches import Batch
from ghosted_fast.text.folds import PASS_TOKENS

# Of what is free, for other programs.
_SHARE = 0.8
_DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Asked:
    """What is asked of a sweep.

    Attributes:
        wanted: How many layers go, or which.
        criterion: What chooses them.
        recovery: What takes their place.
        options: How ghosts are fitted.
        run: How much work is done.
    """

    wanted: HowMany
    criterion: str
    recovery: str
    options: GhostOptions
    run: RunOptions

    def check(self) -> None:
        """Raise, before any work, unless a sweep can do it.

        Raises:
            ArgumentError: It cannot; the message says what would do.
        """
        if self.device.type not in _DEVICES:
            raise ArgumentError(
                f"expected one of {', '.join(_DEVICES)} as the device of a model that is swept "
                f"through layer by layer, got {self.run.device!r}"
            )
        if isinstance(self.wanted, SpeedBound):
            raise ArgumentError(
                "expected a number of layers, removed or a PerplexityBound for a model that is "
                f"swept through layer by layer, got {self.wanted}: how fast it decodes is measured "
                "with the model in memory. Give more memory"
            )
        if not isinstance(self.wanted, Layers):
            check_swept(self.criterion)
            if self.run.corrected_candidates > 1:
                raise ArgumentError(
                    "expected corrected_candidates=0 for a model that is swept through layer by "
                    f"layer, got {self.run.corrected_candidates}: each candidate's corrections "
                    "would read its layers again and again. Choose without, or give more memory"
                )
        check_swept_recovery(self.recovery)
        if self.run.heal is not None:
            raise ArgumentError(
                "expected heal=None for a model that is swept through layer by layer: healing "
                "needs the smaller model in memory. Save it, and heal it where it fits"
            )

    @property
    def device(self) -> torch.device:
        """What computes.

        Raises:
            ArgumentError: The machine has no such device.
        """
        return device_named(self.run.device)

    def work(self, batches: list[Batch], shape: Shape) -> Work:
        """Return how much there is to do, for a text and a model."""
        scored = TOKENS_FOR_THE_BEST * self.run.score_tokens
        heats = Heats.of(batches, scored, self.device if self.criterion == "ghost" else None)
        chosen, gaps = None, 1
        most = shape.num_layers - CRITERIA[self.criterion].keeps
        if isinstance(self.wanted, Count):
            check_layer_count(self.wanted.layers, shape.num_layers)
            chosen = self.wanted.layers if self.criterion == "ghost" else None
            gaps = self._most_gaps(self.wanted.layers, shape.num_layers)
        elif isinstance(self.wanted, Layers):
            gaps = len(removed_intervals(self.wanted.removed, shape.num_layers))
        elif isinstance(self.wanted, PerplexityBound) and self.criterion != "ghost":
            gaps = max(
                min(self._most_gaps(count, shape.num_layers), shape.num_layers - count + 1)
                for count in range(1, max(2, most + 1))
            )
        in_sequence = RECOVERIES[self.recovery].sequential and self.options.sequential
        work = Work.of(batches, shape, chosen, heats, gaps, in_sequence)
        ghosts = gaps if chosen is None else 1
        return replace(
            work,
            correcting=self._correcting(batches, shape, ghosts),
            trying=self._trying(batches, heats, most, gaps),
        )

    def _trying(
        self, batches: Sequence[Batch], heats: Heats, most: int, gaps: int
    ) -> Trying | None:
        """Return how the number of layers is found, None where it is given."""
        if not isinstance(self.wanted, PerplexityBound):
            return None
        return Trying(
            ways=tuple(tuple(numbers_tried(most, best)) for best in range(most + 1)),
            every_interval=self.criterion == "ghost",
            in_pieces=gaps > 1,
            tokens=sum(batch.input_ids.numel() for batch in batches),
            heats=heats,
        )

    @property
    def corrects(self) -> bool:
        """Whether the ghosts are corrected, as far as that has sense."""
        return RECOVERIES[self.recovery].improvable and self.run.corrections != 0

    def _correcting(self, batches: Sequence[Batch], shape: Shape, ghosts: int) -> Correcting | None:
        """Return how much corrections have to do, None if none are made."""
        corrections = self.run.corrections
        if not self.corrects or isinstance(self.wanted, SpeedBound):
            return None
        if corrections == "auto" and held_out_tokens(batches) < FEWEST_FOR_AUTO:
            return None
        if isinstance(self.wanted, Count):
            layers = shape.num_layers - self.wanted.layers
        elif isinstance(self.wanted, PerplexityBound):
            layers = shape.num_layers - 1
        else:
            above = range(min(self.wanted.removed, default=0), shape.num_layers)
            layers = len(set(above) - set(self.wanted.removed))
        longest = max((batch.input_ids.shape[1] for batch in batches), default=0)
        return Correcting(
            steps=most_steps(corrections),
            ghosts=ghosts,
            layers=layers,
            tokens=tokens_of(batches, DEFAULT_TOKENS),
            judged=tokens_of(batches, DEFAULT_HELD_OUT_TOKENS),
            pass_tokens=max(PASS_TOKENS, longest),
        )

    def _most_gaps(self, layers: int, num_layers: int) -> int:
        """Return how many gaps so many chosen layers may leave."""
        method = CRITERIA[self.criterion]
        return method.num_statistics(layers, num_layers) if method.published else layers

    def plan(self, unloaded: Unloaded, batches: list[Batch]) -> SweepPlan:
        """Return what the sweep takes; of "auto" corrections, without them where they do not fit.

        Raises:
            CalibrationError: Too little memory is allowed.
        """
        shape = Shape.of(unloaded)
        work = self.work(batches, shape)
        room: dict[str, Any] = {
            "memory": allowed_on_host(self.run),
            "on_disk": self.run.state is not None,
            "device_memory": None if self.device.type == "cpu" else allowed_memory(self.run),
        }
        try:
            return plan_sweep(shape, work, self.options, **room)
        except CalibrationError:
            if work.correcting is None or self.run.corrections != "auto":
                raise
            return plan_sweep(shape, replace(work, correcting=None), self.options, **room)


def allowed_memory(run: RunOptions) -> int:
    """Return the bytes that all of a run may take of the memory of what computes."""
    return run.memory or int(_SHARE * free_memory(device_named(run.device)))


def allowed_on_host(run: RunOptions) -> int:
    """Return the bytes that all of a run may take of the host's memory."""
    on_host = device_named(run.device).type == "cpu"
    return allowed_memory(run) if on_host else int(_SHARE * free_memory(torch.device("cpu")))
