"""Files of other people's operators, and which of them belongs to which gap.

A key's numbers tell the gap. People number gaps in several ways (from 0, by the first removed
layer, by the layer that the hook sat on); all of them rise from gap to gap, so that once the
numbers of the keys are those of one such way, their order is the order of the gaps.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ghosted_fast.errors import ArgumentError, SourceError

_SAFE, _TORCH = (".safetensors",), (".pt", ".pth", ".bin")
_SHOWN = 6


class StoredOperator(NamedTuple):
    """An operator as it was stored.

    Attributes:
        key: Its key.
        matrix: [d, d], of any floating-point dtype.
        bias: [d] or None.
    """

    key: str
    matrix: Tensor
    bias: Tensor | None


def read_operators(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a file, or of all files in a folder.

    Args:
        path: A .safetensors, .pt, .pth or .bin file, or a folder of such. A torch file may hold a
            tensor, or lists and dicts of tensors in any depth; it is read with `weights_only`.

    Returns:
        The tensors, on the processor. The key of one inside lists and dicts has dots between its
        steps. The keys of several files are joined if they differ; if not, or where a file is one
        tensor, each begins with the file's name.

    Raises:
        SourceError: There is no such file, it cannot be read, or holds no tensor; or the folder is
            a model that this library has saved.
    """
    where = Path(path).expanduser()
    if where.is_file():
        return _read_file(where)
    if not where.is_dir():
        raise SourceError(f"there is no file or folder of operators {str(path)!r}")
    _refuse_our_own(where)
    files = sorted(file for file in where.iterdir() if file.suffix in (*_SAFE, *_TORCH))
    if not files:
        raise SourceError(
            f"expected {', '.join((*_SAFE, *_TORCH))} files in {str(path)!r}, found none"
        )
    held = {file.stem: _read_file(file) for file in files}
    keys = [key for tensors in held.values() for key in tensors]
    clash = len(set(keys)) < len(keys) or (len(files) > 1 and "" in keys)
    return {
        (f"{stem}.{key}".removesuffix(".") if clash else key): tensor
        for stem, tensors in held.items()
        for key, tensor in tensors.items()
    }


def _refuse_our_own(folder: Path) -> None:
    config = folder / "config.json"
    try:
        ours = config.is_file() and "ghost" in json.loads(config.read_text(encoding="utf-8"))
    except ValueError:
        ours = False  # whatever it is, it is not of our making
    if ours:
        raise SourceError(
            f"{str(folder)!r} is a ghosted model already: load it with "
            "AutoModelForCausalLM.from_pretrained after import ghosted_fast"
        )


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix in _SAFE:
            from safetensors.torch import load_file

            content: Any = load_file(path)
        elif path.suffix in _TORCH:
            content = torch.load(path, map_location="cpu", weights_only=True)
        else:
            raise SourceError(f"expected a {', '.join((*_SAFE, *_TORCH))} file, got {path.name!r}")
    except SourceError:
        raise
    except Exception as error:  # each format has errors of its own
        raise SourceError(
            f"cannot read {path.name!r} as tensors ({str(error).splitlines()[0]}): save a dict of "
            "plain tensors, such as a state dict"
        ) from error
    found = dict(_tensors_in(content))
    if not found:
        raise SourceError(f"expected tensors in {path.name!r}, found none")
    return found


def _tensors_in(content: Any, key: str = "") -> Iterable[tuple[str, Tensor]]:
    """Yield the tensors in nested lists and dicts, with what leads to them."""
    if isinstance(content, Tensor):
        yield key, content.detach()
        return
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(content, Mapping):
        items = content.items()
    elif isinstance(content, list | tuple):
        items = enumerate(content)
    for step, part in items:
        name = "-".join(map(str, step)) if isinstance(step, tuple) else str(step)
        yield from _tensors_in(part, f"{key}.{name}" if key else name)


def operators_of_gaps(
    tensors: Mapping[str, Tensor],
    hidden_size: int,
    intervals: Sequence[tuple[int, int]],
    known: Collection[str] = (),
) -> list[list[StoredOperator]]:
    """Return the operators of each gap, in the order in which they act.

    Args:
        tensors: Operators [d, d], one for each gap or one for each removed layer, and their biases:
            `X.bias` [d] beside `X.weight`.
        hidden_size: Width d of the hidden state.
        intervals: The gaps [start, stop), sorted.
        known: Keys of the base model's own weights, which are left out.

    Returns:
        One list for each gap: a single operator, or one for each of its layers.

    Raises:
        ArgumentError: A tensor is neither, is not finite or not floating point; the number of
            operators does not fit; or the keys do not tell which is which.
    """
    own = {key: tensor for key, tensor in tensors.items() if key not in known}
    matrices = {key: t for key, t in own.items() if t.shape == (hidden_size, hidden_size)}
    biases: dict[str, Tensor] = {}
    for key, tensor in own.items():
        partner = f"{key.removesuffix('bias')}weight"
        if key in matrices:
            pass
        elif key.endswith("bias") and partner in matrices and tensor.numel() == hidden_size:
            biases[partner] = tensor.flatten()
        else:
            raise ArgumentError(
                f"expected operators [{hidden_size}, {hidden_size}], the base model's hidden size, "
                f"and biases [{hidden_size}] as 'X.bias' beside 'X.weight', got {key!r} "
                f"{list(tensor.shape)}, which is no weight of the base model either"
            )
        if not tensor.is_floating_point():
            raise ArgumentError(f"expected floating-point operators, got {key!r} {tensor.dtype}")
        if not torch.isfinite(tensor.float()).all():
            raise ArgumentError(f"expected finite operators, got NaN or infinity in {key!r}")
    layers = [(layer, layer + 1) for start, stop in intervals for layer in range(start, stop)]
    if len(matrices) not in (len(intervals), len(layers)):
        raise ArgumentError(
            f"expected one operator for each of the gaps {list(intervals)}, or one for each of the "
            f"{len(layers)} removed layers, got {len(matrices)}: {_show(matrices)}"
        )
    places = list(intervals) if len(matrices) == len(intervals) else layers
    operators = [
        StoredOperator(key, matrices[key], biases.get(key)) for key in _ordered(matrices, places)
    ]
    return [
        [item for item, (low, _) in zip(operators, places, strict=True) if start <= low < stop]
        for start, stop in intervals
    ]


def _ordered(keys: Iterable[str], places: Sequence[tuple[int, int]]) -> list[str]:
    """Return the keys in the order of the places that their numbers tell."""
    names = list(keys)
    if len(names) == 1:
        # It needs no number; but one that is a step of its path must not contradict.
        steps = {int(step) for step in names[0].split(".") if step.isdecimal()}
        if not steps or any(steps & set(way) for way in _numberings(places)):
            return names
        raise _unclear(names, places)
    numbers = [tuple(map(int, re.findall(r"\d+", name))) for name in names]
    orders: list[list[str]] = []
    if len({len(row) for row in numbers}) == 1:
        for column in zip(*numbers, strict=True):
            if sorted(column) in _numberings(places):
                order = sorted(range(len(names)), key=column.__getitem__)
                orders.append([names[i] for i in order])
    if not orders:
        raise _unclear(names, places)
    if any(order != orders[0] for order in orders):
        raise ArgumentError(
            f"expected keys with one order of numbers, got {_show(names)}, whose numbers tell two"
        )
    return orders[0]


def _unclear(names: Iterable[str], places: Sequence[tuple[int, int]]) -> ArgumentError:
    starts = ", ".join(str(start) for start, _ in places)
    return ArgumentError(
        f"expected keys whose numbers tell the places: the first removed layers ({starts}), the "
        f"layers beside the gaps, or 0 to {len(places) - 1}, got {_show(names)}"
    )


def _numberings(places: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Return the ways in which people number places, each without repetition, from low to high."""
    removed_before = [0]
    for start, stop in places:
        removed_before.append(removed_before[-1] + stop - start)
    cut = [start - count for (start, _), count in zip(places, removed_before, strict=False)]
    ways = [
        list(range(len(places))),
        list(range(1, len(places) + 1)),
        [start for start, _ in places],
        [start - 1 for start, _ in places],  # the layer before
        [stop - 1 for _, stop in places],
        [stop for _, stop in places],  # the layer behind
        cut,  # the layer behind, as it is numbered once layers are gone
        [index - 1 for index in cut],
    ]
    return [way for way in ways if len(set(way)) == len(way)]


def _show(names: Iterable[str]) -> str:
    shown = list(names)
    return ", ".join(map(repr, shown[:_SHOWN])) + (", ..." if len(shown) > _SHOWN else "") or "none"
