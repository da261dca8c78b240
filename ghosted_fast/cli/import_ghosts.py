"""`ghosted-fast import`: operators of another code made a ghosted model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import typer

from ghosted_fast.cli._shared.input_args import (
    DtypeOption,
    FolderOption,
    LayersOption,
    ModelOption,
    OverwriteOption,
    TrustOption,
)
from ghosted_fast.cli._shared.results import Result


@dataclass(frozen=True, kw_only=True)
class OperatorArgs:
    """Which operators are taken, and what they are."""

    title: ClassVar = "Operators"
    operators: Annotated[
        Path,
        typer.Argument(
            help="The operators: a .safetensors, .pt, .pth or .bin file, or a folder of such."
        ),
    ]
    form: Annotated[
        Literal["auto", "full", "delta"],
        typer.Option("--form", help="full: W = I + M is stored; delta: M; auto: measured."),
    ] = "auto"
    layout: Annotated[
        Literal["auto", "out-in", "in-out"],
        typer.Option("--layout", help="out-in: used as x @ W.T; in-out: as x @ W; auto: measured."),
    ] = "auto"


@dataclass(frozen=True, kw_only=True)
class TargetArgs:
    """The model that they are put into, and where it goes."""

    title: ClassVar = "Model"
    model: ModelOption
    removed: LayersOption
    output: FolderOption
    dtype: DtypeOption = "auto"
    trust_remote_code: TrustOption = False
    overwrite: OverwriteOption = False


def import_operators(args: OperatorArgs, target: TargetArgs) -> Result:
    """Remove layers and put operators that another code has fitted in their place."""
    from ghosted_fast.checkpoint.save import save_model
    from ghosted_fast.cli._shared.loading import check_ahead, check_new
    from ghosted_fast.facts import layers_as_text
    from ghosted_fast.models.loading import load_model, load_processor
    from ghosted_fast.options import Layers
    from ghosted_fast.surgery.adopt.from_operators import import_ghosts
    from ghosted_fast.surgery.adopt.operator_files import read_operators
    from ghosted_fast.surgery.adopt.readings import Reading

    check_new(target.output, target.overwrite, target.model, args.operators)
    tensors = read_operators(args.operators)
    trust = target.trust_remote_code
    check_ahead(target.model, "cpu", trust, 0, Layers(target.removed))
    dense, tokenizer = load_model(target.model, target.dtype, trust_remote_code=trust)
    beside = load_processor(target.model, trust) or tokenizer
    smaller, found = import_ghosts(
        dense, tensors, target.removed, form=args.form, layout=args.layout
    )
    save_model(smaller, target.output, beside, target.overwrite)
    shown = [
        f"removed {layers_as_text(found.removed)}; saved {target.output}",
        f"read as {Reading(found.form, found.layout)}",
        *(
            f"  distance from the removed layers, {text}: {distance:.3g}"
            for text, distance in found.distances.items()
        ),
        *(
            f"gap {gap}: {', then '.join(key or args.operators.name for key in keys)}"
            for gap, keys in enumerate(found.keys)
        ),
    ]
    return Result({**found.to_dict(), "output": str(target.output)}, shown)
