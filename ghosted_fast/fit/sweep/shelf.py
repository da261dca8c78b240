"""Where a sweep keeps hidden states: in memory, or in a folder that a killed run goes on from.

Both are the host's, also where a device computes.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ghosted_fast._atomic_files import write_atomically
from ghosted_fast.errors import ArgumentError
from ghosted_fast.models.unloaded.files import HeldTensor, StoredTensor
from ghosted_fast.models.unloaded.transfers import Leaving, StateCopies

_RECORD = "sweep.json"
_SUFFIX = ".states"


def boundary_name(boundary: int) -> str:
    """Return what the list of the dense model's states at a boundary is called."""
    return f"boundary-{boundary:04d}"


class Shelf(ABC):
    """Lists of states by name.

    Attributes:
        goes_on: Whether a run that was stopped will find what was kept.
        facts: What was kept last beside the lists.
    """

    goes_on = False

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}

    @abstractmethod
    def add(self, name: str, states: Tensor) -> None:
        """Put a tensor at the end of a list."""

    @abstractmethod
    def get(self, name: str, place: int) -> Tensor:
        """Return one of a list."""

    @abstractmethod
    def drop(self, name: str) -> None:
        """Forget a list, if there is one."""

    def keep(self, facts: dict[str, Any]) -> None:  # noqa: B027 - memory keeps nothing
        """Keep the lists as they are now for a run that goes on, and facts beside them.

        Args:
            facts: They are added to those that were kept before, or take their places.
        """

    def kept(self) -> dict[str, Any] | None:
        """Return the facts that were kept last, with the lists as they were then."""
        return None

    def forget(self) -> None:  # noqa: B027 - memory has nothing that was kept
        """Forget all lists and facts that were kept: the run begins anew."""


class MemoryShelf(Shelf):
    """Keeps the tensors themselves."""

    def __init__(self) -> None:
        super().__init__()
        self._lists: dict[str, list[Tensor]] = {}

    def add(self, name: str, states: Tensor) -> None:
        """Put a tensor at the end of a list."""
        self._lists.setdefault(name, []).append(states)

    def get(self, name: str, place: int) -> Tensor:
        """Return one of a list."""
        return self._lists[name][place]

    def drop(self, name: str) -> None:
        """Forget a list, if there is one."""
        self._lists.pop(name, None)


class FolderShelf(Shelf):
    """Keeps the tensors in files, one for each list.

    Args:
        folder: An empty folder, or that of a run that was killed. It is made as needed.
        digest: What stands for all that the states follow from: text, options, checkpoint. "" for a
            folder that no run will go on from.

    Raises:
        ArgumentError: The folder holds something else, or the states of another run.
    """

    def __init__(self, folder: Path, digest: str = "") -> None:
        super().__init__()
        self._folder, self._digest = folder, digest
        self.goes_on = bool(digest)
        self._lists: dict[str, list[StoredTensor]] = {}
        self._kept: frozenset[str] = frozenset()
        folder.mkdir(parents=True, exist_ok=True)
        self._record = folder / _RECORD
        others = [p.name for p in folder.iterdir() if p.suffix != _SUFFIX and p != self._record]
        if others and not self._record.exists():
            raise ArgumentError(
                f"expected an empty folder for the states of a sweep, or that of one which was "
                f"stopped, got {str(folder)!r}, which holds {', '.join(sorted(others)[:3])}"
            )
        if self._record.exists() and json.loads(self._record.read_text())["digest"] != digest:
            raise ArgumentError(
                f"expected the states of the same sweep in {str(folder)!r}, got those of one with "
                "another text, other options or another checkpoint: name another folder, or "
                "remove this one"
            )

    def add(self, name: str, states: Tensor) -> None:
        """Put a tensor at the end of a list."""
        held = self._lists.setdefault(name, [])
        path = self._folder / f"{name}{_SUFFIX}"
        offset = held[-1].offset + held[-1].nbytes if held else 0
        with path.open("r+b" if held else "wb") as file:
            file.seek(offset)
            file.writelines(HeldTensor(states).chunks())
        held.append(StoredTensor(path, offset, tuple(states.shape), states.dtype))

    def get(self, name: str, place: int) -> Tensor:
        """Return one of a list."""
        return self._lists[name][place].read()

    def drop(self, name: str) -> None:
        """Forget a list, if there is one; of one that was kept the file stays until it is not."""
        self._lists.pop(name, None)
        if name not in self._kept:
            (self._folder / f"{name}{_SUFFIX}").unlink(missing_ok=True)

    def keep(self, facts: dict[str, Any]) -> None:
        """Keep the lists as they are now for a run that goes on, and facts beside them."""
        if not self.goes_on:
            return
        self.facts = self.facts | facts
        lists = {
            name: [[item.offset, list(item.shape), str(item.dtype)[6:]] for item in held]
            for name, held in self._lists.items()
        }
        record = {"digest": self._digest, "facts": self.facts, "lists": lists}
        write_atomically(self._record, json.dumps(record))
        self._tidy()

    def kept(self) -> dict[str, Any] | None:
        """Return the facts that were kept last, with the lists as they were then."""
        if not self._record.exists():
            return None
        record = json.loads(self._record.read_text())
        self._lists = {
            name: [
                StoredTensor(
                    self._folder / f"{name}{_SUFFIX}", offset, tuple(shape), getattr(torch, dtype)
                )
                for offset, shape, dtype in held
            ]
            for name, held in record["lists"].items()
        }
        self._tidy()
        self.facts = record["facts"]
        return self.facts

    def forget(self) -> None:
        """Forget all lists and facts that were kept: the run begins anew."""
        self._record.unlink(missing_ok=True)
        self._lists, self.facts = {}, {}
        self._tidy()

    def clear(self) -> None:
        """Remove all files, and the folder if nothing else is in it."""
        self.forget()
        if not any(self._folder.iterdir()):
            self._folder.rmdir()

    def _tidy(self) -> None:
        """Remove the files of lists that are no more; those that are, are the kept ones."""
        self._kept = frozenset(self._lists)
        for path in self._folder.glob(f"*{_SUFFIX}"):
            if path.stem not in self._lists:
                path.unlink()


class DeviceShelf(Shelf):
    """Keeps on another shelf, on the host, what a device computes and computes with.

    A tensor that is added is copied while the device goes on; it is put on the other shelf when the
    next one comes, or somebody asks for it.

    Args:
        shelf: The other shelf.
        copies: What brings states to the device and takes them from it.
    """

    def __init__(self, shelf: Shelf, copies: StateCopies) -> None:
        super().__init__()
        self._shelf, self._copies = shelf, copies
        self.goes_on = shelf.goes_on
        self._leaving: tuple[str, Leaving] | None = None

    def add(self, name: str, states: Tensor) -> None:
        """Put a tensor of the device at the end of a list."""
        leaving = self._copies.take(states)
        self._put_down()
        self._leaving = name, leaving

    def get(self, name: str, place: int) -> Tensor:
        """Return one of a list, on the device."""
        self._put_down(name)
        return self._copies.bring(self._shelf.get(name, place))

    def drop(self, name: str) -> None:
        """Forget a list, if there is one."""
        self._put_down(name)
        self._shelf.drop(name)

    def keep(self, facts: dict[str, Any]) -> None:
        """Keep the lists as they are now for a run that goes on, and facts beside them."""
        self._put_down()
        self._shelf.keep(facts)
        self.facts = self._shelf.facts

    def kept(self) -> dict[str, Any] | None:
        """Return the facts that were kept last, with the lists as they were then."""
        found = self._shelf.kept()
        self.facts = self._shelf.facts
        return found

    def forget(self) -> None:
        """Forget what was kept, and the lists with it."""
        self._leaving = None
        self._shelf.forget()
        self.facts = self._shelf.facts

    def _put_down(self, name: str | None = None) -> None:
        """Put the tensor that is on its way on the other shelf, if it is of that list, or any."""
        if self._leaving is not None and name in (None, self._leaving[0]):
            (list_name, leaving), self._leaving = self._leaving, None
            self._shelf.add(list_name, leaving.landed())
