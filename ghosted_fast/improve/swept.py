"""Corrections of a model that is swept through: up and down its layers, one in memory at a time.

Up, the states of the text go from the first gap to the top; what enters each layer stays on the
shelf. There the head gives the divergence and its gradient. Down, each layer is read again and run
on what entered it, and hands the gradient on from its output to its input; where a ghost stands,
that is the gradient at its output. Trial steps go up side by side.

Source: ours. Running a layer again in place of keeping all that happened in it is the checkpointing
of Chen et al., arXiv 1604.06174.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from ghosted_fast import distributed
from ghosted_fast.facts import CorrectionFacts
from ghosted_fast.fit.sweep.climb import Sweep, rows_of
from ghosted_fast.fit.sweep.riders import Row
from ghosted_fast.improve.comparison import Comparison, MovedGhosts
from ghosted_fast.improve.divergence import mean_over_ranks
from ghosted_fast.improve.exits import Exit, exit_divergence, exit_local_divergence
from ghosted_fast.improve.gradients import frozen
from ghosted_fast.improve.slopes import GhostSlope, mapped_tokens
from ghosted_fast.models.gap import Gap
from ghosted_fast.models.unloaded.source import Calls
from ghosted_fast.text.batches import Batch
from ghosted_fast.text.folds import in_passes, split_places, split_sequences, token_count
from ghosted_fast.timing.spans import span

_FACTS = "corrections"


@dataclass(frozen=True, eq=False)
class Pass:
    """Sequences that go through a layer together.

    Attributes:
        batch: Their tokens.
        rows: Where they are in the text.
        calls: What each layer is called with.
    """

    batch: Batch
    rows: list[Row]
    calls: Calls


@dataclass(frozen=True, eq=False)
class SweptSplit:
    """The text of a sweep, split into sequences to learn from and sequences to judge by.

    Attributes:
        train: Those to learn from.
        judges: Those to judge by.
    """

    train: list[Row]
    judges: list[Row]

    @classmethod
    def of(cls, sweep: Sweep, batches: Sequence[Batch], held_out_tokens: int) -> SweptSplit:
        """Split a text as `split_sequences` does.

        Args:
            sweep: Of the text.
            batches: The text.
            held_out_tokens: Attended tokens to hold out, as far as there are that many.
        """
        sequences = split_sequences(batches, held_out_tokens)
        places = split_places(batches, held_out_tokens)
        return cls(*(rows_of(sweep, *pair) for pair in zip(sequences, places, strict=True)))


class SweptComparison(Comparison):
    """Compares a dense model that is swept through with the same model with ghosts in some gaps.

    Each rank works on the sequences whose states are on its shelf.

    Args:
        sweep: With the dense model's states below the first gap and behind the last layer on its
            shelf.
        gaps: The gaps with their ghosts, ascending.
        split: The text.
    """

    def __init__(self, sweep: Sweep, gaps: Sequence[Gap], split: SweptSplit) -> None:
        ghosts = [gap.ghost for gap in gaps if gap.ghost is not None]
        super().__init__(MovedGhosts(ghosts), len(split.train))
        self._sweep, self._source, self._shelf = sweep, sweep.source, sweep.shelf
        self._train = split.train
        self._top = sweep.source.decoder.num_layers
        self._way = _way_up(gaps, self._top)
        self._judges = self._passes(split.judges)
        self._judged = [item.batch for item in self._judges]

    def gradients(self, numbers: Sequence[int]) -> list[GhostSlope]:
        """Return the sums of each ghost over some training sequences, of all ranks."""
        passes = self._passes(self._train[number] for number in numbers)
        self._up(passes, self.moved.parameters64(), keep=True)
        with self._exit() as end, span("divergence"):
            for place, item in enumerate(passes):
                states = self._shelf.get(_states(0, self._top), place)
                gradient = torch.zeros_like(states)
                counted = item.batch.attention_mask.bool()
                exit_divergence(end, end, self._dense(self._top, item), states, counted, gradient)
                self._shelf.add(_gradient(self._top), gradient)
        slopes = [GhostSlope(ghost) for ghost in self.moved.ghosts]
        with span("backward"):
            self._down(passes, slopes)
        for slope in slopes:
            slope.add_ranks()
        return slopes

    def value(self) -> float:
        """Return the mean divergence per attended held-out token, nats."""
        self._up(self._judges, self.moved.parameters64())
        found = 0.0
        with self._exit() as end, span("divergence"):
            for place, item in enumerate(self._judges):
                states = self._shelf.get(_states(0, self._top), place)
                counted = item.batch.attention_mask.bool()
                found += exit_divergence(end, end, self._dense(self._top, item), states, counted)
        self._shelf.drop(_states(0, self._top))
        sums = torch.tensor([found, token_count(self._judged)], dtype=torch.float64)
        distributed.add_up([sums])
        return float(sums[0] / sums[1])

    def local_model(
        self, point: Sequence[Tensor], directions: Sequence[Sequence[Tensor]]
    ) -> tuple[float, Tensor, Tensor]:
        """Return the divergence, its slope and its curvature along some directions."""
        count = len(directions)
        self._up(self._judges, point, directions)
        sums = [torch.zeros([count] * axes, dtype=torch.float64) for axes in range(3)]
        with self._exit() as end, span("local model"):
            for place, item in enumerate(self._judges):
                lists = (_states(number, self._top) for number in range(1 + count))
                states, *others = (self._shelf.get(name, place) for name in lists)
                dense, counted = self._dense(self._top, item), item.batch.attention_mask.bool()
                found = exit_local_divergence(end, dense, states, others, counted)
                for total, part in zip(sums, found, strict=True):
                    total += part
        for number in range(1 + count):
            self._shelf.drop(_states(number, self._top))
        return mean_over_ranks(float(sums[0]), sums[1], sums[2], self._judged)

    def keep(self, facts: Sequence[CorrectionFacts], last: Sequence[Tensor] | None) -> None:
        """Keep what the corrections have come to, where the shelf is one that a run goes on from.

        What was kept the time before stays too: a rank may have been stopped in between.
        """
        if not self._shelf.goes_on:
            return
        for tensor in (*self.moved.parameters, *(last or ())):
            self._shelf.add(_step(len(facts)), tensor)
        self._shelf.drop(_step(len(facts) - 2))
        self._shelf.keep({_FACTS: [asdict(fact) for fact in facts]})

    def kept(self) -> tuple[list[CorrectionFacts], list[Tensor] | None]:
        """Return what an earlier run has kept, with the ghosts moved to where it had come."""
        kept = [CorrectionFacts(**fact) for fact in self._shelf.facts.get(_FACTS, [])]
        facts = kept[: min(distributed.gather(len(kept)))]
        if len(facts) < len(kept):  # another rank was stopped before it kept the last
            self._shelf.drop(_step(len(kept)))
            self._shelf.keep({_FACTS: [asdict(fact) for fact in facts]})
        if not facts:
            return [], None
        count = len(self.moved.parameters) * (1 + any(fact.accepted for fact in facts))
        tensors = [self._shelf.get(_step(len(facts)), place) for place in range(count)]
        self.moved.set_parameters(tensors[: len(self.moved.parameters)])
        return facts, tensors[len(self.moved.parameters) :] or None

    def _passes(self, rows: Iterable[Row]) -> list[Pass]:
        """Return the passes of this rank's among some sequences.

        A pass holds sequences of one batch of the text, which is one rank's: any number of ranks
        computes the same passes.
        """
        # One without tokens has nothing to learn from, or to be judged by.
        own = [row for row in rows if row.place is not None and row.batch.num_tokens]
        passes: list[Pass] = []
        with self._source.embedding():
            for _, batch_rows in groupby(own, lambda row: row.place):
                left = list(batch_rows)
                for batch in in_passes([row.batch for row in left]):
                    count, calls = len(batch.input_ids), self._source.embed(batch)[1]
                    passes.append(Pass(batch, left[:count], calls))
                    left = left[count:]
        return passes

    def _dense(self, boundary: int, item: Pass) -> Tensor:
        """Return the dense model's states of a pass at a boundary that is on the shelf."""
        found = []
        for place, rows in groupby(item.rows, lambda row: row.place):
            assert place is not None
            found.append(self._sweep.state(boundary, place)[[row.row for row in rows]])
        return torch.cat(found)

    def _entering(self, gap: Gap, number: int, place: int, item: Pass) -> Tensor:
        """Return the states of a pass that enter a gap, once its layers below were gone through."""
        if gap is self._way[0]:
            return self._dense(gap.start, item)
        return self._shelf.get(_states(number, gap.start), place)

    @contextmanager
    def _exit(self) -> Iterator[Exit]:
        with self._source.head():
            yield Exit(self._source.decoder.model)

    @torch.no_grad()
    def _up(
        self,
        passes: Sequence[Pass],
        point: Sequence[Tensor],
        directions: Sequence[Sequence[Tensor]] = (),
        keep: bool = False,
    ) -> None:
        """Take passes from the first gap to the top, as a point has it and as directions have it.

        Args:
            passes: The passes.
            point: Parameters of the ghosts, fp64, which they are left at.
            directions: Changes of them; the states of each are lists of their own.
            keep: Whether what enters each layer stays on the shelf.
        """
        with span("ghosted model"):
            for position, stage in enumerate(self._way):
                if isinstance(stage, Gap):
                    for number, direction in enumerate([None, *directions]):
                        self.moved.set_parameters(_moved(point, direction))
                        self._through_gap(stage, passes, number)
                else:
                    above = (item for item in self._way[position + 1 :] if isinstance(item, int))
                    self._through_layer(stage, next(above, None), passes, 1 + len(directions))
                for number in range(0 if keep else 1 + len(directions)):
                    self._shelf.drop(_states(number, _ends(stage)[0]))
        self.moved.set_parameters(point)

    def _through_gap(self, gap: Gap, passes: Sequence[Pass], number: int) -> None:
        for place, item in enumerate(passes):
            x = self._entering(gap, number, place, item)
            self._shelf.add(_states(number, gap.stop), _ghost_in(gap, item)(x))

    def _through_layer(
        self, index: int, then: int | None, passes: Sequence[Pass], lists: int
    ) -> None:
        with self._source.layer(index, then) as layer:
            for number in range(lists):
                for place, item in enumerate(passes):
                    x, call = self._shelf.get(_states(number, index), place), item.calls[index]
                    there = x if call is None else call.run(layer, x)
                    self._shelf.add(_states(number, index + 1), there)

    @torch.no_grad()
    def _down(self, passes: Sequence[Pass], slopes: Sequence[GhostSlope]) -> None:
        """Take the gradients of passes from the top to the first gap, and add them to the sums.

        The states on the shelf, which a way up has kept there, are used up.
        """
        left = list(slopes)
        for position, stage in reversed(list(enumerate(self._way))):
            if isinstance(stage, Gap):
                self._back_through_gap(stage, passes, left.pop())
            else:
                below = (item for item in self._way[:position][::-1] if isinstance(item, int))
                self._back_through_layer(stage, next(below, None), passes)
            self._shelf.drop(_states(0, _ends(stage)[1]))
            self._shelf.drop(_gradient(_ends(stage)[1]))

    def _back_through_gap(self, gap: Gap, passes: Sequence[Pass], slope: GhostSlope) -> None:
        assert gap.ghost is not None
        for place, item in enumerate(passes):
            x = self._entering(gap, 0, place, item)
            y = self._shelf.get(_states(0, gap.stop), place)
            gradient = self._shelf.get(_gradient(gap.stop), place)
            slope.add(x, y, gradient, mapped_tokens(gap.ghost, item.batch))
            if gap is not self._way[0]:
                found = _handed_on(_ghost_in(gap, item), x, gradient)
                self._shelf.add(_gradient(gap.start), found)

    def _back_through_layer(self, index: int, then: int | None, passes: Sequence[Pass]) -> None:
        with self._source.layer(index, then) as layer, frozen(layer):
            for place, item in enumerate(passes):
                gradient, call = self._shelf.get(_gradient(index + 1), place), item.calls[index]
                if call is not None:
                    x = self._shelf.get(_states(0, index), place)
                    gradient = _handed_on(partial(call.run, layer), x, gradient)
                self._shelf.add(_gradient(index), gradient)


def _way_up(gaps: Sequence[Gap], top: int) -> list[Gap | int]:
    """Return what states go through from the first gap to the top: gaps, and layers by number."""
    begins = {gap.start: gap for gap in gaps}
    way: list[Gap | int] = []
    boundary = gaps[0].start
    while boundary < top:
        way.append(begins.get(boundary, boundary))
        boundary = _ends(way[-1])[1]
    return way


def _ends(stage: Gap | int) -> tuple[int, int]:
    """Return the boundaries below and above a gap or a layer."""
    return (stage.start, stage.stop) if isinstance(stage, Gap) else (stage, stage + 1)


def _moved(point: Sequence[Tensor], direction: Sequence[Tensor] | None) -> Sequence[Tensor]:
    """Return where a direction ends that leads away from a point; the point if there is none."""
    if direction is None:
        return point
    return [old + change for old, change in zip(point, direction, strict=True)]


def _ghost_in(gap: Gap, item: Pass) -> Callable[[Tensor], Tensor]:
    """Return what the ghost of a gap makes of the states of a pass."""
    ghost = gap.on(item.batch)[2]
    assert ghost is not None
    return ghost


def _handed_on(function: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient by x of what has a gradient by function(x)."""
    with torch.enable_grad():
        given = x.detach().requires_grad_()
        (found,) = torch.autograd.grad(function(given), given, gradient)
    return found


def _states(number: int, boundary: int) -> str:
    return f"moved-{number}-{boundary:04d}"


def _gradient(boundary: int) -> str:
    return f"gradient-{boundary:04d}"


def _step(count: int) -> str:
    return f"correction-{count:04d}"
