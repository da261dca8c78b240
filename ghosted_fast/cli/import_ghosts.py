"""`ghosted-fast import`: operators of another code made a ghosted model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ghosted_fast.cli import options
from ghosted_fast.cli.verb import Result


def import_operators(
    operators: Annotated[
        Path,
        typer.Argument(
            help="The operators: a .safetensors, .pt, .pth or .bin file, or a folder of such."
        ),
    ],
    model: options.ModelOption,
    removed: Annotated[
        str,
        typer.Option("--removed", help="The layers that were removed: '14-18' or '3,7,8'."),
    ],
    output: Annotated[Path, typer.Option("--output", help="The folder to write.")],
    form: Annotated[
        Literal["auto", "full", "delta"],
        typer.Option("--form", help="full: W = I + M is stored; delta: M; auto: measured."),
    ] = "auto",
    layout: Annotated[
        Literal["auto", "out-in", "in-out"],
        typer.Option("--layout", help="out-in: used as x @ W.T; in-out: as x @ W; auto: measured."),
    ] = "auto",
    dtype: options.DtypeOption = "auto",
    overwrite: options.OverwriteOption = False,
) -> Result:
    """Remove layers and put operators that another code has fitted in their place."""
    layers = options.parse_layers(removed)

    from ghosted_fast.checkpoint.save import save_model
    from ghosted_fast.cli.loading import check_new
    from ghosted_fast.models.loading import load_model
    from ghosted_fast.surgery.adopt.from_operators import import_ghosts
    from ghosted_fast.surgery.adopt.operator_files import read_operators
    from ghosted_fast.surgery.adopt.readings import Reading

    check_new(output, overwrite)
    tensors = read_operators(operators)
    dense, tokenizer = load_model(model, dtype)
    smaller, found = import_ghosts(dense, tensors, layers, form=form, layout=layout)
    save_model(smaller, output, tokenizer, overwrite)
    shown = [
        f"removed {','.join(map(str, found.removed))}; saved {output}",
        f"read as {Reading(found.form, found.layout)}",
        *(
            f"  distance from the removed layers, {text}: {distance:.3g}"
            for text, distance in found.distances.items()
        ),
        *(
            f"gap {gap}: {', then '.join(key or operators.name for key in keys)}"
            for gap, keys in enumerate(found.keys)
        ),
    ]
    return Result({**found.to_dict(), "output": str(output)}, shown)
