"""The way up: all text goes through one layer, then through the next.

Source: ours. Others go layer by layer too (GPTQ, arXiv 2210.17323), with one layer's aim in mind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ghosted_fast import distributed
from ghosted_fast.fit.sweep.riders import Riders, Row
from ghosted_fast.fit.sweep.shelf import Shelf, boundary_name
from ghosted_fast.fit.walk import Listener, Turn, finish, show
from ghosted_fast.models.gap import Gap
from ghosted_fast.models.unloaded.source import Calls, LayerSource
from ghosted_fast.statistics.sample import Interval
from ghosted_fast.text.batches import Batch, iterate_batches
from ghosted_fast.text.progress import progress_bar
from ghosted_fast.timing.spans import span

# What a shelf keeps the facts of a ride under, and of the heat behind it that is on its way.
RIDE, HEAT = "ride", "heat"


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
    was done; from the bottom, where one rank was stopped before a candidate joined and another was
    not.

    Args:
        sweep: The sweep.
        top: The boundary.
        reached: Called with each boundary, once its states are on the shelf. What it does there is
            done again by a run that goes on, unless the boundary behind was reached as well.
        riders: Candidates, which join in `reached`.
        last_use: The last boundary at which the states of one are looked at; by default all stay.
    """
    begun = sweep.shelf.kept()
    if not _same_on_all_ranks([] if begun is None else begun["riding"]):
        sweep.shelf.forget()
        begun = None
    first = 0 if begun is None else int(begun["boundary"])
    if begun is not None and riders is not None:
        riders.riding = [(start, stop) for start, stop in begun["riding"]]
    weights = _weights(sweep, top, riders)
    with (
        progress_bar("sweeping", sweep.progress, of=sum(weights), share=True) as bar,
        torch.inference_mode(),
    ):
        _embed(sweep, riders, states_too=begun is None)
        if begun is None:
            reached(0)
        bar.update(sum(weights[:first]))
        for index in range(first, top):
            _through(sweep, index, index + 1 if index + 1 < top else None, riders)
            if last_use is not None:
                for boundary in range(index + 1):
                    if last_use(boundary) <= index:
                        sweep.shelf.drop(boundary_name(boundary))
            reached(index + 1)
            riding = [] if riders is None else riders.riding
            sweep.shelf.keep({"boundary": index + 1, "riding": riding})
            bar.update(weights[index])


def ride(
    sweep: Sweep, riders: Riders, stops: Iterable[int], reached: Callable[[int], None], name: str
) -> None:
    """Take candidates to the top past the text, whose states are at all boundaries already.

    The layers from the lowest of their gaps' ends on are read once. Like a climb it goes on at the
    last boundary that was done.

    Args:
        sweep: The sweep, after a climb to the top that the riders were given to.
        riders: Which nobody rides with.
        stops: Where candidates will join.
        reached: As for `climb`, from the lowest stop on.
        name: What this ride is called among those of the sweep.
    """
    shelf, top = sweep.shelf, sweep.source.decoder.num_layers
    riders.stops, riders.riding, riders.heat = sorted(stops), [], 0
    first = riders.stops[0]
    begun = shelf.facts.get(RIDE)
    joined = begun and [begun["name"], begun["riding"]]
    goes_on = _same_on_all_ranks(joined) and begun is not None and begun["name"] == name
    if begun is not None:
        riding = [(start, stop) for start, stop in begun["riding"]]
        if goes_on:
            first, riders.riding = int(begun["boundary"]), riding
        else:
            riders.get_off(riding, top)
            shelf.keep({RIDE: None, HEAT: None})
    if not goes_on:
        with torch.inference_mode():
            reached(first)
    _take_up(sweep, riders, first, reached, name, {"key": RIDE, "name": name})


def ride_on(sweep: Sweep, riders: Riders, heat: int, running: Sequence[Interval]) -> None:
    """Take candidates to the top with the rows of another heat, past those that went before.

    The layers from the lowest of their gaps' ends on are read once more. A run that was stopped
    goes on at the last boundary that was done, each rank at its own.

    Args:
        sweep: The sweep.
        riders: Whose candidates have all joined.
        heat: The heat, from 1 on.
        running: The candidates that are still in the race.
    """
    riders.heat, riders.stops = heat, sorted(stop for _, stop in running)
    begun = sweep.shelf.facts.get(HEAT)
    if not running or (begun is not None and begun["heat"] > heat):
        return

    def reached(boundary: int) -> None:
        riders.riding += [pair for pair in running if pair[1] == boundary]

    if begun is not None and begun["heat"] == heat:
        first = int(begun["boundary"])
        riders.riding = [pair for pair in running if pair[1] <= first]
    else:
        first, riders.riding = riders.stops[0], []
        reached(first)
    name = f"heat {heat + 1} of {riders.heats}"
    _take_up(sweep, riders, first, reached, name, {"key": HEAT, "heat": heat})


def _take_up(
    sweep: Sweep,
    riders: Riders,
    first: int,
    reached: Callable[[int], None],
    name: str,
    facts: dict[str, Any],
) -> None:
    """Take riders from a boundary to the top past the text, see `ride`."""
    top = sweep.source.decoder.num_layers
    weights = _weights(sweep, top, riders, with_text=False)
    with (
        progress_bar(name, sweep.progress, of=sum(weights), share=True) as bar,
        torch.inference_mode(),
    ):
        bar.update(sum(weights[:first]))
        for index in range(first, top):
            then = index + 1 if index + 1 < top else None
            _through(sweep, index, then, riders, with_text=False)
            reached(index + 1)
            here = {**facts, "boundary": index + 1, "riding": riders.riding}
            sweep.shelf.keep({facts["key"]: here})
            bar.update(weights[index])


def pass_gap(sweep: Sweep, gap: Gap, boundary: int, x_name: str | None = None) -> str:
    """Take the states of the text that enter a gap through its ghost, and on to a boundary above.

    Args:
        sweep: The sweep.
        gap: The gap, with its ghost.
        boundary: Where the next gap begins.
        x_name: The list of states that enter the gap, which is forgotten; None for the dense
            model's, which stay.

    Returns:
        The list of states at the boundary.
    """
    shelf, name = sweep.shelf, _below_name(gap.stop)
    with torch.inference_mode():
        for place, turn in enumerate(sweep.text.turns):
            x = shelf.get(x_name or boundary_name(gap.start), place)
            enter = gap.on(turn.batch)[2]
            shelf.add(name, x if enter is None else enter(x))
        for index in range(gap.stop, boundary):
            above = _below_name(index + 1)
            then = index + 1 if index + 1 < boundary else None
            with sweep.source.layer(index, then) as layer:
                for place, calls in enumerate(sweep.text.calls):
                    x, call = shelf.get(name, place), calls[index]
                    shelf.add(above, x if call is None else call.run(layer, x))
            shelf.drop(name)
            name = above
    if x_name is not None:
        shelf.drop(x_name)
    return name


def _below_name(boundary: int) -> str:
    return f"below-{boundary:04d}"


def _same_on_all_ranks(value: Any) -> bool:
    first, *others = distributed.gather(value)
    return all(other == first for other in others)


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


def _through(
    sweep: Sweep, index: int, then: int | None, riders: Riders | None, with_text: bool = True
) -> None:
    """Take all states from one boundary to the next."""
    if index in sweep.source.decoder.contract.resting:
        for place in range(len(sweep.text.turns)) if with_text else ():
            sweep.shelf.add(boundary_name(index + 1), sweep.state(index, place))
        if riders is not None:
            riders.advance(None, index)
        return
    with sweep.source.layer(index, then) as layer:
        with span("layers"):
            for place, calls in enumerate(sweep.text.calls) if with_text else ():
                call = calls[index]
                assert call is not None
                there = call.run(layer, sweep.state(index, place))
                sweep.shelf.add(boundary_name(index + 1), there)
        if riders is not None:
            with span("candidates"):
                riders.advance(layer, index)


def _weights(sweep: Sweep, top: int, riders: Riders | None, with_text: bool = True) -> list[int]:
    """Return how much work each layer is: the tokens that go through it."""
    own = sweep.text.own_tokens if with_text else 0
    if riders is None:
        return [own] * top
    return [
        own + riders.tokens * sum(stop <= index for stop in riders.stops) for index in range(top)
    ]


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
    with span("statistics"):
        for pair in sorted({item.interval for item in listeners}, key=lambda pair: pair[::-1]):
            fed = [item for item in in_order if item.interval == pair]
            for place, turn in enumerate(sweep.text.turns):
                x = sweep.shelf.get(x_name or boundary_name(pair[0]), place)
                show(fed, pair, turn, (x, sweep.state(pair[1], place), None))
        width = sweep.source.decoder.hidden_size
        finish(in_order, sweep.text.tokens, sweep.text.sequences, width)
