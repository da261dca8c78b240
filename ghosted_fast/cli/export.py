"""`ghosted-fast export`: a ghosted model as another engine's files."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

import typer

from ghosted_fast.cli._shared import values
from ghosted_fast.cli._shared.input_args import OverwriteOption, TrustOption
from ghosted_fast.cli._shared.results import Result
from ghosted_fast.cli._shared.verb import usage_error

Engine = Literal["gguf", "ort-genai"]
PRECISIONS = {"gguf": ("f32", "f16", "q8_0"), "ort-genai": ("fp32", "int8", "int4")}


def export(
    model: Annotated[str, typer.Argument(help="The model: a folder, a hub id or a .gguf file.")],
    to: Annotated[
        Engine, typer.Option("--to", help="gguf for llama.cpp, ort-genai for ONNX Runtime GenAI.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            help="What to write; if not given, a name made of the model's, in this folder.",
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            "--precision",
            autocompletion=values.completing(chain(*PRECISIONS.values())),
            help="gguf: f32 (if not given), f16, q8_0; ort-genai: fp32 (if not given), int8, int4.",
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            "--tokenizer", help="gguf: a GGUF file of the dense model, whose tokenizer is taken."
        ),
    ] = None,
    trust_remote_code: TrustOption = False,
    overwrite: OverwriteOption = False,
) -> Result:
    """Write a ghosted model for llama.cpp or ONNX Runtime GenAI.

    Models without ghosts are written the same way, so that dense, pruned and ghosted compare.
    """
    allowed = PRECISIONS[to]
    chosen = precision or allowed[0]
    if chosen not in allowed:
        raise usage_error(f"expected {', '.join(allowed)} with --to {to}, got {chosen!r}",
                          "--precision")  # fmt: skip
    if tokenizer is not None and to != "gguf":
        raise usage_error(
            f"a tokenizer is taken with --to gguf alone, got --to {to}: leave it out",
            "--tokenizer",
        )
    stem = Path(model).name.removesuffix(".gguf")
    if output is None:
        output = Path(f"{stem}-ghosted.gguf" if to == "gguf" else f"{stem}-ort-genai-{chosen}")

    from ghosted_fast.cli._shared.loading import check_new
    from ghosted_fast.models.loading import load_model

    # An older export may give its tokenizer to the one that takes its place.
    check_new(output, overwrite, model)
    loaded, own = load_model(model, "float32", trust_remote_code=trust_remote_code)
    if to == "gguf":
        from ghosted_fast.export.gguf import export_gguf

        if tokenizer is None and model.endswith(".gguf"):
            tokenizer = Path(model)
        export_gguf(loaded, output, tokenizer or own, chosen, overwrite)  # type: ignore[arg-type]
    else:
        from ghosted_fast.export.ort_genai import export_ort_genai

        export_ort_genai(loaded, output, own, chosen, overwrite)  # type: ignore[arg-type]
    return Result(
        {"model": model, "to": to, "precision": chosen, "output": str(output)},
        [f"wrote {output}"],
    )
