"""Copies between the host and a device, beside what the device computes.

One stream computes, others copy. What one of them, or the host, does with memory that another uses
is put in order by events:

- what computes waits for the copy that it reads;
- a buffer of a layer is written again once what computed with it is done;
- page-locked memory of the host is written again once the copy from it is done, and looked at once
  the copy into it is;
- states are copied out once what computes them is done.

Source: the streams and events of CUDA, and `torch.Tensor.record_stream`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ghosted_fast.models.unloaded.files import StoredTensor

# Where tensors begin in a buffer: as torch's own allocator lays them, for kernels that look at it.
_ALIGNMENT = 512
# So many batches of states are asked for before the host waits for what computes with the first of
# them: as many are on the device at a time, and the one that is asked for.
AHEAD = 2


class Event(Protocol):
    """A place in the order of a stream."""

    def synchronize(self) -> None:
        """Let the host wait until the stream has come there."""


class Streams(Protocol):
    """What is asked of a device.

    Attributes:
        device: The device.
    """

    device: torch.device

    def computing(self) -> AbstractContextManager[Any]:
        """Return a context in which all is computed on the stream that computes."""

    def host(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return page-locked memory of the host."""

    def memory(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return memory of the device."""

    def mark(self) -> Event:
        """Return an event behind all that was asked of the stream that computes."""

    def wait(self, event: Event) -> None:
        """Let what is computed from now on wait for an event."""

    def fill(self, there: Tensor, held: Tensor, after: Event | None) -> Event:
        """Copy from page-locked memory to the device after an event; return that of its end."""

    def send(self, states: Tensor) -> tuple[Tensor, Event]:
        """Copy states, from any memory of the host, to new memory of the device; likewise.

        The host's may be changed at once, the device's is given back once what computes at that
        time is done.
        """

    def fetch(self, held: Tensor, states: Tensor, after: Event) -> Event:
        """Copy states from the device to page-locked memory after an event; likewise."""


class CudaStreams:
    """The streams of a CUDA device: its default stream computes.

    Others would do as well, but for transformers, which converts weights in threads of its own,
    where the default stream is the current one.

    Args:
        device: The device, with its number.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._compute = torch.cuda.default_stream(device)
        self._layers, self._in, self._out = (torch.cuda.Stream(device) for _ in range(3))

    def computing(self) -> AbstractContextManager[Any]:
        """Return a context in which all is computed on the default stream."""
        return torch.cuda.stream(self._compute)

    def host(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return page-locked memory of the host, of torch's cache of it."""
        with torch.inference_mode(False):
            return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)

    def memory(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return memory of the device."""
        with torch.inference_mode(False):
            return torch.empty(tuple(shape), dtype=dtype, device=self.device)

    def mark(self) -> torch.cuda.Event:
        """Return an event behind all that was asked of the default stream."""
        return _behind(self._compute)

    def wait(self, event: Any) -> None:
        """Let what is computed from now on wait for an event."""
        self._compute.wait_event(event)

    def fill(self, there: Tensor, held: Tensor, after: Any) -> torch.cuda.Event:
        """Copy from page-locked memory to the device after an event; return that of its end."""
        if after is not None:
            self._layers.wait_event(after)
        with torch.cuda.stream(self._layers):
            there.copy_(held, non_blocking=True)
        there.record_stream(self._layers)  # a sweep that fails gives it back meanwhile
        return _behind(self._layers)

    def send(self, states: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        """Copy states, from any memory of the host, to new memory of the device; likewise."""
        held = states.pin_memory()  # which torch's cache keeps until the copy from it is done
        with torch.cuda.stream(self._in):
            there = held.to(self.device, non_blocking=True)
        there.record_stream(self._compute)
        return there, _behind(self._in)

    def fetch(self, held: Tensor, states: Tensor, after: Any) -> torch.cuda.Event:
        """Copy states from the device to page-locked memory after an event; likewise."""
        self._out.wait_event(after)
        with torch.cuda.stream(self._out):
            held.copy_(states, non_blocking=True)
        return _behind(self._out)


def _behind(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event(blocking=True)  # a host that waits leaves its core to others
    event.record(stream)
    return event


def streams_of(device: torch.device) -> Streams | None:
    """Return the streams of a device; None for the processor."""
    return None if device.type == "cpu" else CudaStreams(device)


@dataclass(eq=False)
class Slot:
    """A buffer on a device.

    Attributes:
        memory: Its bytes.
        copied: The end of the copy that it holds.
        used: The end of what computed with it last.
    """

    memory: Tensor
    copied: Event | None = None
    used: Event | None = None


class LayerBuffers:
    """Buffers on a device that hold a layer each, in turn, and page-locked memory to read into.

    Args:
        streams: Those of the device.
        nbytes: Of each buffer, and of the page-locked memory.
        count: How many there are: two where one is filled while another is used.
    """

    def __init__(self, streams: Streams, nbytes: int, count: int) -> None:
        self._streams = streams
        self._held = streams.host([nbytes], torch.uint8)
        memory = (streams.memory([nbytes], torch.uint8) for _ in range(count))
        self._slots = deque(Slot(item) for item in memory)
        self._copied: Event | None = None

    def fill(self, read: Callable[[Tensor], None], nbytes: int) -> Slot:
        """Fill the next buffer, which may not be in use; return while the copy is under way.

        Args:
            read: Puts what the buffer shall hold into page-locked memory [nbytes] uint8.
            nbytes: How much it is.
        """
        slot = self._slots[0]
        self._slots.rotate(-1)
        if self._copied is not None:
            self._copied.synchronize()
        held = self._held[:nbytes]
        read(held)
        slot.copied = self._copied = self._streams.fill(slot.memory[:nbytes], held, slot.used)
        return slot

    @contextmanager
    def using(self, slot: Slot) -> Iterator[None]:
        """Compute with what a buffer holds; then it may be filled again."""
        assert slot.copied is not None
        self._streams.wait(slot.copied)
        try:
            yield
        finally:
            slot.used = self._streams.mark()

    def load(self, places: Mapping[str, StoredTensor]) -> tuple[dict[str, Tensor], Slot]:
        """Read tensors of files into the next buffer, see `fill`.

        Returns:
            The tensors, which lie in the buffer, by name; and the buffer.
        """
        distinct = list(dict.fromkeys(places.values()))  # some names share one

        def read(held: Tensor) -> None:
            for place, part in zip(distinct, _parts(held, distinct), strict=True):
                place.read_into(part)

        slot = self.fill(read, room_for(distinct))
        there = dict(zip(distinct, _parts(slot.memory, distinct), strict=True))
        return {name: there[place] for name, place in places.items()}, slot


def room_for(places: Iterable[StoredTensor]) -> int:
    """Return the bytes of a buffer for some tensors, each counted once."""
    return sum(_aligned(place.nbytes) for place in dict.fromkeys(places))


def page_locked_bytes(nbytes: int) -> int:
    """Return what page-locked memory takes: torch rounds it up to a power of two."""
    return 1 << max(0, nbytes - 1).bit_length()


def _parts(memory: Tensor, places: Iterable[StoredTensor]) -> Iterator[Tensor]:
    """Yield the places of tensors in a buffer [bytes], as tensors."""
    begin = 0
    for place in places:
        part = memory[begin : begin + place.nbytes]
        yield part.view(place.dtype).view(place.shape)
        begin += _aligned(place.nbytes)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True, eq=False)
class Leaving:
    """States on their way from a device.

    Attributes:
        held: Page-locked memory that they are copied to.
        states: Them on the device, kept until they are copied.
        copied: The end of the copy.
    """

    held: Tensor
    states: Tensor
    copied: Event

    def landed(self) -> Tensor:
        """Return them in memory of the host that is not page-locked, once they are there."""
        self.copied.synchronize()
        return self.held.clone()


class StateCopies:
    """Copies states to a device and back, never far ahead of what computes with them.

    Args:
        streams: Those of the device.
    """

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._asked: deque[Event] = deque()

    def bring(self, states: Tensor) -> Tensor:
        """Return states of the host on the device; what is computed from now on waits for them."""
        self._asked.append(self._streams.mark())
        if len(self._asked) > AHEAD:
            self._asked.popleft().synchronize()
        there, copied = self._streams.send(states)
        self._streams.wait(copied)
        return there

    def take(self, states: Tensor) -> Leaving:
        """Begin to copy states from the device, once what computes them is done.

        Args:
            states: They are not changed in place from now on.
        """
        states, held = states.detach(), self._streams.host(states.shape, states.dtype)
        return Leaving(held, states, self._streams.fetch(held, states, self._streams.mark()))
