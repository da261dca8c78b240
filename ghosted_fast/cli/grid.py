"""`ghosted-fast grid`: every criterion with every recovery, on one model and the same tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, get_args

import typer

from ghosted_fast.cli._shared import values
from ghosted_fast.cli._shared.fit_args import GhostArgs, ImproveArgs
from ghosted_fast.cli._shared.input_args import (
    CalibrationArgs,
    EvaluationTokensOption,
    ModelArgs,
    OverwriteOption,
    TaskArgs,
    TextArgs,
)
from ghosted_fast.cli._shared.results import Result, TextTable
from ghosted_fast.cli._shared.verb import usage_error

if TYPE_CHECKING:
    from collections.abc import Callable

    from ghosted_fast.grid import Variant

# A grid has many shapes of model; each is measured in turn with all others.
_SPEED = {"prompt_length": 128, "new_tokens": 32, "seconds": 120.0}


@dataclass(frozen=True, kw_only=True)
class ComparedArgs(ImproveArgs):
    """What is compared with what: each number, each criterion and each recovery."""

    title: ClassVar = "What is compared"
    remove: Annotated[
        list[tuple[int, ...]],
        typer.Option(
            "--remove",
            parser=values.parse_counts,
            metavar="NUMBERS",
            help="Numbers of layers to remove: '3,5,7', or repeat it.",
        ),
    ]
    criterion: Annotated[
        list[values.Criterion] | None,
        values.words_option(
            "--criterion",
            values.Criterion,
            "What picks the layers; repeat it: "
            f"{', '.join(get_args(values.Criterion))}. All that the model allows if "
            "not given.",
        ),
    ] = None
    recovery: Annotated[
        list[values.Recovery] | None,
        values.words_option(
            "--recovery",
            values.Recovery,
            "What takes their place; repeat it: "
            f"{', '.join(get_args(values.Recovery))}. All if not given.",
        ),
    ] = None

    correct_rivals: Annotated[
        bool,
        typer.Option(
            "--correct-rivals/--no-correct-rivals",
            help="Also correct what the other recoveries put in, as the ghost is corrected: a row "
            "more for each that has an operator.",
        ),
    ] = False

    def __post_init__(self) -> None:
        if self.correct_rivals and self.corrections == 0:
            raise usage_error("expected corrections with it, got --corrections 0",
                              "--correct-rivals")  # fmt: skip
        for option, names in (("--criterion", self.criterion), ("--recovery", self.recovery)):
            if names is not None and len(set(names)) < len(names):
                raise usage_error(f"expected each once, got {', '.join(names)}", option)

    @property
    def counts(self) -> list[int]:
        """The numbers of layers, each once, ascending."""
        return sorted({count for given in self.remove for count in given})

    def recoveries(self, seed: int) -> list[str | Variant]:
        """Return the recoveries, and those that are improved afterwards."""
        from ghosted_fast.grid import corrected, healed
        from ghosted_fast.recovery import RECOVERIES

        names = [*(self.recovery or RECOVERIES)]
        found: list[str | Variant] = [*names]
        for name in names if self.corrections != 0 else ():
            method = RECOVERIES[name]
            if method.improvable or (self.correct_rivals and method.has_operator):
                found.append(corrected(self.corrections, name))
        if self.heal:
            found += [healed(self.heal, name, seed) for name in names]
        return found


@dataclass(frozen=True, kw_only=True)
class JudgedArgs(TaskArgs):
    """What every cell is measured on."""

    title: ClassVar = "What is measured"
    evaluation: Annotated[
        list[str],
        typer.Option(
            "--evaluation",
            parser=values.parse_written_text,
            metavar="TEXT",
            help="Text to measure perplexity on, as for --calibration; repeat it. The first "
            "decides.",
        ),
    ]
    evaluation_tokens: EvaluationTokensOption = 5120
    speed: Annotated[
        bool, typer.Option("--speed/--no-speed", help="Also measure decoding speed, at the end.")
    ] = False

    def __post_init__(self) -> None:
        if len(set(self.evaluation)) < len(self.evaluation):
            raise usage_error("expected different texts, got one of them twice", "--evaluation")

    def check(self, text: TextArgs) -> None:
        """Raise, before a model is loaded, unless there are such texts."""
        text.check_tokens(self.evaluation_tokens, "--evaluation-tokens")
        for spec in self.evaluation:
            text.check_there(spec)

    def load(self, text: TextArgs, tokenizer: Any) -> dict[str, Any]:
        """Return the batches of each text, by short names that differ, read as another text is.

        Raises:
            SourceError: A text cannot be read or is too short; the message names it.
        """
        from ghosted_fast.errors import SourceError

        names = [Path(spec).stem for spec in self.evaluation]
        if len(set(names)) < len(names):
            names = self.evaluation
        found = {}
        for name, spec in zip(names, self.evaluation, strict=True):
            try:
                found[name] = text.batches_of(
                    tokenizer, spec, self.evaluation_tokens, text.sequence_length
                )
            except SourceError as error:
                raise SourceError(f"evaluation {error}") from error
        return found


@dataclass(frozen=True, kw_only=True)
class FolderArgs:
    """Where the results go."""

    title: ClassVar = "Output"
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            help="Folder for the results; a run that was stopped goes on from what is there.",
        ),
    ]
    overwrite: OverwriteOption = False


def grid(
    model: ModelArgs,
    calibration: CalibrationArgs,
    compared: ComparedArgs,
    judged: JudgedArgs,
    ghosts: GhostArgs,
    folder: FolderArgs,
) -> Result:
    """Run every way to choose layers with every way to make up for them, each with each.

    The ghost comes with and without corrections, with --correct-rivals every operator does; --heal
    adds every recovery after training.
    Writes results.json, results.md and the page index.html into the output folder.
    """
    from ghosted_fast.checkpoint.save import check_place
    from ghosted_fast.cli._shared.loading import check_layers
    from ghosted_fast.grid import GridPlan, run_grid
    from ghosted_fast.grid.outputs import check_outputs, full_table
    from ghosted_fast.options import Count, RunOptions

    check_outputs()
    _check_text(calibration, compared)
    tasks = judged.names()
    calibration.check()
    judged.check(calibration)
    check_place(folder.output)
    counts = [Count(count) for count in compared.counts]
    model.check(calibration.sequence_length, *counts)
    dense, tokenizer = model.open()
    for count in counts:
        check_layers(dense, count)
    evaluations = judged.load(calibration, tokenizer)
    found = run_grid(
        dense,
        calibration.load(dense, tokenizer),
        evaluations,
        compared.counts,
        folder.output,
        plan=GridPlan(
            criteria=compared.criterion,
            recoveries=compared.recoveries(calibration.seed),
            name=Path(model.model).name,
            speed=_SPEED if judged.speed else None,
            accuracy=_accuracy(tokenizer, tasks, judged.limit) if tasks else None,
            accuracy_name=f"{tasks}, limit {judged.limit}",
            seed=calibration.seed,
            overwrite=folder.overwrite,
        ),
        options=ghosts.options(),
        run=RunOptions(progress=True),
    )
    columns, lines = full_table(found, found.rows)
    shown: list[TextTable | str] = [TextTable(columns, lines, found.about["model"]), ""]
    shown.append(f"{folder.output / 'index.html'}")
    return Result({**found.to_dict(), "output": str(folder.output)}, shown)


def _check_text(calibration: CalibrationArgs, compared: ComparedArgs) -> None:
    """Raise unless the text suffices for what is to be learned from it.

    Raises:
        typer.BadParameter: It does not.
    """
    options = compared.heal_options(calibration.seed)
    if options is None:
        return
    needed = calibration.tokens_to_heal(options)
    if calibration.tokens < needed:
        raise usage_error(
            f"expected --tokens of at least {needed} with --heal {options.tokens}, since all rows "
            f"learn from one text and no token is read twice, got {calibration.tokens}",
            "--heal",
        )


def _accuracy(
    tokenizer: Any, tasks: list[str], limit: int | None
) -> Callable[[Any], dict[str, float]]:
    """Return what measures a model's accuracy on tasks."""
    from ghosted_fast.measure.tasks import accuracy

    return lambda model: accuracy(model, tokenizer, tasks, limit)
