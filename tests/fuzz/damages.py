"""Ways to damage a file, each made anew from a seed."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

Damage = Callable[[Path, random.Random], str]
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 3, 10**12, 2**63, 0.5, -0.5, 1e30, float("nan"), float("inf"), "", "x",
    "\x00", "\ud800", [], [None], {}, {"a": 1}, [[[]]],
)  # fmt: skip


def truncate(path: Path, chance: random.Random) -> str:
    data = path.read_bytes()
    size = chance.randrange(len(data)) if data else 0
    path.write_bytes(data[:size])
    return f"cut after {size} bytes"


def empty(path: Path, _: random.Random) -> str:
    path.write_bytes(b"")
    return "emptied"


def flip(path: Path, chance: random.Random) -> str:
    data = bytearray(path.read_bytes())
    place = chance.randrange(len(data))
    data[place] ^= 1 << chance.randrange(8)
    path.write_bytes(bytes(data))
    return f"a bit of byte {place} flipped"


def flip_head(path: Path, chance: random.Random) -> str:
    data = bytearray(path.read_bytes())
    place = chance.randrange(min(64, len(data)))
    data[place] = chance.randrange(256)
    path.write_bytes(bytes(data))
    return f"byte {place} set"


def scramble(path: Path, chance: random.Random) -> str:
    data = bytearray(path.read_bytes())
    start = chance.randrange(len(data))
    stop = min(len(data), start + chance.randrange(1, 65))
    data[start:stop] = chance.randbytes(stop - start)
    path.write_bytes(bytes(data))
    return f"bytes {start} to {stop} made random"


def double(path: Path, _: random.Random) -> str:
    path.write_bytes(path.read_bytes() * 2)
    return "written twice"


def nonsense(path: Path, chance: random.Random) -> str:
    path.write_bytes(chance.randbytes(200))
    return "replaced by random bytes"


def remove(path: Path, _: random.Random) -> str:
    path.unlink()
    return "removed"


def folder_instead(path: Path, _: random.Random) -> str:
    path.unlink()
    path.mkdir()
    return "made a folder"


def odd_value(path: Path, chance: random.Random) -> str:
    """Set a value somewhere in a JSON file to an odd one, or take it out."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines() if path.suffix == ".jsonl" else [text]
    place = chance.randrange(len(lines))
    held = json.loads(lines[place])
    at, said = held, path.name
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        if not keys:
            return f"{said} left as it is"
        key = chance.choice(keys)
        said += f"/{key}"
        inner = at[key]
        if not isinstance(inner, dict | list) or not inner or chance.random() < 0.25:
            break
        at = inner
    if chance.random() < 0.3:
        del at[key]
        said += " taken out"
    else:
        at[key] = chance.choice(ODD)
        said += f" set to {at[key]!r}"
    lines[place] = json.dumps(held)
    path.write_text("\n".join(lines), encoding="utf-8")
    return said


BYTES: tuple[Damage, ...] = (
    truncate, empty, flip, flip, flip_head, scramble, double, nonsense, remove, folder_instead,
)  # fmt: skip


def damaged_copy(source: Path, target: Path, name: str, chance: random.Random) -> str:
    """Copy a folder, damage a file in it, and say how."""
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(source, target)
    path = target / name
    structured = path.suffix in (".json", ".jsonl") and chance.random() < 0.6
    how = odd_value if structured else chance.choice(BYTES)
    return f"{name}: {how(path, chance)}"
