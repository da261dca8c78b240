"""Models from what the options name, and what can be refused before or with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ghosted_fast.cli._shared.verb import usage_error
from ghosted_fast.errors import ArgumentError
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.models.loading import load_model
from ghosted_fast.models.quantized.loading import load_quantized
from ghosted_fast.options import Count, HowMany, Layers
from ghosted_fast.selection.select import check_layer_count
from ghosted_fast.surgery.cut import removed_intervals


def open_model(spec: str, dtype: str, device: str) -> tuple[Any, Any]:
    """Load a model and its tokenizer, and move the model to a device."""
    place = choose_device(device)
    model, tokenizer = load_model(spec, dtype)
    return model.to(place), tokenizer


def open_quantized(spec: str, kind: str, dtype: str, device: str) -> tuple[Any, Any]:
    """Load a model, quantized by bitsandbytes, onto a device, and its tokenizer."""
    return load_quantized(spec, kind, dtype, choose_device(device))


def open_models(specs: Sequence[str], dtype: str, device: str) -> tuple[dict[str, Any], Any]:
    """Load several models under short, distinct names, and the tokenizer of the first."""
    names = [Path(spec).name for spec in specs]
    if len(set(names)) < len(names):
        names = list(specs)
    if len(set(names)) < len(names):
        raise usage_error("expected different models, got one of them twice", "--model")
    opened = [open_model(spec, dtype, device) for spec in specs]
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
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, ValueError) as error:
        raise usage_error(
            f"expected a device of this machine, got {device!r}", "--device"
        ) from error


def check_layers(model: Any, wanted: HowMany) -> None:
    """Refuse layers that a model cannot lose, before any text is read or written for them.

    Raises:
        ArgumentError: There are no such layers, or too few of them.
    """
    num_layers = Decoder.of(model).num_layers
    if isinstance(wanted, Layers):
        removed_intervals(wanted.removed, num_layers)
    elif isinstance(wanted, Count):
        check_layer_count(wanted.layers, num_layers)


def check_new(path: Path | None, overwrite: bool) -> None:
    """Refuse a path that exists, before any work is done for it.

    Raises:
        ArgumentError: It exists and is not to be overwritten.
    """
    if path is not None and path.exists() and not overwrite:
        raise ArgumentError(f"{str(path)!r} exists: name another, or pass --overwrite")
