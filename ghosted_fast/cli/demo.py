"""`ghosted-fast demo`: the whole way on a real model, from nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer

from ghosted_fast.cli import options
from ghosted_fast.cli.verb import Result, TextTable, usage_error

DtypesOption = Annotated[
    list[str],
    typer.Option(
        "--dtype",
        help="Dtype to measure in; repeat it. The first chooses the layers, the last is saved.",
    ),
]


def demo(
    output: Annotated[
        Path, typer.Option("--output", help="Folder for the checkpoint and the report.")
    ] = Path("demo"),
    num_layers: Annotated[
        int, typer.Option("--num-layers", min=1, max=29, help="Layers to remove, of 30.")
    ] = 5,
    dtype: DtypesOption = ["bfloat16"],  # noqa: B006 - typer copies it
    tokens: options.TokensOption = 49152,
    quick: Annotated[
        bool, typer.Option("--quick", help="An eighth of the text, speed measured once.")
    ] = False,
    overwrite: options.OverwriteOption = False,
) -> Result:
    """Remove 5 of SmolLM2-135M-Instruct's 30 layers, put a ghost in, measure, save and report.

    The first run downloads about 140 MB with pip. Takes a few minutes on two cores.
    """
    known = get_args(options.Dtype)
    if unknown := [name for name in dtype if name not in known]:
        raise usage_error(f"expected one of {', '.join(known)}, got {unknown[0]!r}", "--dtype")

    from ghosted_fast.assets.downloads import fetch_demo_assets
    from ghosted_fast.cli.tables import ghost_table, model_table
    from ghosted_fast.demo import PROMPT, run_demo

    result = run_demo(
        fetch_demo_assets(),
        output,
        num_layers=num_layers,
        dtypes=dtype,
        tokens=tokens,
        quick=quick,
        overwrite=overwrite,
        progress=True,
    )
    data = result.to_dict()
    gone = ",".join(map(str, result.report.removed))
    verdict = "bit for bit the same" if result.identical else "DIFFERENT"
    shown: list[TextTable | str] = [
        model_table(result.rows, f"SmolLM2-135M-Instruct without layers {gone}"),
        "",
        ghost_table(data["ghosts"]),
        "",
        f"loaded again in a new process: logits {verdict}",
        f"{PROMPT} {result.sample}",
        "",
        f"checkpoint: {result.checkpoint}",
        f"report: {result.page}",
    ]
    return Result(data, shown, passed=result.identical)
