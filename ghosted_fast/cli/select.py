"""`ghosted-fast select`: which layers to remove."""

from __future__ import annotations

from dataclasses import asdict

from ghosted_fast.cli import options
from ghosted_fast.cli.verb import Result


def select(
    model: options.ModelOption,
    calibration: options.CalibrationOption,
    num_layers: options.RequiredNumLayersOption,
    criterion: options.CriterionOption = "ghost",
    beam: options.BeamOption = 16,
    field: options.FieldOption = None,
    split: options.SplitOption = None,
    input: options.InputOption = "normed",
    bias: options.BiasOption = False,
    first_state: options.FirstStateOption = "auto",
    token_weight: options.TokenWeightOption = "capped",
    damping: options.DampingOption = "auto",
    tokens: options.TokensOption = 49152,
    sequence_length: options.SequenceLengthOption = 512,
    batch_size: options.BatchSizeOption = 8,
    dtype: options.DtypeOption = "auto",
    device: options.DeviceOption = "auto",
    dry_run: options.DryRunOption = False,
    seed: options.SeedOption = 0,
    rank_timeout: options.RankTimeoutOption = 1800,
) -> Result | None:
    """Score the layers that could be removed, and name the best ones."""
    absolute_damping = options.parse_damping(damping)

    from ghosted_fast.cli.launch import process_group
    from ghosted_fast.cli.loading import calibration_batches, open_model
    from ghosted_fast.cli.tables import memory_line, score_table, set_table
    from ghosted_fast.options import GhostOptions
    from ghosted_fast.pipeline import statistics_bytes_needed
    from ghosted_fast.selection.select import select_layers

    ghosts = GhostOptions(input, token_weight, first_state, bias, absolute_damping)
    with process_group(rank_timeout, device) as first:
        dense, tokenizer = open_model(model, dtype, device)
        if dry_run:
            needed = statistics_bytes_needed(dense, num_layers, criterion=criterion, options=ghosts)
            return Result({"statistics_bytes": needed}, [memory_line(needed, "all candidates")])
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
            progress=first,
        )
        selection = select_layers(
            dense, batches, num_layers, criterion, options=ghosts, beam=beam, progress=first
        )
    if not first:
        return None
    scores = [asdict(score) for score in selection.scores]
    sets = [asdict(item) for item in selection.sets]
    data = {
        "removed": selection.removed,
        "criterion": criterion,
        "scores": scores,
        "choices": selection.choices,
        "sets": sets,
    }
    table = set_table(sets) if sets else score_table(scores, selection.removed)
    return Result(data, [table, "", f"remove {','.join(map(str, selection.removed))}"])
