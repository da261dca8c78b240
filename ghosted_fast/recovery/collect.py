"""One pass of the dense model that feeds the collectors of several recoveries and gaps."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ghosted_fast.fit.collect import check_enough_tokens
from ghosted_fast.models.boundaries import visit_intervals
from ghosted_fast.models.families import hidden_size
from ghosted_fast.recovery.collector import Collector, Sample
from ghosted_fast.recovery.mlp import mlp_output_module
from ghosted_fast.statistics.interval import non_finite
from ghosted_fast.text.batches import Batch, iterate_batches


def collect(
    model: nn.Module,
    batches: Iterable[Any],
    collectors: Sequence[Collector],
    progress: bool = False,
) -> float:
    """Run the dense model once over text and show both ends of its gap to every collector.

    Args:
        model: The dense model.
        batches: Calibration tokens, see `iterate_batches`.
        collectors: Of any recoveries and gaps.
        progress: Whether to show a progress bar on stderr.

    Returns:
        The seconds that the model's own passes took; the collectors know theirs.

    Raises:
        CalibrationError: There are fewer tokens than a collector needs.
        NonFiniteError: An activation is NaN or infinite; the message names boundaries and batch.
    """
    intervals = sorted({(item.start, item.stop) for item in collectors})
    fed = [[item for item in collectors if (item.start, item.stop) == pair] for pair in intervals]
    before = {item.start - 1 for item in collectors if item.needs_mlp_output}
    device = next(model.parameters()).device
    sequences = tokens = 0
    began = time.perf_counter()
    bar = tqdm(desc="calibrating", unit="tok", unit_scale=True, delay=2.0, disable=not progress)
    with bar, _mlp_outputs(model, before) as outputs:
        for index, batch in enumerate(iterate_batches(batches, device)):

            def feed(
                interval: int,
                x: Tensor,
                y: Tensor,
                batch: Batch = batch,
                index: int = index,
                sequences: int = sequences,
            ) -> None:
                start, stop = intervals[interval]
                mlp_output = outputs.get(start - 1)
                if mlp_output is not None:
                    mlp_output = mlp_output.view(x.shape)
                sample = Sample(x, y.to(x.device), mlp_output, batch, index, sequences)
                _check_finite(sample, start, stop)
                for item in fed[interval]:
                    start_time = time.perf_counter()
                    item.update(sample)
                    item.seconds += time.perf_counter() - start_time

            visit_intervals(model, batch, intervals, feed)
            outputs.clear()
            sequences += len(batch.input_ids)
            tokens += batch.num_tokens
            bar.update(batch.num_tokens)
    least = max((item.least_tokens for item in collectors), default=0)
    check_enough_tokens(tokens, least, hidden_size(model))
    return time.perf_counter() - began - sum(item.seconds for item in collectors)


@contextmanager
def _mlp_outputs(model: nn.Module, layers: Iterable[int]) -> Iterator[dict[int, Tensor]]:
    """Keep what some layers add last to the residual stream, by layer, until it is cleared."""
    outputs: dict[int, Tensor] = {}
    handles = []
    for layer in layers:

        def keep(_: nn.Module, __: Any, output: Tensor, layer: int = layer) -> None:
            outputs[layer] = output

        handles.append(mlp_output_module(model, layer).register_forward_hook(keep))
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _check_finite(sample: Sample, start: int, stop: int) -> None:
    attended = sample.attended
    for states in (sample.x, sample.y):
        if not bool(torch.isfinite(states[attended]).all()):
            raise non_finite(start, stop, sample.index, "an attended token is not finite")
