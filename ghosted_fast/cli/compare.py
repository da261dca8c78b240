"""`ghosted-fast compare`: every criterion with every recovery, on one model and the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from ghosted_fast.cli import options
from ghosted_fast.cli.verb import Result, TextTable, usage_error

_CRITERIA = ", ".join(get_args(options.Criterion))
# A grid has many shapes of model; each is measured in turn with all others.
_SPEED = {"prompt_length": 128, "new_tokens": 32, "repeats": 3}
_RECOVERIES = ", ".join(get_args(options.Recovery))

OutputOption = Annotated[
    Path,
    typer.Option(
        "--output",
        help="Folder for the results; a run that was stopped goes on from what is there.",
    ),
]
EvaluationsOption = Annotated[
    list[str],
    typer.Option(
        "--evaluation",
        help="Text to measure perplexity on, as for --calibration; repeat it. The first decides.",
    ),
]
CountsOption = Annotated[
    list[str],
    typer.Option("--num-layers", help="Numbers of layers to remove: '3,5,7', or repeat it."),
]
CriteriaOption = Annotated[
    list[str] | None,
    typer.Option(
        "--criterion", help=f"What picks the layers; repeat it: {_CRITERIA}. All if not given."
    ),
]
RecoveriesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--recovery", help=f"What takes their place; repeat it: {_RECOVERIES}. All if not given."
    ),
]
SpeedOption = Annotated[
    bool, typer.Option("--speed/--no-speed", help="Also measure decoding speed, at the end.")
]
TextTokensOption = Annotated[
    int, typer.Option("--evaluation-tokens", min=1, help="Tokens of each evaluation text.")
]


def compare(
    model: options.ModelOption,
    calibration: options.CalibrationOption,
    evaluation: EvaluationsOption,
    num_layers: CountsOption,
    output: OutputOption,
    criterion: CriteriaOption = None,
    recovery: RecoveriesOption = None,
    field: options.FieldOption = None,
    split: options.SplitOption = None,
    input: options.InputOption = "normed",
    bias: options.BiasOption = False,
    first_state: options.FirstStateOption = "auto",
    token_weight: options.TokenWeightOption = "capped",
    damping: options.DampingOption = "auto",
    tokens: options.TokensOption = 49152,
    evaluation_tokens: TextTokensOption = 5120,
    sequence_length: options.SequenceLengthOption = 512,
    batch_size: options.BatchSizeOption = 8,
    dtype: options.DtypeOption = "auto",
    device: options.DeviceOption = "auto",
    corrections: options.CorrectionsOption = "auto",
    refine: options.RefineOption = 0,
    tasks: options.TasksOption = None,
    limit: options.LimitOption = None,
    speed: SpeedOption = False,
    overwrite: options.OverwriteOption = False,
    seed: options.SeedOption = 0,
) -> Result:
    """Compare ways to choose layers and to make up for them, each with each.

    The ghost comes with and without corrections; --refine adds every operator after training.
    Writes results.json, results.md and the page index.html into the output folder.
    """
    counts = _counts(num_layers)
    names = _text_names(evaluation)
    _check_names(criterion, options.Criterion, "--criterion")
    _check_names(recovery, options.Recovery, "--recovery")
    absolute_damping = options.parse_damping(damping)
    steps = options.parse_corrections(corrections)
    task_names = None if tasks is None else [name.strip() for name in tasks.split(",")]

    from ghosted_fast.cli.loading import calibration_batches, open_model
    from ghosted_fast.errors import SourceError
    from ghosted_fast.grid import Variant, compare_grid, corrected, refined
    from ghosted_fast.grid.outputs import full_table
    from ghosted_fast.grid.variants import WITH_OPERATOR
    from ghosted_fast.measure.tasks import accuracy, check_tasks
    from ghosted_fast.options import GhostOptions
    from ghosted_fast.recovery import RECOVERIES
    from ghosted_fast.selection.criteria import CRITERIA
    from ghosted_fast.text.loading import load_texts, token_batches

    if task_names is not None:
        task_names = check_tasks(task_names)
    recoveries: list[str | Variant] = [*(recovery or RECOVERIES)]
    if steps != 0 and "ghost" in recoveries:
        recoveries.append(corrected(steps))
    if refine:
        operators = [name for name in WITH_OPERATOR if name in recoveries]
        recoveries += [refined(refine, name, seed) for name in operators]
    ghosts = GhostOptions(input, token_weight, first_state, bias, absolute_damping)
    dense, tokenizer = open_model(model, dtype, device)
    evaluations = {}
    for name, spec in names.items():
        try:
            evaluations[name] = token_batches(
                tokenizer,
                load_texts(spec, field, split),
                evaluation_tokens,
                sequence_length,
                batch_size,
            )
        except SourceError as error:
            raise SourceError(f"evaluation text {spec!r}: {error}") from error
    batches = calibration_batches(
        dense,
        tokenizer,
        calibration,
        field=field,
        split=split,
        num_tokens=tokens,
        sequence_length=sequence_length,
        batch_size=batch_size,
        seed=seed,
    )
    grid = compare_grid(
        dense,
        batches,
        evaluations,
        counts,
        output,
        criteria=criterion or tuple(CRITERIA),
        recoveries=recoveries,
        name=Path(model).name,
        options=ghosts,
        speed=_SPEED if speed else None,
        accuracy=None
        if task_names is None
        else lambda item: accuracy(item, tokenizer, task_names, limit),
        accuracy_name=f"{task_names}, limit {limit}",
        seed=seed,
        overwrite=overwrite,
        progress=True,
    )
    data: dict[str, Any] = {**grid.to_dict(), "output": str(output)}
    columns, lines = full_table(grid, grid.rows)
    shown: list[TextTable | str] = [TextTable(columns, lines, grid.about["model"]), ""]
    shown.append(f"{output / 'index.html'}")
    return Result(data, shown)


def _check_names(names: list[str] | None, choices: Any, option: str) -> None:
    known = get_args(choices)
    if unknown := [name for name in names or () if name not in known]:
        raise usage_error(f"expected some of {', '.join(known)}, got {unknown[0]!r}", option)


def _counts(given: list[str]) -> list[int]:
    """Return the numbers of layers that '3,5' and repeated options mean."""
    parts = [part.strip() for text in given for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise usage_error(
            f"expected numbers above 0 such as '3,5,7', got {','.join(given)!r}", "--num-layers"
        )
    return sorted({int(part) for part in parts})


def _text_names(specs: list[str]) -> dict[str, str]:
    """Return the texts by short names that differ."""
    names = [Path(spec).stem for spec in specs]
    if len(set(names)) < len(names):
        names = specs
    if len(set(names)) < len(names):
        raise usage_error("expected different texts, got one of them twice", "--evaluation")
    return dict(zip(names, specs, strict=True))
