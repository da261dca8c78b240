"""The ranks: processes that share one text, in the default process group of torch.distributed.

Where there is no group, or one of a single process, nothing here costs or changes anything.

Every rank runs the same program on the same model and the same whole text, computes its part of
each pass, and gets the sums of all. What follows from the sums is computed by one rank and given to
the others, so all hold the same bits, whatever their processors do.

Before ranks exchange anything they tell each other whether all is well. A rank that has failed
does so out of turn (`failing_together`), so that the others stop at their next exchange with an
error that names it. A process that ended without a word, or that does not answer within the
time-out of the group, ends the others with `RanksLostError`.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ghosted_fast.errors import ArgumentError, RankError, RanksLostError
from ghosted_fast.text.calibration_text import CalibrationText
from ghosted_fast.text.fingerprints import model_digest

T = TypeVar("T")
R = TypeVar("R")

_ALONE = ContextVar("alone", default=False)
_TOGETHER = ContextVar("together", default=False)


def count() -> int:
    """Return how many ranks share the work; 1 where there is no process group."""
    if _ALONE.get() or not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size()


def index() -> int:
    """Return the number of this rank, from 0."""
    return dist.get_rank() if count() > 1 else 0


def is_first() -> bool:
    """Return whether this is rank 0, or the only process."""
    return index() == 0


def is_writer() -> bool:
    """Return whether transformers saves models in this process: in a group, on rank 0 only."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


@contextmanager
def ignoring_group() -> Iterator[None]:
    """Work in this process only, whatever process group there is."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


@contextmanager
def failing_together() -> Iterator[None]:
    """Leave a block on all ranks alike: an error on one is an error on all. Also a decorator.

    Inside another such block it does nothing.

    Raises:
        RankError: Another rank failed in the block.
        RanksLostError: Another process is gone or silent.
    """
    if count() == 1 or _TOGETHER.get():
        yield
        return
    token = _TOGETHER.set(True)
    try:
        yield
        _all_well()
    except RankError:
        raise
    except Exception as error:
        with suppress(RanksLostError):
            _all_well(error)
        raise
    finally:
        _TOGETHER.reset(token)


def is_own(place: int) -> bool:
    """Return whether this rank does the piece of work of a number."""
    return place % count() == index()


def my_share(items: Iterable[T]) -> Iterator[T]:
    """Return every n-th item, for n ranks: those that this rank works on."""
    return islice(items, index(), None, count())


def my_turns(items: Sequence[T]) -> Iterator[tuple[T, bool]]:
    """Yield `my_share` of items, and as many on every rank.

    For work in which all ranks take part at once. Where the others have one more, the last item
    comes once more.

    Yields:
        The item, and whether it is of this rank's share.
    """
    for start in range(0, len(items), count()):
        place = start + index()
        yield items[min(place, len(items) - 1)], place < len(items)


def same_text_everywhere(batches: Iterable[Any]) -> CalibrationText:
    """Return a text after checking, once, that all ranks were given the same.

    It is held in memory as token ids if there are other ranks.

    Args:
        batches: See `iterate_batches`.

    Raises:
        ArgumentError: They were not.
    """
    text = CalibrationText.of(batches)
    if count() == 1 or text.is_same_everywhere:
        return text
    digests = gather(text.digest)
    for rank, other in enumerate(digests):
        if other != digests[0]:
            raise ArgumentError(
                f"expected the same batches on every rank, got others on rank {rank} than on rank "
                "0: give each the whole text, of which it takes its part by itself, or work in one "
                "process with ghosted_fast.distributed.ignoring_group()"
            )
    text.is_same_everywhere = True
    return text


def check_same(arguments: Mapping[str, Any], model: nn.Module | None = None) -> None:
    """Check that arguments have the same values on all ranks, and a model the same weights.

    Raises:
        ArgumentError: One has not.
    """
    if count() == 1:
        return
    digest = {} if model is None else {"weights of the model": model_digest(model)}
    first, *others = gather({**arguments, **digest})
    for rank, other in enumerate(others, start=1):
        for name in first | other:
            if first.get(name) != other.get(name):
                raise ArgumentError(
                    f"expected the same {name} on every rank, got {first.get(name)!r} on rank 0 "
                    f"and {other.get(name)!r} on rank {rank}"
                )


def gather(value: T) -> list[T]:
    """Return the values of all ranks, in their order. The values hold no tensors."""
    if count() == 1:
        return [value]
    found: list[Any] = [None] * count()
    _all_well()
    with _answering():
        dist.all_gather_object(found, value)
    return found


def add_up(tensors: Sequence[Tensor]) -> None:
    """Replace tensors by their sums over all ranks, in place and in one reduction in fp64.

    Args:
        tensors: Of any dtypes and devices; their shapes are the same on all ranks.
    """
    if count() == 1:
        return
    place = _served_device(tensors[0].device)
    flat = torch.cat([item.detach().to(place, torch.float64).flatten() for item in tensors])
    _all_well()
    with _answering():
        dist.all_reduce(flat)
    for item, total in zip(tensors, flat.split([item.numel() for item in tensors]), strict=True):
        item.copy_(total.view_as(item))


def gather_parts(parts: Sequence[Tensor], wholes: Sequence[Tensor]) -> None:
    """Fill tensors with what the ranks have parts of.

    Args:
        parts: Of each tensor this rank's part, bytes [n]; the same number on all ranks.
        wholes: For each, room for the parts of all ranks in their order, bytes [count * n].
    """
    if not parts or count() == 1:
        return
    _all_well()
    with _answering():
        for part, whole in zip(parts, wholes, strict=True):
            place = _served_device(part.device)
            made = whole if place == whole.device else torch.empty_like(whole, device=place)
            dist.all_gather(list(made.chunk(count())), part.to(place))
            if made is not whole:
                whole.copy_(made)


def one_item_per_rank(
    items: Sequence[T], work: Callable[[T], R], device: torch.device | str | None = None
) -> list[R]:
    """Do something with each item on one rank only, and return all results on all.

    Args:
        items: The same number on all ranks.
        work: What to do; it takes part in no exchange.
        device: Where tensors in the results go; the processor if not given.
    """
    if count() == 1:
        return [work(item) for item in items]
    results: list[R] = []
    for start in range(0, len(items), count()):
        group = items[start : start + count()]
        done = work(group[index()]) if index() < len(group) else None
        results += [_broadcast_from(rank, done, device) for rank in range(len(group))]
    return results


def on_first(work: Callable[[], R], device: torch.device | str | None = None) -> R:
    """Do something on rank 0 only, and return the result on all; see `one_item_per_rank`."""
    return one_item_per_rank([None], lambda _: work(), device)[0]


def from_first(value: T, device: torch.device | str | None = None) -> T:
    """Return the value of rank 0 on all ranks; see `one_item_per_rank` for the device."""
    return on_first(lambda: value, device)


def _broadcast_from(rank: int, value: Any, device: torch.device | str | None) -> Any:
    """Return a value of one rank, on all; tensors keep their bits."""
    sent: list[bytes | None] = [None]
    if rank == index():
        buffer = io.BytesIO()
        torch.save(value, buffer)
        sent = [buffer.getvalue()]
    _all_well()
    with _answering():
        dist.broadcast_object_list(sent, src=rank)
    if rank == index():
        return value
    assert sent[0] is not None
    return torch.load(io.BytesIO(sent[0]), map_location=device or "cpu", weights_only=False)


def _all_well(error: Exception | None = None) -> None:
    """Tell the other ranks of an error, or that there is none, and hear of theirs.

    Raises:
        RankError: Others have failed, and this rank has not.
    """
    told: list[str | None] = [None] * count()
    failed = torch.tensor([float(error is not None)], device=_served_device(torch.device("cpu")))
    with _answering():
        dist.all_reduce(failed, op=dist.ReduceOp.MAX)
        if not failed.item():
            return
        dist.all_gather_object(told, error and f"{type(error).__name__}: {error}")
    if error is None:
        reasons = (f"rank {rank} failed: {text}" for rank, text in enumerate(told) if text)
        raise RankError("; ".join(reasons))


@contextmanager
def _answering() -> Iterator[None]:
    """Turn what torch raises when a process does not answer into an error that says so."""
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise RanksLostError(
            f"rank {index()} has lost the others: a process ended, or did not answer within the "
            f"time-out of the process group. Look at what the others said ({reason})"
        ) from error


def _served_device(device: torch.device) -> torch.device:
    """Return a device, or one that the group serves if it does not serve that."""
    served = [part.partition(":")[0] for part in dist.get_backend_config().split(",")]
    if device.type in served:
        return device
    if "cuda" in served:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(served[0])
