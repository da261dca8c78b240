"""The order of copies and computing, on streams that take every liberty events leave them."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.simulated_streams import Place, SimulatedStreams
from torch import Tensor

from ghosted_fast.models.unloaded.files import HeldTensor, StoredTensor, tensors_in, write_tensors
from ghosted_fast.models.unloaded.transfers import (
    AHEAD,
    LayerBuffers,
    StateCopies,
    page_locked_bytes,
    room_for,
)

SEEDS = range(40)
LAYERS = 6
Plant = Callable[[pytest.MonkeyPatch], None]


def layers_right(seed: int, count: int) -> bool:
    """Return whether each layer is computed with as it was read, all through.

    With two buffers the next layer is read at any time meanwhile, as by a thread.
    """
    streams, seen, draw = SimulatedStreams(seed), [], random.Random(seed)
    buffers = LayerBuffers(streams, 4, count)

    def read(layer: int) -> Callable[[Tensor], object]:
        return lambda held: held.fill_(layer)

    coming = buffers.fill(read(0), 4)
    for layer in range(LAYERS):
        slot = coming
        with buffers.using(slot):
            moment = draw.randrange(2)
            for step in range(2):
                if count == 2 and step == moment:
                    coming = buffers.fill(read(layer + 1), 4)
                streams.compute(lambda slot=slot: seen.append(slot.memory.tolist()))
        if count == 1:
            coming = buffers.fill(read(layer + 1), 4)
    streams.run_until(None)
    return seen == [[layer] * 4 for layer in range(LAYERS) for _ in range(2)]


def states_right(seed: int) -> bool:
    """Return whether states come back as they were computed from what was brought."""
    streams, found = SimulatedStreams(seed), []
    copies = StateCopies(streams)
    given = [torch.full((2, 3), float(number)) for number in range(LAYERS)]
    leaving = None
    for states in given:
        x = copies.bring(states)
        y = streams.memory([2, 3], torch.float32)
        streams.compute(lambda x=x, y=y: torch.add(x, 1.0, out=y))
        last, leaving = leaving, copies.take(y)
        found += [last.landed()] if last is not None else []
    assert leaving is not None
    found.append(leaving.landed())
    return all(torch.equal(y, x + 1.0) for x, y in zip(given, found, strict=True))


@pytest.mark.parametrize("seed", SEEDS)
def test_layers_and_states_are_whole_in_every_order(seed: int) -> None:
    assert layers_right(seed, 2) and layers_right(seed, 1)
    assert states_right(seed)


def computing_does_not_wait(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SimulatedStreams, "wait", lambda streams, event: None)


def a_buffer_is_used_again_too_early(patch: pytest.MonkeyPatch) -> None:
    fill = SimulatedStreams.fill
    patch.setattr(
        SimulatedStreams,
        "fill",
        lambda streams, there, held, after: fill(streams, there, held, None),
    )


def states_are_fetched_too_early(patch: pytest.MonkeyPatch) -> None:
    start = lambda streams: Place(streams, "compute", 0)  # noqa: E731
    fetch = SimulatedStreams.fetch
    patch.setattr(
        SimulatedStreams,
        "fetch",
        lambda streams, held, states, after: fetch(streams, held, states, start(streams)),
    )


def the_host_does_not_wait(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Place, "synchronize", lambda place: None)


@pytest.mark.parametrize(
    ("plant", "layers", "states"),
    [
        (computing_does_not_wait, True, True),
        (a_buffer_is_used_again_too_early, True, False),
        (states_are_fetched_too_early, False, True),
        (the_host_does_not_wait, True, True),
    ],
)
def test_an_event_that_is_left_out_shows(
    plant: Plant, layers: bool, states: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    assert layers == (not all(layers_right(seed, 2) for seed in SEEDS))
    assert states == (not all(states_right(seed) for seed in SEEDS))


def test_the_host_is_never_far_ahead() -> None:
    streams, computed = SimulatedStreams(), []
    copies = StateCopies(streams)
    for number in range(9):
        copies.bring(torch.zeros(1))
        assert number - len(computed) <= AHEAD
        streams.compute(lambda number=number: computed.append(number))


def test_tensors_are_read_into_a_buffer(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5).bfloat16(),
        "one": torch.tensor(7),
        "none": torch.zeros(0, 4),
        "c": torch.randn(2, 3),
    }
    write_tensors(tmp_path / "x.safetensors", {n: HeldTensor(t) for n, t in tensors.items()})
    places = tensors_in(tmp_path / "x.safetensors")
    turned = StoredTensor(places["c"].path, places["c"].offset, (3, 2), torch.float32, (1, 3))
    places |= {"again": places["a"], "turned": turned}
    tensors |= {"again": tensors["a"], "turned": tensors["c"].mT}
    assert room_for(places.values()) == 4 * 512, "what two names share is there once"
    streams = SimulatedStreams()
    buffers = LayerBuffers(streams, room_for(places.values()), 1)
    for _ in range(2):
        found, slot = buffers.load(places)
        with buffers.using(slot):
            streams.run_until(None)
            assert found.keys() == tensors.keys()
            for name, tensor in tensors.items():
                assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
    assert found["again"] is found["a"]


def test_page_locked_memory_is_rounded_up() -> None:
    assert [page_locked_bytes(n) for n in (1, 2, 3, 4096, 4097)] == [1, 2, 4, 4096, 8192]
