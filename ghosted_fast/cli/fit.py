"""`ghosted-fast fit`: a smaller checkpoint with ghosts in place of the removed layers."""

from __future__ import annotations

import gc
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from ghosted_fast.cli._shared.fit_args import (
    FitCalibrationArgs,
    GhostArgs,
    HowManyArgs,
    RecipeArgs,
    RecoveryArgs,
)
from ghosted_fast.cli._shared.input_args import (
    CalibrationArgs,
    EvaluationArgs,
    ModelArgs,
)
from ghosted_fast.cli._shared.output_args import OutputArgs, heal_state, states
from ghosted_fast.cli._shared.recipe import Recipe
from ghosted_fast.cli._shared.results import Result, TextTable
from ghosted_fast.cli._shared.sweep_args import SweptModelArgs
from ghosted_fast.cli._shared.verb import usage_error

if TYPE_CHECKING:
    from torch import Tensor

    from ghosted_fast.models.unloaded.opening import Unloaded
    from ghosted_fast.options import HealOptions
    from ghosted_fast.swept.asked import Asked


def fit(
    model: SweptModelArgs,
    calibration: FitCalibrationArgs,
    how_many: HowManyArgs,
    ghosts: GhostArgs,
    recovery: RecoveryArgs,
    evaluation: EvaluationArgs,
    output: OutputArgs,
    launch: RecipeArgs,
) -> Result | None:
    """Remove layers, fit a ghost for each removed run, and save the smaller model.

    With --heal the smaller model is trained afterwards, on text of which --tokens is the beginning.
    """
    _check_together(calibration, how_many, recovery, output, launch)

    from ghosted_fast.cli._shared.launch import process_group
    from ghosted_fast.improve.healing import check_healable
    from ghosted_fast.models.loading import load_processor
    from ghosted_fast.pipeline import ghost_model
    from ghosted_fast.surgery.transfer import put_ghosts, take_ghosts
    from ghosted_fast.text.loading import first_rows

    asked = _asked(model, calibration, how_many, ghosts, recovery)
    healing = recovery.heal_options(calibration.seed)
    recipe = Recipe((model, calibration, how_many, ghosts, recovery, evaluation), launch.recipe)
    with process_group(launch.rank_timeout, model.device) as first:
        _check_ahead(model, calibration, how_many, evaluation, output if first else None, launch)
        if launch.dry_run:
            return _memory(model, calibration, how_many, asked)
        left = _left_in_files(model, calibration, asked, output)
        if left is not None:
            return _fit_swept(*left, calibration, evaluation, output, recipe, first)
        dense, tokenizer = calibration.open(model)
        beside = load_processor(model.model, model.trust_remote_code) or tokenizer
        if healing is not None and calibration.calibrate_in is None:
            check_healable(dense, healing)
        _check_loaded(dense, how_many, output if first else None)
        held_out = evaluation.load(calibration, tokenizer) if first else None
        text = _text(calibration, healing, dense, tokenizer, first)
        if first:
            recipe.check_text(text)
        smaller, found = ghost_model(
            dense,
            first_rows(text, calibration.tokens // calibration.sequence_length),
            how_many.remove_or_bound(),
            removed=how_many.removed,
            criterion=how_many.criterion,
            recovery=recovery.recovery,
            options=asked.options,
            run=replace(asked.run, heal=None, progress=first),
        )
        facts = found.to_dict() | {"calibration": calibration.named}
        if calibration.calibrate_in is not None and (first or healing is not None):
            taken = take_ghosts(smaller)
            del dense, smaller
            gc.collect()  # the quantized copy makes room for the model
            dense, _ = model.open()
            smaller = put_ghosts(dense, taken)
        if healing is not None:
            _heal(smaller, dense, text, healing, facts, output, first)
        if first:
            _save(smaller, facts, beside, output, recipe.written(text, facts))
            heal_state(output.folder).unlink(missing_ok=True)
    if not first:
        return None
    shown = _said(facts)
    if held_out is not None:
        models = _models(dense, smaller, recovery.kind, facts)
        shown += ["", _measure(models, smaller, facts, held_out, calibration.seed)]
        _answer(models, tokenizer, facts, output)
    return _reported(facts, shown, output)


def _reported(facts: dict[str, Any], shown: list[TextTable | str], output: OutputArgs) -> Result:
    """Write the report, if one is asked for, and return what is shown."""
    from ghosted_fast.cli._shared.tables import profile_table

    if output.profile:
        shown += ["", profile_table(facts["spans"])]
    if output.report is not None:
        shown += ["", output.write(facts)]
    return Result(facts, shown)


def _check_together(
    calibration: FitCalibrationArgs,
    how_many: HowManyArgs,
    recovery: RecoveryArgs,
    output: OutputArgs,
    launch: RecipeArgs,
) -> None:
    """Raise unless the groups of options go together.

    Raises:
        typer.BadParameter: Two of them do not.
    """
    bound = how_many.bound_option
    if bound == "--min-speedup" and launch.dry_run:
        raise usage_error(
            "expected --remove, --removed or --max-perplexity-increase with --dry-run, which does "
            "not measure speed",
            bound,
        )
    if bound is not None and recovery.recovery != "ghost":
        raise usage_error(
            f"expected --remove or --removed with --recovery {recovery.recovery}: the number is "
            "found with ghosts in place",
            bound,
        )
    if output.output is None and not launch.dry_run:
        raise usage_error("expected a folder for the checkpoint, or --dry-run", "--output")
    _check_calibrated_in(calibration, how_many, recovery)


def _check_ahead(
    model: ModelArgs,
    calibration: FitCalibrationArgs,
    how_many: HowManyArgs,
    evaluation: EvaluationArgs,
    output: OutputArgs | None,
    launch: RecipeArgs,
) -> None:
    """Raise, before any weight is read, if what is named cannot be used.

    Raises:
        GhostedFastError: It cannot; a dry run reads no text and writes nothing.
    """
    length = 0 if launch.dry_run else calibration.sequence_length
    if not launch.dry_run:
        if output is not None:
            output.check(model.model, *calibration.shares, evaluation.evaluation)
        calibration.check()
        evaluation.check(calibration)
    model.check(length, how_many.how_many())
    calibration.check_model(model)


def _check_loaded(dense: Any, how_many: HowManyArgs, output: OutputArgs | None) -> None:
    """Raise, before the fit, unless a loaded model has the layers and there is room for its rest.

    Raises:
        GhostedFastError: It has not, or there is not.
    """
    from ghosted_fast.checkpoint.save import check_room
    from ghosted_fast.cli._shared.loading import check_layers, least_bytes

    check_layers(dense, how_many.how_many())
    if output is not None:
        check_room(output.folder, least_bytes(dense, how_many.how_many()))


def _check_calibrated_in(
    calibration: FitCalibrationArgs, how_many: HowManyArgs, recovery: RecoveryArgs
) -> None:
    """Raise unless a quantized copy can stand for the model in all that is asked for.

    Raises:
        typer.BadParameter: It cannot.
    """
    if calibration.calibrate_in is None:
        return
    if recovery.recovery != "ghost":
        raise usage_error(
            f"expected --recovery ghost with --calibrate-in, got {recovery.recovery!r}, which "
            "changes weights of the model it is fitted in",
            "--calibrate-in",
        )
    if how_many.bound_option == "--min-speedup":
        raise usage_error(
            "expected --remove, --removed or --max-perplexity-increase with --calibrate-in: the "
            "speed of the quantized copy is not that of the model",
            "--calibrate-in",
        )


def _text(
    calibration: FitCalibrationArgs,
    healing: HealOptions | None,
    dense: Any,
    tokenizer: Any,
    progress: bool,
) -> list[Tensor]:
    """Return the text of the fit, and what a healing needs beyond it, as far as there is more."""
    tokens = calibration.tokens
    if healing is not None:
        tokens = max(tokens, calibration.tokens_to_heal(healing))
    return calibration.read(dense, tokenizer, tokens, calibration.fewest(dense), progress)


def _heal(
    smaller: Any,
    dense: Any,
    text: list[Tensor],
    healing: HealOptions,
    facts: dict[str, Any],
    output: OutputArgs,
    progress: bool,
) -> None:
    """Heal the smaller model, in place, and add what was done to the facts."""
    from ghosted_fast.improve.healing import heal
    from ghosted_fast.timing.spans import recording, span

    state = heal_state(output.folder)
    with recording() as spans, span("heal"):
        healed = heal(smaller, dense, text, healing, state=state, progress=progress)
    facts["spans"] |= spans.to_dict()
    facts["healing"] = asdict(healed)
    facts["seconds"]["heal"] = healed.seconds


def _memory(
    model: SweptModelArgs, calibration: CalibrationArgs, how_many: HowManyArgs, asked: Asked
) -> Result:
    """Return what a dry run finds out."""
    from ghosted_fast.cli._shared.loading import check_layers
    from ghosted_fast.cli._shared.sweep_args import dry_run
    from ghosted_fast.cli._shared.tables import memory_line
    from ghosted_fast.options import SpeedBound
    from ghosted_fast.pipeline import statistics_bytes_needed

    wanted = how_many.how_many()
    assert not isinstance(wanted, SpeedBound)
    dense, facts, lines = dry_run(model, calibration, asked)
    check_layers(dense, wanted)
    needed = statistics_bytes_needed(dense, wanted, how_many.criterion, asked.options)
    first = memory_line(needed, "all intervals")
    return Result({"statistics_bytes": needed, **facts}, [first, *lines])


def _asked(
    model: SweptModelArgs,
    calibration: CalibrationArgs,
    how_many: HowManyArgs,
    ghosts: GhostArgs,
    recovery: RecoveryArgs,
) -> Asked:
    """Return what is asked for, as the library takes it."""
    from ghosted_fast.options import RunOptions
    from ghosted_fast.swept.asked import Asked

    run = RunOptions(
        beam=how_many.beam,
        corrected_candidates=how_many.corrected_candidates,
        corrections=recovery.corrections,
        heal=recovery.heal_options(calibration.seed),
        device=model.place,
        memory=model.memory,
        state=model.state,
    )
    options = ghosts.options(recovery.sequential)
    return Asked(how_many.how_many(), how_many.criterion, recovery.recovery, options, run)


def _left_in_files(
    model: SweptModelArgs, calibration: FitCalibrationArgs, asked: Asked, output: OutputArgs
) -> tuple[Unloaded, Asked] | None:
    """Return a model that is to be swept through and how, None for one that is to be loaded."""
    from ghosted_fast.cli._shared.sweep_args import swept

    if calibration.calibrate_in is not None:
        return None
    return swept(model, calibration, asked, states(output.folder))


def _fit_swept(
    unloaded: Unloaded,
    asked: Asked,
    calibration: CalibrationArgs,
    evaluation: EvaluationArgs,
    output: OutputArgs,
    recipe: Recipe,
    first: bool,
) -> Result | None:
    """Fit a model that stays in its files, and write what is left of it."""
    from ghosted_fast.checkpoint.model_card import attach_report
    from ghosted_fast.cli._shared.sweep_args import read_text
    from ghosted_fast.swept.run import ghost_unloaded

    if evaluation.evaluation is not None:
        raise usage_error(
            "expected no text to measure on for a model that is swept through layer by layer: "
            "measure the folder with ghosted-fast eval where it fits in memory",
            "--evaluation",
        )
    asked = replace(asked, run=replace(asked.run, progress=first))
    text = read_text(unloaded, calibration, first)
    if first:
        recipe.check_text(text)
    smaller, found = ghost_unloaded(unloaded, text, asked)
    facts = found.to_dict() | {"calibration": calibration.named, "swept": True}
    attach_report(smaller.config, facts)
    kept = recipe.written(text, facts)
    smaller.save(output.folder, overwrite=output.overwrite, progress=first, recipe=kept)
    if not first:
        return None
    facts["output"] = str(output.folder)
    return _reported(facts, _said(facts), output)


def _save(
    smaller: Any,
    facts: dict[str, Any],
    tokenizer: Any,
    output: OutputArgs,
    recipe: dict[str, Any],
) -> None:
    """Write the checkpoint, with what is known of it, and say where it is."""
    from ghosted_fast.checkpoint.model_card import attach_report
    from ghosted_fast.checkpoint.save import save_model

    attach_report(smaller.config, facts)
    save_model(smaller, output.folder, tokenizer, output.overwrite, recipe)
    facts["output"] = str(output.folder)


def _said(facts: dict[str, Any]) -> list[TextTable | str]:
    """Return what was removed and put in."""
    from ghosted_fast.cli._shared.tables import budget_line, ghost_table, improvement_lines
    from ghosted_fast.facts import layers_as_text

    shown: list[TextTable | str] = [
        f"removed {layers_as_text(facts['removed'])}; saved {facts['output']}"
    ]
    if facts.get("calibrated_in"):
        shown.append(f"calibrated in weights quantized by {facts['calibrated_in']}")
    if facts.get("budget"):
        shown.append(budget_line(facts["budget"]))
    if facts.get("ghosts"):
        shown += ["", ghost_table(facts["ghosts"])]
    return shown + improvement_lines(facts)


def _models(dense: Any, smaller: Any, kind: str, facts: dict[str, Any]) -> dict[str, Any]:
    """Return the dense, the pruned and the finished model, by name."""
    from ghosted_fast.surgery.cut import prune_model

    return {"dense": dense, "pruned": prune_model(dense, facts["removed"]), kind: smaller}


def _answer(
    models: dict[str, Any], tokenizer: Any, facts: dict[str, Any], output: OutputArgs
) -> None:
    """Add what the models write to what is reported, if there is a report."""
    from ghosted_fast.measure.answers import write_answers

    if output.report is not None:
        facts["samples"] = write_answers(models, tokenizer)


def _measure(
    models: dict[str, Any], smaller: Any, facts: dict[str, Any], batches: Any, seed: int
) -> TextTable:
    """Measure dense, pruned and finished model, and add what was found to facts and checkpoint."""
    from ghosted_fast.checkpoint.model_card import attach_report
    from ghosted_fast.checkpoint.save import rewrite_facts
    from ghosted_fast.cli._shared.tables import model_table
    from ghosted_fast.measure.models_table import compare_models

    rows = compare_models(models, batches, progress=True, seed=seed)
    facts["models"] = [row.to_dict() for row in rows]
    if attach_report(smaller.config, facts):
        rewrite_facts(smaller.config, facts["output"])
    return model_table(rows)
