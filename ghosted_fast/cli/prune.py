"""`ghosted-fast prune`: layers taken out of a checkpoint, which is never loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import typer

from ghosted_fast.cli._shared.input_args import (
    FolderOption,
    LayersOption,
    ModelOption,
    OverwriteOption,
)
from ghosted_fast.cli._shared.results import Result


@dataclass(frozen=True, kw_only=True)
class PruneArgs:
    """Which model is cut, where, and what becomes of it."""

    title: ClassVar = "Model"
    model: ModelOption
    removed: LayersOption
    output: FolderOption
    overwrite: OverwriteOption = False
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only check, and print the size of the folder.")
    ] = False


def prune(args: PruneArgs) -> Result:
    """Remove layers and put nothing in their place, file by file: the model is never in memory."""
    from ghosted_fast.cli._shared.loading import check_new
    from ghosted_fast.facts import named_layers
    from ghosted_fast.surgery.folder import cut_folder

    check_new(args.output, args.overwrite, args.model)
    cut = cut_folder(args.model, args.removed)
    cut.check_target(args.output, args.overwrite)
    facts = {"removed": cut.removed, "bytes": cut.num_bytes, "output": str(args.output)}
    said = f"{named_layers(cut.removed)}; {cut.num_bytes / 1e9:.2f} GB"
    if args.dry_run:
        return Result(facts, [f"would remove {said}"])
    cut.save(args.output, overwrite=args.overwrite, progress=True)
    return Result(facts, [f"removed {said}; saved {args.output}"])
