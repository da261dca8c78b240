"""Models from what the options name, and what can be refused before or with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ghosted_fast.checkpoint.save import check_place, weight_bytes
from ghosted_fast.cli._shared.verb import usage_error
from ghosted_fast.errors import ArgumentError
from ghosted_fast.measure.system import device_named
from ghosted_fast.models.checked.ahead import look_ahead
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.models.loading import load_model
from ghosted_fast.models.quantized.loading import load_quantized
from ghosted_fast.options import Count, HowMany, Layers
from ghosted_fast.selection.select import check_layer_count
from ghosted_fast.surgery.cut import removed_intervals


def open_model(spec: str, dtype: str, device: str, trust: bool = False) -> tuple[Any, Any]:
    """Load a model and its tokenizer, and move the model to a device."""
    place = choose_device(device)
    model, tokenizer = load_model(spec, dtype, trust_remote_code=trust)
    return model.to(place), tokenizer


def open_quantized(
    spec: str, kind: str, dtype: str, device: str, trust: bool = False
) -> tuple[Any, Any]:
    """Load a model, quantized by bitsandbytes, onto a device, and its tokenizer."""
    return load_quantized(spec, kind, dtype, choose_device(device), trust)


def open_models(
    specs: Sequence[str], dtype: str, device: str, trust: bool = False
) -> tuple[dict[str, Any], Any]:
    """Load several models under short, distinct names, and the tokenizer of the first."""
    names = [Path(spec).name for spec in specs]
    if len(set(names)) < len(names):
        names = list(specs)
    if len(set(names)) < len(names):
        raise usage_error("expected different models, got one of them twice", "--model")
    opened = [open_model(spec, dtype, device, trust) for spec in specs]
    models = {name: model for name, (model, _) in zip(names, opened, strict=True)}
    return models, opened[0][1]


def choose_device(device: str) -> torch.device:
    """Return the device of a name; "auto" is the accelerator if there is one.

    Raises:
        typer.BadParameter: It is no device, or not one of this machine.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return device_named(device)
    except ArgumentError as error:
        raise usage_error(str(error), "--device") from error


def check_ahead(
    spec: str, device: str, trust: bool, sequence_length: int, *wanted: HowMany
) -> None:
    """Refuse, before any weight is read, what a model's configuration says cannot be.

    Args:
        spec: The model.
        device: What `--device` says.
        trust: Whether code that comes with the model may run.
        sequence_length: Of the text; 0 for no text.
        wanted: The layers that are to go.

    Raises:
        SourceError: There is no such model.
        ArgumentError: It has fewer layers or positions.
    """
    choose_device(device)
    ahead = look_ahead(spec, trust)
    for item in wanted:
        if ahead.num_layers is not None:
            _check_layers(ahead.num_layers, item)
    ahead.check_length(sequence_length, "--sequence-length")


def check_layers(model: Any, wanted: HowMany) -> None:
    """Refuse layers that a model cannot lose, before any text is read or written for them.

    Raises:
        ArgumentError: There are no such layers, or too few of them.
    """
    _check_layers(Decoder.of(model).num_layers, wanted)


def _check_layers(num_layers: int, wanted: HowMany) -> None:
    if isinstance(wanted, Layers):
        removed_intervals(wanted.removed, num_layers)
    elif isinstance(wanted, Count):
        check_layer_count(wanted.layers, num_layers)


def check_new(path: Path | None, overwrite: bool, *read: str | Path | None) -> None:
    """Refuse a path that cannot be written, before any work is done for it.

    Args:
        path: What is to be written; None for nothing.
        overwrite: Whether it may replace what is there.
        read: What is read, which is never replaced.

    Raises:
        ArgumentError: It exists and is not to be overwritten, or is what is read.
        OutputError: Nothing can be written there.
    """
    if path is None:
        return
    check_place(path)
    if path.exists() and not overwrite:
        raise ArgumentError(f"{str(path)!r} exists: name another, or pass --overwrite")
    target = path.resolve()
    for source in read:
        if source is None or not Path(source).expanduser().exists():
            continue
        given = Path(source).expanduser().resolve()
        if target == given or target in given.parents:
            raise ArgumentError(
                f"expected an output apart from what is read, got {str(path)!r}, which is or holds "
                f"{str(source)!r}: name another"
            )


def least_bytes(model: Any, wanted: HowMany) -> int:
    """Return the bytes that a model takes at least once layers of it are gone."""
    decoder = Decoder.of(model)
    whole = weight_bytes(decoder.model)
    layers = sum(weight_bytes(layer) for layer in decoder.layers)
    gone = decoder.num_layers - 1
    if isinstance(wanted, Layers | Count):
        gone = wanted.layers if isinstance(wanted, Count) else len(wanted.removed)
    return whole - layers * gone // decoder.num_layers
