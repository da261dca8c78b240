"""`ghosted-fast bench`: prefill and decoding speed of several models, interleaved."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from ghosted_fast.cli import options
from ghosted_fast.cli.verb import Result


def bench(
    model: options.ModelsOption,
    prompt_length: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode after it.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of each model.")] = 5,
    dtype: options.DtypeOption = "auto",
    device: options.DeviceOption = "auto",
    engine: Annotated[
        Literal["transformers", "vllm"],
        typer.Option("--engine", help="What runs the models; vllm takes saved folders."),
    ] = "transformers",
) -> Result:
    """Measure tokens per second of prefill and of decoding, one model after the other in turn."""
    from ghosted_fast.cli.loading import open_models
    from ghosted_fast.cli.tables import model_table
    from ghosted_fast.measure.models_table import compare_models
    from ghosted_fast.measure.system import machine_facts

    speed = {
        "prompt_length": prompt_length,
        "new_tokens": new_tokens,
        "batch_size": batch_size,
        "repeats": repeats,
    }
    if engine == "vllm":
        from ghosted_fast.serving.vllm.speed import compare_in_vllm

        rows = compare_in_vllm(model, dtype, **speed)
    else:
        models, _ = open_models(model, dtype, device)
        rows = compare_models(models, speed=speed)
    data = {"models": [row.to_dict() for row in rows], "machine": machine_facts(), "engine": engine}
    return Result(data, [model_table(rows)])
