"""The one way through: choose layers, gather statistics, solve, cut, and report."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from ghosted_fast import distributed
from ghosted_fast.checkpoint.model_card import attach_report
from ghosted_fast.errors import ArgumentError
from ghosted_fast.facts import Budget
from ghosted_fast.fit.collect import collect_statistics
from ghosted_fast.fit.ghosts import FittedGhost, fit_ghosts, fit_in_sequence
from ghosted_fast.improve.correction import Corrections, check_corrections, correct_ghosts
from ghosted_fast.improve.refinement import refine_ghosts
from ghosted_fast.models.families import find_family, hidden_size
from ghosted_fast.models.families import num_layers as layer_count
from ghosted_fast.options import FirstState, GhostOptions, Input, TokenWeight
from ghosted_fast.recovery import check_recovery
from ghosted_fast.recovery.patches import fit_patches, put_patches
from ghosted_fast.reports.ghost_report import GhostFacts, GhostReport
from ghosted_fast.selection.how_many import decode_speedup, fewest_layers_for, most_layers_within
from ghosted_fast.selection.select import (
    DEFAULT_BEAM,
    DEFAULT_SCORE_TOKENS,
    Selection,
    candidate_intervals,
    check_layer_count,
    default_memory_budget,
    passes_within,
    select_layers,
)
from ghosted_fast.statistics.interval import interval_bytes
from ghosted_fast.statistics.solve import GhostSolution
from ghosted_fast.surgery.cut import remove_layers, removed_intervals, share_copy
from ghosted_fast.text.batches import iterate_batches

_LOGGER = logging.getLogger(__name__)


@distributed.together()
def ghost_model(
    model: nn.Module,
    batches: Iterable[Any],
    num_layers: int | None = None,
    *,
    removed: Sequence[int] | None = None,
    max_perplexity_increase: float | None = None,
    min_decode_speedup: float | None = None,
    criterion: str = "ghost",
    recovery: str = "ghost",
    input: Input = "normed",
    token_weight: TokenWeight = "capped",
    first_state: FirstState = "auto",
    bias: bool = False,
    damping: float | Literal["auto"] = "auto",
    sequential: bool = True,
    corrections: Corrections = "auto",
    refine: int = 0,
    refine_state: str | Path | None = None,
    score_tokens: int = DEFAULT_SCORE_TOKENS,
    memory_budget: int | None = None,
    beam: int = DEFAULT_BEAM,
    inplace: bool = False,
    progress: bool = False,
) -> tuple[Any, GhostReport]:
    """Remove layers from a model and put a ghost in the place of each removed run.

    In a process group of torch.distributed the ranks share the text: every rank calls this with the
    same model, arguments and whole text, and all get the same ghosts, to the bit.

    Args:
        model: A transformers causal language model of a known family.
        batches: Calibration tokens: dicts of `input_ids` [batch, length] and `attention_mask`, or
            token tensors. Read once where `removed` is given, nothing is corrected or refined and
            there are no other ranks, else held in memory as token ids.
        num_layers: How many layers to remove; the criterion chooses them. Give this, `removed` or
            one of the two bounds.
        removed: The layers to remove.
        max_perplexity_increase: Remove as many layers as can go while the perplexity on held-out
            calibration tokens stays within this share above the dense model's (0.1 for 10%),
            before any corrections, which lower it further. For the recovery "ghost", as the next.
        min_decode_speedup: Remove as few layers as make decoding this many times as fast as the
            dense model's, measured here.
        criterion: "ghost", "ghost-search", "streamline", "shortgpt", "sleb", "taylor" or "angular";
            see `select_layers`.
        recovery: What takes the place of each removed run: "ghost" or a published rival: "none",
            "linearpatch-d", "linearpatch-r", "replaceme", "ghost-paper"; see
            `ghosted_fast.recovery`. The options of ghosts below do not concern the rivals.
        input: "normed" for y = x + M (x / rms(x)), "hidden" for y = x + M x.
        token_weight: "inverse_energy", "capped" or "uniform"; see `token_weights`.
        first_state: "auto", "on" or "off": a constant state for the first attended token.
        bias: Whether ghosts have an additive bias.
        damping: Absolute damping, or "auto".
        sequential: Whether, with several gaps, each ghost is fitted on the states that the ghosts
            below it give, by one pass for each gap; see `fit_in_sequence`. Otherwise all are fitted
            on the dense model's states.
        corrections: How many steps the ghosts take towards the dense model's predictions, an int or
            "auto"; see `correct_ghosts`.
        refine: Steps of training on the ghosts alone, after the corrections; see `refine_ghosts`.
        refine_state: File that the refinement is kept in, so that it can go on after it was killed.
        score_tokens: As in `select_layers`.
        memory_budget: Bytes for statistics, see `select_layers`.
        beam: Sets that race in the criterion "ghost-search".
        inplace: Whether to cut the given model. Default: a new one that shares its weights.
        progress: Whether to show progress bars on stderr.

    Returns:
        The smaller model, in the dtype and on the device of the given one, and a report.

    Raises:
        ArgumentError: An option has no such value, or the layers cannot be removed.
        CalibrationError: There is too little text, or too little memory for the statistics.
        NonFiniteError: An activation is NaN or infinite; the message names boundary and batch.
        BudgetError: The bound cannot be kept; the message holds the best that was reached.
        UnknownFamilyError: The model's layers cannot be found.
        RankError: Another rank failed, or is gone.

    Source: Yun et al., arXiv 2605.15491; selection, weights, normed input and first state are ours.
    """
    options = GhostOptions(input, token_weight, first_state, bias, damping)
    check_recovery(recovery)
    check_corrections(corrections)
    if recovery != "ghost" and (refine or corrections not in ("auto", 0)):
        raise ArgumentError(
            f"expected no corrections and no refinement with recovery {recovery!r}: use "
            "refine_ghosts(smaller, model, batches) on what it gives"
        )
    asked = {
        "num_layers": num_layers,
        "removed": removed,
        "max_perplexity_increase": max_perplexity_increase,
        "min_decode_speedup": min_decode_speedup,
    }
    names = [name for name, value in asked.items() if value is not None]
    if len(names) != 1:
        raise ArgumentError(
            f"expected exactly one of {', '.join(asked)}, got {' and '.join(names) or 'none'}"
        )
    if recovery != "ghost" and names[0] in ("max_perplexity_increase", "min_decode_speedup"):
        raise ArgumentError(
            f"expected num_layers or removed with recovery {recovery!r}: {names[0]} is found with "
            "ghosts in place"
        )
    distributed.check_same(
        {
            **asked,
            "removed": None if removed is None else list(removed),
            "criterion": criterion,
            "recovery": recovery,
            "options": options,
            "sequential": sequential,
            "corrections": corrections,
            "refine": refine,
            "score_tokens": score_tokens,
            "memory_budget": memory_budget,
            "beam": beam,
        },
        model,
    )
    batches = distributed.whole_text(batches)
    improved = recovery == "ghost" and bool(corrections or refine)
    if removed is None or improved or recovery != "ghost":
        batches = list(iterate_batches(batches))
    dense = share_copy(model) if inplace and min_decode_speedup is not None else model
    seconds = dict.fromkeys(("select", "calibrate", "solve", "correct", "refine"), 0.0)
    selection, budget = Selection(sorted(removed or ()), [], criterion), None
    if removed is None:
        with _timed(seconds, "select"):
            selection, budget = _choose(
                model,
                batches,
                asked,
                criterion,
                options=options,
                score_tokens=score_tokens,
                memory_budget=memory_budget,
                beam=beam,
                progress=progress,
            )
    intervals = removed_intervals(selection.removed, layer_count(model))
    report = GhostReport(
        model=str(getattr(model.config, "_name_or_path", "") or type(model).__name__),
        family=find_family(model).name,
        num_layers=layer_count(model),
        removed=selection.removed,
        criterion=criterion if removed is None else None,
        recovery=recovery,
        scores=selection.scores,
        seconds=seconds,
    )
    if recovery == "ghost":
        fits = _fit(
            model, batches, intervals, options, selection, sequential, memory_budget, seconds,
            progress,
        )  # fmt: skip
        parameter = next(model.parameters())
        ghosts = [fitted.to_module(parameter.dtype, parameter.device) for fitted, _ in fits]
        facts = [
            _facts(interval, options, fitted.has_first_state, solution)
            for interval, (fitted, solution) in zip(intervals, fits, strict=True)
        ]
        report = replace(report, ghosts=facts, num_tokens=max(item.num_tokens for item in facts))
        if improved:
            trial = remove_layers(model, selection.removed, ghosts)
            with _timed(seconds, "correct"):
                corrected = correct_ghosts(trial, model, batches, corrections, progress=progress)
            report = replace(report, corrections=corrected)
            if refine:
                refined = refine_ghosts(
                    trial, model, batches, refine, state=refine_state, progress=progress
                )
                seconds["refine"] = refined.seconds
                report = replace(report, refinement=refined)
        smaller = remove_layers(model, selection.removed, ghosts, inplace=inplace)
    else:
        jobs = [(recovery, interval) for interval in intervals]
        with _timed(seconds, "calibrate"):
            patches = fit_patches(model, batches, jobs, options, memory_budget, progress)
        report = replace(report, num_tokens=sum(batch.num_tokens for batch in batches))
        smaller = put_patches(model, selection.removed, [patches[job] for job in jobs], inplace)
    if budget is not None and min_decode_speedup is not None:
        budget = _measured(budget, dense, smaller)
    report = distributed.from_first(replace(report, budget=budget))
    attach_report(smaller.config, report.to_dict())
    return smaller, report


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the wall-clock time of what is done to an entry."""
    began = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] += time.perf_counter() - began


def _choose(
    model: Any, batches: Iterable[Any], asked: dict[str, Any], criterion: str, **settings: Any
) -> tuple[Selection, Budget | None]:
    """Choose the layers, and their number where a bound was asked for."""
    if asked["max_perplexity_increase"] is not None:
        return most_layers_within(
            model, batches, asked["max_perplexity_increase"], criterion, **settings
        )
    count, budget = asked["num_layers"], None
    if asked["min_decode_speedup"] is not None:
        budget = fewest_layers_for(model, asked["min_decode_speedup"])
        count = budget.num_layers
    return select_layers(model, batches, count, criterion, **settings), budget


def _fit(
    model: Any,
    batches: Iterable[Any],
    intervals: Sequence[tuple[int, int]],
    options: GhostOptions,
    selection: Selection,
    sequential: bool,
    memory_budget: int | None,
    seconds: dict[str, float],
    progress: bool,
) -> list[tuple[FittedGhost, GhostSolution]]:
    """Fit the ghost of each gap, from the statistics of the selection where it has them."""
    available = memory_budget or default_memory_budget(next(model.parameters()).device)
    groups = passes_within(intervals, hidden_size(model), options, available)
    if sequential and len(intervals) > 1:
        with _timed(seconds, "calibrate"):
            return fit_in_sequence(
                model, list(iterate_batches(batches)), intervals, options, progress
            )
    if len(groups) > 1:
        batches = list(iterate_batches(batches))
    fits: list[tuple[FittedGhost, GhostSolution]] = []
    for group in groups:
        with _timed(seconds, "calibrate"):
            if selection.statistics is not None:
                statistics = [selection.statistics]
            else:
                statistics = collect_statistics(model, batches, group, options, progress)
        with _timed(seconds, "solve"):
            fits += fit_ghosts(statistics, options)
    return fits


def _measured(budget: Budget, dense: Any, smaller: Any) -> Budget:
    """Return a bound on speed with what the finished model gives, and warn if that is less."""
    reached = decode_speedup(dense, smaller)
    if reached < budget.asked:
        _LOGGER.warning(
            "decoding is %.2f times as fast as the dense model's, less than the %g asked for: "
            "measured again with the chosen layers and their ghosts",
            reached,
            budget.asked,
        )
    return replace(budget, reached=reached)


def _facts(
    interval: tuple[int, int], options: GhostOptions, first_state: bool, solution: GhostSolution
) -> GhostFacts:
    return GhostFacts(
        start=interval[0],
        stop=interval[1],
        input=options.input,
        bias=options.bias,
        first_state=first_state,
        fit_error=solution.fit_error,
        held_out_error=solution.held_out_error,
        condition=solution.condition,
        damping=solution.damping,
        num_tokens=solution.num_tokens,
    )


def statistics_bytes_needed(
    model: nn.Module,
    num_layers: int | None = None,
    removed: Sequence[int] | None = None,
    criterion: str = "ghost",
    options: GhostOptions | None = None,
) -> int:
    """Return the bytes of statistics that `ghost_model` would hold at once, in a single pass.

    Args:
        model: The dense model.
        num_layers: As in `ghost_model`.
        removed: As in `ghost_model`.
        criterion: As in `ghost_model`.
        options: How the ghosts would be fitted.
    """
    layers = layer_count(model)
    if removed is not None:
        count = len(removed_intervals(removed, layers))
    else:
        assert num_layers is not None
        check_layer_count(num_layers, layers)
        count = len(candidate_intervals(num_layers, layers)) if criterion == "ghost" else 1
        if criterion == "ghost-search":
            count = sum(len(candidate_intervals(n, layers)) for n in range(1, num_layers + 1))
        if criterion in ("shortgpt", "sleb", "taylor"):
            count = num_layers
    return count * interval_bytes(hidden_size(model), options or GhostOptions())
