"""`ghosted-fast bench`: prefill and decoding speed of several models, in rounds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import typer

from ghosted_fast.cli._shared.input_args import ModelsArgs
from ghosted_fast.cli._shared.precision_args import PrecisionArgs
from ghosted_fast.cli._shared.results import Result, TextTable

if TYPE_CHECKING:
    from ghosted_fast.measure.throughput import SpeedSettings


@dataclass(frozen=True, kw_only=True)
class SpeedArgs:
    """What is measured."""

    title: ClassVar = "What is measured"
    prompt_length: Annotated[
        list[int],
        typer.Option("--prompt-length", min=1, help="Tokens of each prompt; repeat it."),
    ] = field(default_factory=lambda: [512])
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", min=2, help="Tokens to decode after it.")
    ] = 64
    batch_size: Annotated[
        list[int], typer.Option("--batch-size", min=1, help="Prompts at a time; repeat it.")
    ] = field(default_factory=lambda: [1])

    def settings(self, effort: PrecisionArgs) -> Iterator[SpeedSettings]:
        """Yield the settings of every length and size."""
        from ghosted_fast.measure.throughput import SpeedSettings

        for length in dict.fromkeys(self.prompt_length):
            for size in dict.fromkeys(self.batch_size):
                yield SpeedSettings(length, self.new_tokens, size, effort.precision, effort.seconds)


def bench(
    models: ModelsArgs,
    speed: SpeedArgs,
    effort: PrecisionArgs,
    engine: Annotated[
        Literal["transformers", "vllm"],
        typer.Option("--engine", help="What runs the models; vllm takes saved folders."),
    ] = "transformers",
) -> Result:
    """Measure tokens per second of prefill and of decoding, in rounds that all models take part in.

    Ratios are to the first model. Ctrl-C shows what is known so far.
    """
    from dataclasses import asdict

    from ghosted_fast.cli._shared.tables import deployment_table, model_table, speed_lines
    from ghosted_fast.measure.models_table import compare_models
    from ghosted_fast.measure.system import machine_facts

    shown: list[TextTable | str] = []
    records: list[dict[str, Any]] = []
    interrupted = False
    if engine == "transformers":
        opened, _ = models.open()
    for settings in speed.settings(effort):
        try:
            if engine == "vllm":
                from ghosted_fast.serving.vllm.speed import compare_in_vllm

                rows = compare_in_vllm(models.model, models.dtype, settings)
            else:
                rows = compare_models(opened, speed=asdict(settings), progress=True)
        except KeyboardInterrupt:
            if not records:
                raise
            interrupted = True
            break
        records += [row.to_dict() for row in rows]
        shown += ["", model_table(rows), "", deployment_table(rows), *speed_lines(rows)]
        interrupted = any(row.throughput and row.throughput.ended == "interrupted" for row in rows)
        if interrupted:
            break
    data = {"models": records, "machine": machine_facts(), "engine": engine}
    return Result(data, shown[1:], interrupted=interrupted)
