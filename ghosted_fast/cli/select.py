"""`ghosted-fast select`: which layers to remove."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Annotated, ClassVar

import typer

from ghosted_fast.cli._shared.fit_args import GhostArgs, LaunchArgs, SelectionArgs
from ghosted_fast.cli._shared.input_args import CalibrationArgs
from ghosted_fast.cli._shared.results import Result
from ghosted_fast.cli._shared.sweep_args import SweptModelArgs


@dataclass(frozen=True, kw_only=True)
class ChosenArgs(SelectionArgs):
    """How many layers are chosen, and by what."""

    title: ClassVar = "Which layers"
    remove: Annotated[int, typer.Option("--remove", min=1, help="How many layers to remove.")]


def select(
    model: SweptModelArgs,
    calibration: CalibrationArgs,
    chosen: ChosenArgs,
    ghosts: GhostArgs,
    launch: LaunchArgs,
) -> Result | None:
    """Score the layers that could be removed, and name the best ones."""
    from ghosted_fast.cli._shared.launch import process_group
    from ghosted_fast.cli._shared.loading import check_layers
    from ghosted_fast.cli._shared.sweep_args import dry_run, read_text, swept
    from ghosted_fast.cli._shared.tables import memory_line, score_table, set_table
    from ghosted_fast.facts import layers_as_text
    from ghosted_fast.options import Count, RunOptions
    from ghosted_fast.pipeline import statistics_bytes_needed
    from ghosted_fast.selection.select import select_layers
    from ghosted_fast.swept.asked import Asked
    from ghosted_fast.swept.run import select_unloaded

    count, options = Count(chosen.remove), ghosts.options()
    run = RunOptions(
        beam=chosen.beam,
        corrected_candidates=chosen.corrected_candidates,
        corrections=0,
        device=model.place,
        memory=model.memory,
        state=model.state,
    )
    asked = Asked(count, chosen.criterion, "none", options, run)
    with process_group(launch.rank_timeout, model.device) as first:
        if not launch.dry_run:
            calibration.check()
        model.check(0 if launch.dry_run else calibration.sequence_length, count)
        if launch.dry_run:
            dense, facts, lines = dry_run(model, calibration, asked)
            check_layers(dense, count)
            needed = statistics_bytes_needed(dense, count, chosen.criterion, options)
            lines = [memory_line(needed, "all candidates"), *lines]
            return Result({"statistics_bytes": needed, **facts}, lines)
        left = swept(model, calibration, replace(asked, run=replace(run, progress=first)), None)
        if left is not None:
            selection = select_unloaded(left[0], read_text(left[0], calibration, first), left[1])
        else:
            dense, tokenizer = model.open()
            check_layers(dense, count)
            selection = select_layers(
                dense,
                calibration.load(dense, tokenizer, first),
                chosen.remove,
                chosen.criterion,
                options=options,
                run=replace(run, progress=first),
            )
    if not first:
        return None
    scores = [asdict(score) for score in selection.scores]
    sets = [asdict(item) for item in selection.sets]
    data = {
        "removed": selection.removed,
        "criterion": chosen.criterion,
        "scores": scores,
        "choices": selection.choices,
        "sets": sets,
    }
    table = set_table(sets) if sets else score_table(scores, selection.removed)
    return Result(data, [table, "", f"remove {layers_as_text(selection.removed)}"])
