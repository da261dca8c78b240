"""`ghosted-fast bench`: prefill and decoding speed of several models, interleaved."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, ClassVar, Literal

import typer

from ghosted_fast.cli._shared.input_args import ModelsArgs
from ghosted_fast.cli._shared.results import Result


@dataclass(frozen=True, kw_only=True)
class SpeedArgs:
    """What is measured: the arguments of `compare_throughput`."""

    title: ClassVar = "What is measured"
    prompt_length: Annotated[
        int, typer.Option("--prompt-length", min=1, help="Tokens of each prompt.")
    ] = 512
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", min=1, help="Tokens to decode after it.")
    ] = 64
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Prompts at a time.")] = 1
    repeats: Annotated[
        int, typer.Option("--repeats", min=1, help="Measurements of each model.")
    ] = 5


def bench(
    models: ModelsArgs,
    speed: SpeedArgs,
    engine: Annotated[
        Literal["transformers", "vllm"],
        typer.Option("--engine", help="What runs the models; vllm takes saved folders."),
    ] = "transformers",
) -> Result:
    """Measure tokens per second of prefill and of decoding, one model after the other in turn."""
    from ghosted_fast.cli._shared.tables import model_table
    from ghosted_fast.measure.models_table import compare_models
    from ghosted_fast.measure.system import machine_facts

    if engine == "vllm":
        from ghosted_fast.serving.vllm.speed import compare_in_vllm

        rows = compare_in_vllm(models.model, models.dtype, **asdict(speed))
    else:
        opened, _ = models.open()
        rows = compare_models(opened, speed=asdict(speed))
    data = {"models": [row.to_dict() for row in rows], "machine": machine_facts(), "engine": engine}
    return Result(data, [model_table(rows)])
