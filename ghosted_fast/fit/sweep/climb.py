"""The way up: all text goes through one layer, then through the next.

Source: ours. Others go layer by layer too (GPTQ, arXiv 2210.17323), with one layer's aim in mind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ghosted_fast import distributed
from ghosted_fast.fit.sweep.shelf import Shelf
from ghosted_fast.fit.walk import Listener, Turn, finish, show
from ghosted_fast.models.gap import Gap
from ghosted_fast.models.unloaded.source import Calls, LayerSource
from ghosted_fast.statistics.sample import Interval
from ghosted_fast.text.batches import Batch, iterate_batches
from ghosted_fast.text.progress import progress_bar


def boundary_name(boundary: int) -> str:
    """Return what the list of the dense model's states at a boundary is called."""
    return f"boundary-{boundary:04d}"


@dataclass(eq=False)
class SweptText:
    """A text that is swept: the batches of this rank, and how much there is in all.

    Attributes:
        turns: This rank's batches.
        sequences: Sequences of the whole text.
        tokens: Its attended tokens.
        calls: What each layer is called with, for each of the batches; known from the bottom on.
    """

    turns: list[Turn]
    sequences: int
    tokens: int
    calls: list[Calls] = field(default_factory=list)

    @classmethod
    def of(cls, batches: Iterable[Any], device: torch.device) -> SweptText:
        """Return the text of some batches; the ranks take turns with those that hold tokens."""
        turns, sequences, tokens, place = [], 0, 0, 0
        for index, batch in enumerate(iterate_batches(batches, device)):
            count = batch.num_tokens
            if count > 0 and distributed.is_own(place):
                turns.append(Turn(batch, index, sequences, True))
            place += count > 0
            sequences += len(batch.input_ids)
            tokens += count
        return cls(turns, sequences, tokens)

    @property
    def own_tokens(self) -> int:
        """Tokens of this rank's batches, padding included."""
        return sum(turn.batch.input_ids.numel() for turn in self.turns)


@dataclass(frozen=True, eq=False)
class Row:
    """One sequence, and where it is in the text.

    Attributes:
        number: Its number among those that were asked for.
        batch: Its tokens.
        place: Which of this rank's batches has it; None if another rank's has.
        row: Which row of that batch.
    """

    number: int
    batch: Batch
    place: int | None
    row: int


class Riders:
    """Candidates that go up beside the text: held-out states behind the ghosts of their gaps.

    Args:
        rows: All held-out sequences.
        shelf: Where the states are kept.
        stops: Where candidates will join, for the estimate of what there is to do.
    """

    def __init__(self, rows: Sequence[Row], shelf: Shelf, stops: Iterable[int]) -> None:
        self.rows, self._shelf, self.stops = rows, shelf, sorted(stops)
        self.own = [row for row in rows if row.place is not None]
        self.calls: list[Calls] = []
        self.riding: list[Interval] = []

    def join(self, gap: Gap) -> None:
        """Let a candidate begin where its gap ends."""
        pair = (gap.start, gap.stop)
        for row in self.own:
            assert row.place is not None
            x = self._shelf.get(boundary_name(gap.start), row.place)[row.row : row.row + 1]
            enter = gap.on(row.batch)[2]
            self._shelf.add(_rider_name(pair, gap.stop), x if enter is None else enter(x))
        self.riding.append(pair)

    def advance(self, layer: nn.Module | None, index: int) -> None:
        """Take all candidates through a layer; None for one that does not run on text."""
        for pair in self.riding:
            here, there = (_rider_name(pair, boundary) for boundary in (index, index + 1))
            for place in range(len(self.own)):
                x = self._shelf.get(here, place)
                call = self.calls[place][index]
                self._shelf.add(there, x if layer is None or call is None else call.run(layer, x))

    def leave(self, boundary: int) -> None:
        """Forget the states below a boundary that all have reached."""
        for pair in self.riding:
            self._shelf.drop(_rider_name(pair, boundary - 1))

    def states(self, pair: Interval, boundary: int) -> list[Tensor]:
        """Return a candidate's states at a boundary, for each of this rank's rows."""
        return [
            self._shelf.get(_rider_name(pair, boundary), place) for place in range(len(self.own))
        ]


def _rider_name(pair: Interval, boundary: int) -> str:
    return f"rider-{pair[0]:04d}-{pair[1]:04d}-{boundary:04d}"


@dataclass(frozen=True, eq=False)
class Sweep:
    """What all steps of a sweep share.

    Attributes:
        source: Where the layers come from.
        text: What goes through them.
        shelf: Where the states are kept.
        progress: Whether to show a progress bar on stderr.
    """

    source: LayerSource
    text: SweptText
    shelf: Shelf
    progress: bool = False

    def state(self, boundary: int, place: int) -> Tensor:
        """Return the dense model's states of a batch at a boundary."""
        return self.shelf.get(boundary_name(boundary), place)


def rows_of(
    sweep: Sweep, sequences: Iterable[Batch], places: Iterable[tuple[int, int]]
) -> list[Row]:
    """Return some sequences of the text of a sweep, with where they are.

    Args:
        sweep: Of the text.
        sequences: Of one row each.
        places: The batch of each, by its number in the whole text, and the row in it.
    """
    # A batch without tokens is no rank's: its sequences have nothing to learn from.
    own = {turn.index: place for place, turn in enumerate(sweep.text.turns)}
    device = sweep.source.decoder.device
    return [
        Row(number, batch.to(device), own.get(index), row)
        for number, (batch, (index, row)) in enumerate(zip(sequences, places, strict=True))
    ]


def climb(
    sweep: Sweep,
    top: int,
    reached: Callable[[int], None],
    riders: Riders | None = None,
    last_use: Callable[[int], int] | None = None,
) -> None:
    """Take the text, and the riders, from the embedding up to a boundary; each layer is read once.

    Where the shelf keeps the states of a run that was stopped, it goes on at the last boundary that
    was done, by all ranks: one may have been stopped between two that another has kept.

    Args:
        sweep: The sweep.
        top: The boundary.
        reached: Called with each boundary, once its states are on the shelf. What it does there is
            done again by a run that goes on, unless the boundary behind was reached as well.
        riders: Candidates, which join in `reached`.
        last_use: The last boundary at which the states of one are looked at; by default all stay.
    """
    first = _begun(sweep, riders)
    # What ranks hold is one boundary apart at most, so the states of one more must stay.
    shared = sweep.shelf.goes_on and distributed.count() > 1
    weights = _weights(sweep, top, riders)
    with (
        progress_bar("sweeping", sweep.progress, of=sum(weights), share=True) as bar,
        torch.inference_mode(),
    ):
        _embed(sweep, riders, states_too=first is None)
        if first is None:
            reached(0)
        bar.update(sum(weights[: first or 0]))
        for index in range(first or 0, top):
            _through(sweep, index, index + 1 if index + 1 < top else None, riders)
            _leave(sweep, index - 1 if shared else index, riders, last_use)
            reached(index + 1)
            if shared:
                distributed.gather(None)  # none keeps a boundary that another has yet to reach
            riding = [] if riders is None else riders.riding
            sweep.shelf.keep({"boundary": index + 1, "riding": riding})
            bar.update(weights[index])
        _leave(sweep, top - 1, riders, last_use)


def _begun(sweep: Sweep, riders: Riders | None) -> int | None:
    """Return the boundary that an earlier run had come to, None where there is none to go on from.

    The riders are those that rode there.
    """
    kept = sweep.shelf.kept()
    own = -1 if kept is None else int(kept["boundary"])
    found = distributed.gather(own) if sweep.shelf.goes_on else [own]
    first = min(found)
    if kept is None:
        return None
    if first < 0 or max(found) > first + 1:
        sweep.shelf.forget()
        return None
    riding = [(start, stop) for start, stop in kept["riding"]]
    if own > first:  # another rank was stopped before it kept the last
        sweep.shelf.drop(boundary_name(own))
        for pair in riding:
            sweep.shelf.drop(_rider_name(pair, own))
    if riders is not None:
        riders.riding = [pair for pair in riding if pair[1] <= first]
    return first


def _leave(
    sweep: Sweep, index: int, riders: Riders | None, last_use: Callable[[int], int] | None
) -> None:
    """Forget the states that no one looks at above a boundary."""
    if riders is not None and index >= 0:
        riders.leave(index + 1)
    if last_use is not None:
        for boundary in range(index + 1):
            if last_use(boundary) <= index:
                sweep.shelf.drop(boundary_name(boundary))


def _embed(sweep: Sweep, riders: Riders | None, states_too: bool) -> None:
    """Put the states that enter the first layer on the shelf, and note what layers are given."""
    sweep.text.calls.clear()
    with sweep.source.embedding():
        for turn in sweep.text.turns:
            hidden, calls = sweep.source.embed(turn.batch)
            sweep.text.calls.append(calls)
            if states_too:
                sweep.shelf.add(boundary_name(0), hidden)
        if riders is not None:
            riders.calls = [sweep.source.embed(row.batch)[1] for row in riders.own]


def _through(sweep: Sweep, index: int, then: int | None, riders: Riders | None) -> None:
    """Take all states from one boundary to the next."""
    if index in sweep.source.decoder.contract.resting:
        for place in range(len(sweep.text.turns)):
            sweep.shelf.add(boundary_name(index + 1), sweep.state(index, place))
        if riders is not None:
            riders.advance(None, index)
        return
    with sweep.source.layer(index, then) as layer:
        for place, calls in enumerate(sweep.text.calls):
            call = calls[index]
            assert call is not None
            sweep.shelf.add(boundary_name(index + 1), call.run(layer, sweep.state(index, place)))
        if riders is not None:
            riders.advance(layer, index)


def _weights(sweep: Sweep, top: int, riders: Riders | None) -> list[int]:
    """Return how much work each layer is: the tokens that go through it."""
    own = sweep.text.own_tokens
    if riders is None:
        return [own] * top
    held_out = sum(row.batch.input_ids.numel() for row in riders.own)
    return [own + held_out * sum(stop <= index for stop in riders.stops) for index in range(top)]


def show_stored(sweep: Sweep, listeners: Sequence[Listener], x_name: str | None = None) -> None:
    """Show listeners the states of their intervals, which are on the shelf.

    Args:
        sweep: The sweep.
        listeners: Of any intervals; they get the sums of all ranks.
        x_name: The list of states that enter the intervals, where they are not the dense model's.

    Raises:
        CalibrationError: There are fewer tokens than a listener needs.
        NonFiniteError: An activation is NaN or infinite.
    """
    in_order = sorted(listeners, key=lambda item: item.interval[::-1])
    for pair in sorted({item.interval for item in listeners}, key=lambda pair: pair[::-1]):
        fed = [item for item in in_order if item.interval == pair]
        for place, turn in enumerate(sweep.text.turns):
            x = sweep.shelf.get(x_name or boundary_name(pair[0]), place)
            show(fed, pair, turn, (x, sweep.state(pair[1], place), None))
    width = sweep.source.decoder.hidden_size
    finish(in_order, sweep.text.tokens, sweep.text.sequences, width)
