"""The one loop over text: the dense model runs, and listeners see the states at boundaries.

What is learned from a text is learned by listeners: each is shown both ends of one interval of
layers, batch by batch, and one pass serves any number of them. A listener does not know how the
states were made, so the same ones can be fed layer by layer.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ghosted_fast import distributed
from ghosted_fast.errors import CalibrationError
from ghosted_fast.fit.below import Below
from ghosted_fast.models.boundaries import visit_intervals
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.statistics.sample import Interval, Sample
from ghosted_fast.text.batches import Batch, iterate_batches
from ghosted_fast.text.progress import progress_bar
from ghosted_fast.timing.spans import span


class Listener(ABC):
    """Learns something of one interval in a pass of the dense model.

    Attributes:
        interval: The interval whose ends it is shown.
        needs_mlp_output: Whether samples must have `mlp_output`.
        checks_finite: Whether it finds NaN and infinity by itself. For the others the pass does.
        least_tokens: Tokens without which it has learned nothing.
        seconds: Time spent in `update` so far.
    """

    needs_mlp_output = False
    checks_finite = False
    least_tokens = 1

    def __init__(self, interval: Interval) -> None:
        self.interval = interval
        self.seconds = 0.0

    @abstractmethod
    def update(self, sample: Sample) -> None:
        """Take in one batch."""

    def settle(self) -> None:  # noqa: B027 - most have nothing to settle
        """Exchange with the other ranks what the text's first batch decides.

        Called after the last batch, in the order in which a batch visits the intervals.
        """

    def add_ranks(self, num_sequences: int) -> None:
        """Add what the other ranks have seen.

        Args:
            num_sequences: Sequences of the whole text.
        """
        distributed.add_up(self.sums())

    def sums(self) -> list[Tensor]:
        """Return the tensors that add up over ranks, to be changed in place."""
        return []


@dataclass(frozen=True, eq=False)
class Turn:
    """One batch of a text, and its place.

    Attributes:
        batch: The tokens, on the model's device.
        index: Number of the batch.
        sequences: Sequences in the batches before.
        is_own: Whether this rank works on it.
    """

    batch: Batch
    index: int
    sequences: int
    is_own: bool


def turns(
    batches: Iterable[Any], device: torch.device, title: str, progress: bool = False
) -> Iterator[Turn]:
    """Go through a text, with a progress bar; the ranks take turns with batches that hold tokens.

    Args:
        batches: See `iterate_batches`.
        device: Where the tokens go.
        title: What the bar says.
        progress: Whether to show it on stderr.
    """
    sequences = place = 0
    with progress_bar(title, progress, tokens=True) as bar:
        for index, batch in enumerate(iterate_batches(batches, device)):
            count = batch.num_tokens
            yield Turn(batch, index, sequences, count > 0 and distributed.is_own(place))
            place += count > 0
            sequences += len(batch.input_ids)
            bar.update(count)


@distributed.failing_together()
def walk(
    model: Any,
    batches: Iterable[Any],
    listeners: Sequence[Listener],
    *,
    below: Below | None = None,
    title: str = "calibrating",
    progress: bool = False,
) -> float:
    """Run the dense model once over text and show both ends of its interval to every listener.

    Layers above the last interval are not computed, and hidden states are dropped as soon as the
    last interval that needs them is served: memory is the listeners' own and one batch. In a
    process group every rank runs a share of the batches, and then has the sums of all.

    Args:
        model: The dense model.
        batches: Calibration tokens, see `iterate_batches`.
        listeners: Of any intervals.
        below: Gaps below the interval, of which there is one. The states that enter it are then
            those of the model with these gaps; the states that leave it stay those of the dense
            model.
        title: What the progress bar says.
        progress: Whether to show it on stderr.

    Returns:
        The seconds that the model's own passes took; the listeners know theirs.

    Raises:
        CalibrationError: There are fewer tokens than a listener needs.
        NonFiniteError: An activation is NaN or infinite; the message names boundaries and batch.
        RankError: Another rank failed, or is gone.
    """
    decoder = Decoder.of(model)
    intervals = sorted({item.interval for item in listeners})
    fed = [[item for item in listeners if item.interval == pair] for pair in intervals]
    before = {item.interval[0] - 1 for item in listeners if item.needs_mlp_output}
    text = distributed.same_text_everywhere(batches)
    sequences = tokens = 0
    began = time.perf_counter()
    with span("pass"), _mlp_outputs(decoder, before) as outputs:
        for turn in turns(text, decoder.device, title, progress):
            sequences += len(turn.batch.input_ids)
            tokens += turn.batch.num_tokens
            if turn.is_own:

                def hand_on(place: int, x: Tensor, y: Tensor, turn: Turn = turn) -> None:
                    output = outputs.get(intervals[place][0] - 1)
                    show(fed[place], intervals[place], turn, (x, y, output))
                    if below is not None:
                        below.note(turn.index, x, y)

                gone = [gap.on(turn.batch) for gap in below.gaps] if below is not None else []
                begun = below.begun(turn.index, turn.batch) if below is not None else None
                visit_intervals(decoder, turn.batch, intervals, hand_on, gone, begun)
                outputs.clear()
    in_order = sorted(listeners, key=lambda item: item.interval[::-1])
    finish(in_order, tokens, sequences, decoder.hidden_size)
    return time.perf_counter() - began - sum(item.seconds for item in listeners)


def finish(listeners: Sequence[Listener], tokens: int, sequences: int, size: int) -> None:
    """Give listeners that have seen all batches the sums of all ranks.

    Args:
        listeners: In the order in which a batch visits their intervals.
        tokens: Attended tokens of the whole text.
        sequences: Its sequences.
        size: Width of the hidden state.

    Raises:
        CalibrationError: There are fewer tokens than a listener needs.
    """
    for item in listeners:
        item.settle()
    least = max((item.least_tokens for item in listeners), default=0)
    check_enough_tokens(tokens, least, size)
    for item in listeners:
        item.add_ranks(sequences)


def show(
    listeners: Sequence[Listener],
    interval: Interval,
    turn: Turn,
    states: tuple[Tensor, Tensor, Tensor | None],
) -> None:
    """Show the states x and y, and the output of the MLP before x, to the interval's listeners."""
    x, y, mlp_output = states
    if mlp_output is not None:
        mlp_output = mlp_output.view(x.shape)
    sample = Sample(interval, x, y.to(x.device), turn.batch, turn.index, turn.sequences, mlp_output)
    if not all(item.checks_finite for item in listeners):
        _check_finite(sample)
    for item in listeners:
        began = time.perf_counter()
        with span("sums"):
            item.update(sample)
        item.seconds += time.perf_counter() - began


@contextmanager
def _mlp_outputs(decoder: Decoder, layers: Iterable[int]) -> Iterator[dict[int, Tensor]]:
    """Keep what some layers add last to the residual stream, by layer, until it is cleared."""
    outputs: dict[int, Tensor] = {}
    handles = []
    for layer in layers:

        def keep(_: nn.Module, __: Any, output: Tensor, layer: int = layer) -> None:
            outputs[layer] = output

        handles.append(decoder.mlp_output(layer).register_forward_hook(keep))
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _check_finite(sample: Sample) -> None:
    attended = sample.attended
    for states in (sample.x, sample.y):
        if not bool(torch.isfinite(states[attended]).all()):
            raise sample.non_finite("an attended token is not finite")


def check_enough_tokens(count: int, least: int, size: int) -> None:
    """Raise CalibrationError if there are fewer tokens than a fit of width `size` needs."""
    if count < least:
        reason = f"2 x the hidden size {size}" if least == 2 * size else "one at least"
        raise CalibrationError(
            f"expected at least {least} calibration tokens ({reason}), got {count}: give more text"
        )
