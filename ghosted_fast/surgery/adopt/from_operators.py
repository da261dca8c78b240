"""Operators that other codes have fitted, made a ghosted model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ghosted_fast.checkpoint.model_card import IMPORTED, attach_report
from ghosted_fast.checkpoint.record import is_ghosted
from ghosted_fast.errors import ArgumentError
from ghosted_fast.facts import layers_as_text, notebook_table
from ghosted_fast.models.boundaries import visit_intervals
from ghosted_fast.models.decoder import evaluating, model_name
from ghosted_fast.models.families import decoder_layers, hidden_size
from ghosted_fast.surgery.adopt.operator_files import (
    StoredOperator,
    operators_of_gaps,
    read_operators,
)
from ghosted_fast.surgery.adopt.readings import READINGS, Affine, Form, Layout, Reading
from ghosted_fast.surgery.cut import remove_layers, removed_intervals
from ghosted_fast.text.batches import Batch

# Random tokens that the readings are compared on, [rows, length].
_TOKENS = (4, 64)
# How many times as near as the next one a reading must be to be taken.
_MARGIN = 1.5


@dataclass(frozen=True)
class ImportReport:
    """What was imported, and how it was read.

    Attributes:
        removed: The removed layers.
        keys: The keys of the operators of each gap, in the order in which they act.
        form: "full" for y = A x, "delta" for y = x + A x.
        layout: "out-in" for `x @ A.T`, "in-out" for `x @ A`.
        distances: For each reading that was compared, its text and how far it is from what the
            removed layers do, relative to what they add; empty if both were told.
    """

    removed: list[int]
    keys: list[list[str]]
    form: Form
    layout: Layout
    distances: dict[str, float]

    def _repr_html_(self) -> str:
        keys = "; ".join(", ".join(gap) for gap in self.keys)
        rows = [("operators", keys), ("form", self.form), ("layout", self.layout)]
        rows += [(f"distance of {name}", f"{value:.3g}") for name, value in self.distances.items()]
        return notebook_table(f"Imported for {layers_as_text(self.removed)}", rows)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        return asdict(self)


def import_ghosts(
    model: Any,
    operators: Mapping[Any, Tensor] | Sequence[Tensor] | str | Path,
    removed: Iterable[int],
    *,
    form: Form | Literal["auto"] = "auto",
    layout: Layout | Literal["auto"] = "auto",
    inplace: bool = False,
) -> tuple[Any, ImportReport]:
    """Remove layers from a dense model and put operators of another code in their place.

    What is not told of `form` and `layout` is measured: the dense model runs once on 256 random
    tokens, and the reading is taken under which the operators are nearest to what the removed
    layers do (the median over tokens of |prediction - y| / |y - x|, their geometric mean over
    operators). It must be 1.5 times as near as any other.

    Args:
        model: The dense transformers model that the layers are removed from.
        operators: The operators [d, d], of any floating-point dtype, one for each gap or one for
            each removed layer (those of one gap then act one after the other): in order, or by keys
            whose numbers tell the place; or a file or folder, see `read_operators`. Biases [d] as
            `X.bias` beside `X.weight`. Keys of the model's own weights are passed over.
        removed: Indices of the removed layers, in the dense model.
        form: "full" if an operator is W = I + M, "delta" if it is M, or "auto".
        layout: "out-in" if it is applied to rows as `x @ A.T`, as `nn.Linear` does, "in-out" if as
            `x @ A`, or "auto".
        inplace: Whether to cut the given model. Default: a new one that shares its weights.

    Returns:
        The ghosted model, whose ghosts are M in the model's dtype, rounded once; and a report.

    Raises:
        SourceError: The file or folder cannot be read.
        ArgumentError: The operators do not fit the model or the gaps, are not finite, or it cannot
            be told how they are meant.
        UnknownFamilyError, UnsupportedModelError: See `find_family`.
    """
    for name, value, known in (
        ("form", form, get_args(Form)),
        ("layout", layout, get_args(Layout)),
    ):
        if value not in ("auto", *known):
            raise ArgumentError(f"expected {name} to be auto, {' or '.join(known)}, got {value!r}")
    layers = decoder_layers(model)
    if is_ghosted(model.config):
        raise ArgumentError("expected the dense model, got one that has ghosts already")
    given = list(removed)
    intervals = removed_intervals(given, len(layers))
    groups = operators_of_gaps(_by_key(operators), hidden_size(model), intervals, _own_keys(model))
    if layout == "auto" and all(_is_symmetric(item.matrix) for group in groups for item in group):
        layout = "out-in"  # both layouts of a symmetric matrix are one
    readings = [
        reading
        for reading in READINGS
        if form in ("auto", reading.form) and layout in ("auto", reading.layout)
    ]
    distances: dict[Reading, float] = {}
    if len(readings) > 1:
        distances = _distances(model, groups, intervals, readings)
        readings = [_nearest(distances)]
    [reading] = readings
    ghosts = []
    for group in groups:
        maps = (Affine.read(item.matrix, reading, item.bias) for item in group)
        ghosts.append(reduce(Affine.then, maps).to_ghost(model.dtype, model.device))
    smaller = remove_layers(model, given, ghosts, inplace=inplace)
    name = model_name(model)
    attach_report(smaller.config, {"model": name, "recovery": IMPORTED})
    return smaller, ImportReport(
        removed=sorted(given),
        keys=[[item.key for item in group] for group in groups],
        form=reading.form,
        layout=reading.layout,
        distances={str(item): distance for item, distance in distances.items()},
    )


def _by_key(operators: Mapping[Any, Tensor] | Sequence[Tensor] | str | Path) -> dict[str, Tensor]:
    if isinstance(operators, str | Path):
        return read_operators(operators)
    items = operators.items() if isinstance(operators, Mapping) else enumerate(operators)
    found = {}
    for key, tensor in items:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"expected operators as tensors, got {type(tensor).__name__}")
        name = "-".join(map(str, key)) if isinstance(key, tuple) else str(key)
        found[name] = tensor.detach()
    return found


def _own_keys(model: Any) -> set[str]:
    """Return the names of a model's weights, as the model and as its base model have them."""
    keys = set(model.state_dict())
    return keys | {key.removeprefix(f"{model.base_model_prefix}.") for key in keys}


def _is_symmetric(matrix: Tensor) -> bool:
    wide = matrix.float()
    return ((wide - wide.mT).norm() <= 1e-6 * wide.norm()).item() is True


def _distances(
    model: Any,
    groups: list[list[StoredOperator]],
    intervals: list[tuple[int, int]],
    readings: list[Reading],
) -> dict[Reading, float]:
    """Return how far each reading is from what the removed layers do to random tokens."""
    spans: list[tuple[int, int]] = []
    for (start, stop), group in zip(intervals, groups, strict=True):
        alone = len(group) == 1
        spans += [(start, stop)] if alone else [(layer, layer + 1) for layer in range(start, stop)]
    operators = [item for group in groups for item in group]
    logs: dict[Reading, list[float]] = {reading: [] for reading in readings}

    def visit(index: int, x: Tensor, y: Tensor) -> None:
        x, y = x.double(), y.double()
        added = (y - x).norm(dim=-1)
        item = operators[index]
        matrix = item.matrix.to(x.device)
        bias = None if item.bias is None else item.bias.to(x.device)
        for reading in readings:
            error = (reading.predict(x, matrix, bias) - y).norm(dim=-1)
            logs[reading].append(math.log((error / added).median().item() + 1e-30))

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, _TOKENS, generator=generator).to(model.device)
    with evaluating(model):
        visit_intervals(model, Batch(ids, torch.ones_like(ids)), spans, visit)
    return {reading: math.exp(sum(values) / len(values)) for reading, values in logs.items()}


def _nearest(distances: dict[Reading, float]) -> Reading:
    ranked = sorted(distances, key=distances.__getitem__)
    best, second = ranked[0], ranked[1]
    if distances[second] >= _MARGIN * distances[best]:
        return best
    asked = [name for name in ("form", "layout") if getattr(best, name) != getattr(second, name)]
    shown = ", ".join(f"{item} {distances[item]:.3g}" for item in ranked)
    raise ArgumentError(
        f"expected one reading of the operators to be {_MARGIN:g} times as near to what the "
        f"removed layers do as any other, got the distances {shown}: tell the "
        f"{' and the '.join(asked)}, or see whether these are the layers, and this the model, that "
        "they were fitted for"
    )
