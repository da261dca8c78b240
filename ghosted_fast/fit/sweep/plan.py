"""What a sweep takes: memory, disk, reads and work, known before it starts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ghosted_fast.errors import CalibrationError
from ghosted_fast.fit.below import most_kept
from ghosted_fast.fit.sweep.correcting import Correcting
from ghosted_fast.fit.sweep.heats import Heats
from ghosted_fast.fit.sweep.shape import Shape
from ghosted_fast.fit.sweep.trying import LISTS_BELOW, Trying, lists_of
from ghosted_fast.models.unloaded.transfers import AHEAD, page_locked_bytes
from ghosted_fast.options import GhostOptions
from ghosted_fast.statistics.interval import interval_bytes
from ghosted_fast.text.batches import Batch

# Python, torch and transformers themselves.
PROGRAM_BYTES = 600 << 20
# Matrices [d, d] in fp64 that a solve holds beside the statistics.
_SOLVE_MATRICES = 8
# What to do where memory does not suffice: without corrections, and with them.
_LESS = "use fewer folds, smaller batches or shorter sequences"
_WHAT_TO_DO = (
    f"allow more, or {_LESS}",
    f"allow more, make no corrections (corrections=0, --corrections 0), or {_LESS}",
)
# Batches of states that are on their way to a device, computed with, or on their way from it.
_IN_FLIGHT = AHEAD + 5
# Vectors of width d in one layer that a token has at once, at most.
_MOST_VECTORS = 24


@dataclass(frozen=True)
class Work:
    """How much a sweep has to do.

    Attributes:
        tokens: Tokens of the text, padding included.
        batch_tokens: Those of its largest batch.
        row_tokens: Those of its longest sequence.
        heats: Of the candidates that race.
        candidates: How many there are.
        length: Layers of each.
        statistics: How many intervals' statistics are gathered.
        boundaries: How many boundaries' states are kept.
        in_sequence: How many gaps are fitted one after the other, each on what those below it give.
        correcting: How the ghosts are corrected; None for not at all.
        trying: How the number of layers is found; None where it is given.
    """

    tokens: int
    batch_tokens: int
    row_tokens: int
    heats: Heats
    candidates: int
    length: int
    statistics: int
    boundaries: int
    in_sequence: int = 1
    correcting: Correcting | None = None
    trying: Trying | None = None

    @classmethod
    def of(
        cls,
        batches: Sequence[Batch],
        shape: Shape,
        chosen: int | None,
        heats: Heats,
        gaps: int = 0,
        in_sequence: bool = False,
    ) -> Work:
        """Return that of a text.

        Args:
            batches: The text.
            shape: That of the model.
            chosen: How many layers the criterion "ghost" chooses; None for given layers, or another
                criterion.
            heats: Of the candidates that race.
            gaps: How many gaps are fitted where `chosen` is None.
            in_sequence: Whether those are fitted one after the other.
        """
        sizes = [batch.input_ids.numel() for batch in batches] or [0]
        count = shape.num_layers - chosen + 1 if chosen is not None else 0
        return cls(
            tokens=sum(sizes),
            batch_tokens=max(sizes),
            row_tokens=max((batch.input_ids.shape[1] for batch in batches), default=0),
            heats=heats,
            candidates=count,
            length=chosen or 0,
            statistics=count + 1 if count else gaps,
            boundaries=shape.num_layers + 1,
            in_sequence=gaps if in_sequence and not count else 1,
        )


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep takes.

    Attributes:
        memory_bytes: The most memory at any time; of the host, where a device computes.
        disk_bytes: States in files; 0 where they fit in memory.
        read_bytes: What is read of the checkpoint, at most, if each correction takes a usual step.
        resident_bytes: What the model and its pass would take in memory, the device's if it is one
            that computes.
        prefetch: Whether the next layer is read while one computes.
        operations: Multiplications and additions.
        corrections: How many corrections that is with, at most.
        correction_bytes: What each of them reads of the checkpoint.
        numbers_tried: How many numbers of layers are tried for a bound, at most.
        device_bytes: The most memory of the device at any time; 0 where the processor computes.
    """

    memory_bytes: int
    disk_bytes: int
    read_bytes: int
    resident_bytes: int
    prefetch: bool
    operations: float
    corrections: int = 0
    correction_bytes: int = 0
    numbers_tried: int = 0
    device_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        return asdict(self)


def plan_sweep(
    shape: Shape,
    work: Work,
    options: GhostOptions,
    memory: int,
    on_disk: bool = False,
    device_memory: int | None = None,
) -> SweepPlan:
    """Decide how a model is swept through within some memory.

    Args:
        shape: The model's sizes.
        work: What there is to do.
        options: How ghosts are fitted.
        memory: Bytes that all may take; of the host, where a device computes.
        on_disk: Whether states go to files in any case.
        device_memory: Bytes that all may take on the device; None where the processor computes.

    Raises:
        CalibrationError: It does not suffice for one layer, or for one interval's statistics.
    """
    read = shape.all_bytes - shape.beside[0] + sum(shape.beside)
    if work.in_sequence > 1:  # the layers between the gaps are read again
        read += (shape.num_layers - work.in_sequence) * shape.read_layer_bytes
    if work.candidates:
        read += work.heats.read_again(shape, shape.num_layers - work.length)
    if work.trying is not None:
        read += work.trying.read_bytes(shape)
    steps = each = 0
    if work.correcting is not None:
        steps, each = work.correcting.steps, work.correcting.read_bytes(shape)
    best: SweepPlan | None = None
    for prefetch, in_memory in ((True, True), (True, False), (False, False)):
        if in_memory and on_disk:
            continue
        stored = _stored_bytes(shape, work, in_memory)
        inside, on_device = _most_memory(shape, work, options, prefetch), 0
        if device_memory is not None:
            inside, on_device = host_and_device(shape, work, options, prefetch)
        best = SweepPlan(
            memory_bytes=inside + (stored if in_memory else 0),
            disk_bytes=0 if in_memory else stored,
            read_bytes=read + steps * each,
            resident_bytes=resident_bytes(shape, work, options),
            prefetch=prefetch,
            operations=_operations(shape, work),
            corrections=steps,
            correction_bytes=each,
            numbers_tried=0 if work.trying is None else work.trying.most,
            device_bytes=on_device,
        )
        if best.memory_bytes <= memory and on_device <= (device_memory or 0):
            return best
    assert best is not None
    least, found, whose = best.memory_bytes, memory, "memory"
    if device_memory is not None:
        whose = "the host's memory"
        if best.device_bytes > device_memory:
            least, found, whose = best.device_bytes, device_memory, "the device's memory"
    raise CalibrationError(
        f"expected at least {least / 1e9:.1f} GB of {whose} to sweep through this model "
        f"(its largest layer has {shape.layer_bytes / 1e9:.1f} GB, the statistics of one interval "
        f"{interval_bytes(shape.hidden_size, options) / 1e9:.1f} GB), got {found / 1e9:.1f} GB: "
        f"{_WHAT_TO_DO[work.correcting is not None]}"
    )


def resident_bytes(shape: Shape, work: Work, options: GhostOptions) -> int:
    """Return the memory that the model and a pass of it take, with one interval's statistics.

    Where several gaps are fitted one after the other, that includes the states that are kept from
    one to the next.
    """
    logits = work.batch_tokens * shape.vocabulary * shape.itemsize
    statistics = interval_bytes(shape.hidden_size, options) + _solve_bytes(shape)
    needed = PROGRAM_BYTES + shape.all_bytes + max(logits, statistics) + _activations(shape, work)
    if work.in_sequence > 1:
        needed += most_kept(work.tokens * shape.hidden_size * shape.itemsize)
    return needed


def _stored_bytes(shape: Shape, work: Work, in_memory: bool) -> int:
    """Return the bytes of all states on the shelf, at most."""
    state = shape.hidden_size * shape.itemsize
    stored = work.tokens * state * work.boundaries
    if work.candidates:
        stored += work.heats.tokens * state * lists_of(work.candidates, in_memory)
    beside = LISTS_BELOW * work.tokens * state if work.in_sequence > 1 else 0
    if work.trying is not None:
        beside = max(beside, work.trying.stored_bytes(shape, in_memory))
    if work.correcting is not None:
        stored += work.correcting.stored_bytes(shape)
    return stored + beside


def _most_memory(shape: Shape, work: Work, options: GhostOptions, prefetch: bool) -> int:
    """Return the most memory at any time, without the states on the shelf."""
    coming = shape.layer_bytes if prefetch else 0
    scored = bool(work.candidates) or work.trying is not None
    logits = work.row_tokens * shape.vocabulary * shape.itemsize
    bottom, top = shape.beside
    phases = [
        bottom + _activations(shape, work),
        shape.layer_bytes + coming + _activations(shape, work),
        coming + interval_bytes(shape.hidden_size, options) + _solve_bytes(shape),
        top + 2 * logits if scored else 0,
    ]
    if work.correcting is not None:
        inside = _activations(shape, replace(work, batch_tokens=work.correcting.pass_tokens))
        layers, solve = shape.layer_bytes + coming, _solve_bytes(shape)
        phases.append(work.correcting.memory_bytes(shape, layers, inside, solve))
    return PROGRAM_BYTES + max(phases)


def host_and_device(
    shape: Shape, work: Work, options: GhostOptions, prefetch: bool
) -> tuple[int, int]:
    """Return the most memory of the host and of the device at any time, where a device computes.

    Without the states on the shelf, which is the host's.
    """
    buffer, made = shape.on_device
    there = _most_memory(replace(shape, layer_bytes=made), work, options, prefetch=False)
    batch = work.batch_tokens * shape.hidden_size * shape.itemsize
    device = there + (2 if prefetch else 1) * buffer + _IN_FLIGHT * batch
    # What stands beside the layers is read whole; layers are stood in for, one at a time.
    host = page_locked_bytes(buffer) + max(*shape.beside, shape.layer_bytes)
    return PROGRAM_BYTES + host + _IN_FLIGHT * page_locked_bytes(batch), device


def _activations(shape: Shape, work: Work) -> int:
    """Return the bytes that one batch takes inside a layer."""
    vectors = min(_MOST_VECTORS, 4 + shape.layer_parameters / shape.hidden_size**2)
    return int(work.batch_tokens * shape.hidden_size * vectors * shape.itemsize)


def _solve_bytes(shape: Shape) -> int:
    return _SOLVE_MATRICES * 8 * shape.hidden_size**2


def _operations(shape: Shape, work: Work) -> float:
    """Return how many multiplications and additions a sweep does, about."""
    judged = work.heats.judged(work.candidates)
    riding = judged * (shape.num_layers - work.length) / 2
    layers = 2.0 * shape.layer_parameters * (work.tokens * shape.num_layers + riding)
    square = float(shape.hidden_size) ** 2
    sums = 4.0 * square * work.tokens * work.statistics
    solves = 20.0 * square * shape.hidden_size * work.statistics
    head = 2.0 * shape.vocabulary * shape.hidden_size * judged
    found = layers + sums + solves + head
    if work.correcting is not None:
        found += work.correcting.steps * work.correcting.operations(shape)
    if work.trying is not None:
        found += work.trying.operations(shape)
    return found


def operations_per_second(dtype: torch.dtype, width: int, device: torch.device) -> float:
    """Measure how many multiplications and additions this machine does in a product of states.

    Args:
        dtype: Of the model.
        width: Its hidden size.
        device: What computes.
    """
    x = torch.ones(512, width, dtype=dtype, device=device)
    weight = torch.ones(4 * width, width, dtype=dtype, device=device)

    def multiply() -> None:
        float(torch.nn.functional.linear(x, weight)[0, 0])  # waits for a device

    multiply()  # what is loaded once
    began, rounds = time.perf_counter(), 0
    while time.perf_counter() - began < 0.3:
        multiply()
        rounds += 1
    return 2.0 * 512 * 4 * width * width * rounds / (time.perf_counter() - began)
