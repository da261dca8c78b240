"""`ghosted-fast fit`: a smaller checkpoint with ghosts in place of the removed layers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ghosted_fast.cli import options
from ghosted_fast.cli.verb import Result, TextTable, usage_error

OutputOption = Annotated[
    Path | None, typer.Option("--output", help="Folder for the checkpoint; required to save one.")
]


def fit(
    model: options.ModelOption,
    calibration: options.CalibrationOption,
    output: OutputOption = None,
    num_layers: options.NumLayersOption = None,
    removed: options.RemovedOption = None,
    max_perplexity_increase: options.MaxPerplexityIncreaseOption = None,
    min_speedup: options.MinSpeedupOption = None,
    criterion: options.CriterionOption = "ghost",
    beam: options.BeamOption = 16,
    sequential: options.SequentialOption = True,
    recovery: options.RecoveryOption = "ghost",
    field: options.FieldOption = None,
    split: options.SplitOption = None,
    input: options.InputOption = "normed",
    bias: options.BiasOption = False,
    first_state: options.FirstStateOption = "auto",
    token_weight: options.TokenWeightOption = "capped",
    damping: options.DampingOption = "auto",
    corrections: options.CorrectionsOption = "auto",
    refine: options.RefineOption = 0,
    tokens: options.TokensOption = 49152,
    sequence_length: options.SequenceLengthOption = 512,
    batch_size: options.BatchSizeOption = 8,
    dtype: options.DtypeOption = "auto",
    device: options.DeviceOption = "auto",
    evaluation: options.OptionalEvaluationOption = None,
    evaluation_tokens: options.EvaluationTokensOption = 5120,
    report: options.ReportOption = None,
    overwrite: options.OverwriteOption = False,
    dry_run: options.DryRunOption = False,
    seed: options.SeedOption = 0,
    rank_timeout: options.RankTimeoutOption = 1800,
) -> Result | None:
    """Remove layers, fit a ghost for each removed run, and save the smaller model."""
    increase = options.parse_increase(max_perplexity_increase)
    speedup = options.parse_speedup(min_speedup)
    layers = options.check_layer_choice(num_layers, removed, increase, speedup)
    if num_layers is None and layers is None and (recovery != "ghost" or dry_run):
        raise usage_error(
            "expected --num-layers or --removed with --dry-run, or with a recovery but ghost",
            "--max-perplexity-increase / --min-speedup",
        )
    absolute_damping = options.parse_damping(damping)
    correction_count = options.parse_corrections(corrections)
    if output is None and not dry_run:
        raise usage_error("expected a folder for the checkpoint, or --dry-run", "--output")
    if report is not None and report.suffix not in (".html", ".json"):
        raise usage_error(f"expected a .html or .json file, got {str(report)!r}", "--report")

    from ghosted_fast.checkpoint.model_card import attach_report, write_card
    from ghosted_fast.checkpoint.save import save_model
    from ghosted_fast.cli.launch import process_group
    from ghosted_fast.cli.loading import calibration_batches, check_new, open_model
    from ghosted_fast.cli.tables import (
        budget_line,
        ghost_table,
        improvement_lines,
        memory_line,
        model_table,
    )
    from ghosted_fast.measure.models_table import compare_models
    from ghosted_fast.measure.system import machine_facts
    from ghosted_fast.options import GhostOptions
    from ghosted_fast.pipeline import ghost_model, statistics_bytes_needed
    from ghosted_fast.reports.page import write_report
    from ghosted_fast.surgery.cut import prune_model
    from ghosted_fast.text.loading import load_texts, token_batches

    with process_group(rank_timeout, device) as first:
        if first and not dry_run:
            check_new(output, overwrite)
            check_new(report, overwrite)
        ghosts = GhostOptions(input, token_weight, first_state, bias, absolute_damping)
        dense, tokenizer = open_model(model, dtype, device)
        if dry_run:
            needed = statistics_bytes_needed(dense, num_layers, layers, criterion, ghosts)
            return Result({"statistics_bytes": needed}, [memory_line(needed, "all intervals")])
        held_out = None
        if first and evaluation is not None:
            texts = load_texts(evaluation, field, split)
            held_out = token_batches(
                tokenizer, texts, evaluation_tokens, sequence_length, batch_size
            )
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
        assert output is not None
        # Beside the checkpoint: a refinement that was killed goes on there.
        refine_state = output.with_name(f"{output.name}.refine") if refine else None
        smaller, found = ghost_model(
            dense,
            batches,
            num_layers,
            removed=layers,
            max_perplexity_increase=increase,
            min_decode_speedup=speedup,
            criterion=criterion,
            beam=beam,
            sequential=sequential,
            recovery=recovery,
            input=input,
            token_weight=token_weight,
            first_state=first_state,
            bias=bias,
            damping=absolute_damping,
            corrections=correction_count,
            refine=refine,
            refine_state=refine_state,
            progress=first,
        )
        facts: dict[str, Any] = found.to_dict() | {"calibration": Path(calibration).name}
        if first:
            attach_report(smaller.config, facts)
            save_model(smaller, output, tokenizer, overwrite)
            if refine_state is not None:
                refine_state.unlink(missing_ok=True)
    if not first:
        return None
    facts["output"] = str(output)
    shown: list[TextTable | str] = [
        f"removed {','.join(map(str, facts['removed']))}; saved {output}"
    ]
    if facts.get("budget"):
        shown.append(budget_line(facts["budget"]))
    if facts.get("ghosts"):
        shown += ["", ghost_table(facts["ghosts"]), *improvement_lines(facts)]
    if held_out is not None:
        models = {"dense": dense, "pruned": prune_model(dense, facts["removed"])}
        if recovery != "none":
            models["ghosted" if recovery == "ghost" else recovery] = smaller
        rows = compare_models(models, held_out, progress=True, seed=seed)
        facts["models"] = [row.to_dict() for row in rows]
        if attach_report(smaller.config, facts):
            smaller.config.save_pretrained(output)
            write_card(smaller.config, output)
        shown += ["", model_table(rows)]
    if report is not None:
        facts["machine"] = machine_facts()
        write_report(report, facts, overwrite=overwrite)
        shown += ["", f"report: {report}"]
    return Result(facts, shown)
