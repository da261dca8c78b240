"""The file that a grid grows in: one JSON record per line, so that a killed run goes on.

The first line says what the records hold for: the model, its dtype, the texts and the settings.
Each record is on the disk before the next is begun. A last line that was cut off is dropped.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from ghosted_fast.errors import ArgumentError

STATE_FILE = "state.jsonl"
_FORMAT = 1


class GridState:
    """The records of a grid, in memory and in its folder. Use it as a context manager.

    Args:
        folder: The folder; made as needed.
        facts: What the records hold for, as JSON has it.
        overwrite: Whether records of other facts may be thrown away.

    Raises:
        ArgumentError: The folder holds records of other facts, something else in place of them, or
            another run is writing to it.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], overwrite: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / STATE_FILE
        self._file = self.path.open("a+", encoding="utf-8")
        try:
            self._lock()
            self._records = self._read(json.loads(json.dumps(dict(facts))), overwrite)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> GridState:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def get(self, *key: Any) -> Any:
        """Return the record of a key, or None."""
        return self._records.get(_name(key))

    def put(self, *key: Any, record: Any) -> Any:
        """Add a record, to stay; return it as it will be read."""
        line = json.dumps({"key": list(key), "record": record}, ensure_ascii=False)
        self._write(line)
        self._records[_name(key)] = json.loads(line)["record"]
        return self._records[_name(key)]

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ArgumentError(
                f"another run is writing to {str(self.path)!r}: wait for it, or choose another "
                "folder"
            ) from error

    def _read(self, facts: dict[str, Any], overwrite: bool) -> dict[str, Any]:
        self._file.seek(0)
        text = self._file.read()
        whole = text[: text.rfind("\n") + 1]
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            known = lines[0]["facts"] if lines else None
            usable = not lines or lines[0]["format"] == _FORMAT
            records = {_name(line["key"]): line["record"] for line in lines[1:]}
        except (ValueError, KeyError, TypeError) as error:
            if not overwrite:
                raise ArgumentError(
                    f"{str(self.path)!r} is damaged ({error}): remove it, choose another folder, "
                    "or overwrite it"
                ) from error
            known, usable, records = None, False, {}
        if known is not None and usable and known == facts:
            self._file.truncate(len(whole.encode()))
            return records
        if known is not None and not overwrite:
            raise ArgumentError(
                f"{str(self.path)!r} holds results of other settings ({_differences(known, facts)})"
                ": choose another folder, or overwrite them"
            )
        self._file.truncate(0)
        self._write(json.dumps({"format": _FORMAT, "facts": facts}, ensure_ascii=False))
        return {}

    def _write(self, line: str) -> None:
        self._file.write(line + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _name(key: Iterable[Any]) -> str:
    return json.dumps(list(key))


def _differences(known: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    names = sorted({*known, *wanted})
    return "; ".join(
        f"{name}: there {known.get(name)}, now {wanted.get(name)}"
        for name in names
        if known.get(name) != wanted.get(name)
    )
