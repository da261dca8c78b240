"""The grid: criteria x recoveries x numbers of layers, on one model and the same tokens."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ghosted_fast import distributed
from ghosted_fast.errors import ArgumentError, renamed
from ghosted_fast.grid.cells import Cell, Fitting, Removed, run_cells, stand_in
from ghosted_fast.grid.judge import Judge
from ghosted_fast.grid.outputs import check_outputs, write_outputs
from ghosted_fast.grid.plan import GridPlan, Variant, check_plan, criteria_for, variants_of
from ghosted_fast.grid.state import GridState
from ghosted_fast.grid.table import Grid, grid_of, speed_key
from ghosted_fast.grid.variants import corrected
from ghosted_fast.measure.speed import compare_throughput
from ghosted_fast.measure.system import machine_facts
from ghosted_fast.models.decoder import Decoder, evaluating
from ghosted_fast.options import GhostOptions, RunOptions
from ghosted_fast.recovery import RECOVERIES
from ghosted_fast.selection.select import select_layers
from ghosted_fast.text.batches import Batch, iterate_batches
from ghosted_fast.text.calibration_text import CalibrationText
from ghosted_fast.text.fingerprints import model_digest, text_digest
from ghosted_fast.text.progress import progress_bar

_RUN = "a field of run=RunOptions(...)"
_PLAN = "a field of plan=GridPlan(...)"


@renamed(
    num_layers="remove",
    sequential="a field of options=GhostOptions(...)",
    **dict.fromkeys(("score_tokens", "memory_budget", "progress"), _RUN),
    **dict.fromkeys(("criteria", "recoveries", "name", "speed", "seed", "overwrite"), _PLAN),
    **dict.fromkeys(("accuracy", "accuracy_name"), _PLAN),
)
def run_grid(
    model: Any,
    calibration: Iterable[Any],
    evaluations: Mapping[str, Iterable[Any]],
    remove: Sequence[int],
    output: str | Path,
    *,
    plan: GridPlan | None = None,
    options: GhostOptions | None = None,
    run: RunOptions | None = None,
) -> Grid:
    """Compare ways to choose layers and to recover from their loss, each with each.

    Each criterion is run once for each number of layers. Sets of layers on which criteria agree are
    fitted and judged once, and one pass of the dense model serves all recoveries of several sets.
    Whatever is known is in the output folder at once: a run that was killed goes on where it was,
    and a later one may ask for more criteria, recoveries or numbers of layers.

    Args:
        model: The dense model, a transformers causal language model.
        calibration: Batches of tokens to choose layers and to fit on, see `iterate_batches`.
        evaluations: Batches to measure perplexity on, by the name of the text. The first text
            decides what is best.
        remove: Numbers of layers to remove.
        output: Folder for the state, `results.json`, `results.md` and `index.html`.
        plan: What is compared and measured.
        options: How ghosts are fitted.
        run: Held-out tokens to score on, memory for statistics, and whether to show progress.

    Returns:
        The table, as it was written.

    Raises:
        ArgumentError: A criterion, recovery or number of layers cannot be used, the folder holds
            results of other settings, or this is a process group, in which it cannot run.
        CalibrationError: There is too little text.
        MissingExtraError: The page needs a package of the extra `report`.
    """
    if distributed.count() > 1:
        raise ArgumentError(
            "expected one process, got a process group, whose ranks would write to one folder: "
            "call this on one rank, within ghosted_fast.distributed.ignoring_group()"
        )
    plan, options, run = plan or GridPlan(), options or GhostOptions(), run or RunOptions()
    texts = {text: list(iterate_batches(batches)) for text, batches in evaluations.items()}
    fitting = Fitting(Decoder.of(model), CalibrationText.of(calibration), options, run)
    variants = variants_of(
        (*RECOVERIES, corrected()) if plan.recoveries is None else plan.recoveries
    )
    criteria = plan.criteria
    if criteria is None:
        criteria = criteria_for(fitting.decoder, remove)
    check_plan(fitting.decoder, fitting.text, texts, remove, criteria)
    check_outputs()
    facts = _facts(fitting, texts, plan)
    shape = Shape(tuple(remove), tuple(criteria), variants)
    judge = Judge(model, texts, plan.accuracy, plan.seed)
    with GridState(Path(output), facts, plan.overwrite) as state, evaluating(model):
        if state.get("dense") is None:
            state.put("dense", record=judge(model))
        _select(state, fitting, shape)
        _run(state, fitting, judge, shape)
        if plan.speed is not None:
            _measure(state, fitting, shape, plan.speed)
        about = {
            **facts,
            "family": fitting.decoder.family.name,
            "num_layers": fitting.decoder.num_layers,
            "calibration_tokens": fitting.text.num_tokens,
            "machine": machine_facts(),
        }
        grid = grid_of(state, about, remove, criteria, variants, plan.speed)
        write_outputs(Path(output), grid)
    return grid


@dataclass(frozen=True)
class Shape:
    """The numbers of layers, criteria and variants of a grid."""

    remove: tuple[int, ...]
    criteria: tuple[str, ...]
    variants: Sequence[Variant]


def _facts(
    fitting: Fitting, texts: Mapping[str, Sequence[Batch]], plan: GridPlan
) -> dict[str, Any]:
    """Return what the results hold for."""
    model, again = fitting.decoder.model, fitting.run.corrected_candidates
    return {
        "model": plan.name or fitting.decoder.name,
        "weights": model_digest(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "calibration": fitting.text.digest,
        "evaluations": {text: text_digest(batches) for text, batches in texts.items()},
        "ghosts": asdict(fitting.options),
        "score_tokens": fitting.run.score_tokens,
        "accuracy": plan.accuracy_name if plan.accuracy is not None else None,
        "seed": plan.seed,
        **({"corrected_candidates": again} if again > 1 else {}),
    }


def _select(state: GridState, fitting: Fitting, shape: Shape) -> None:
    """Choose the layers of each criterion and number; one run may settle several numbers."""
    for criterion in shape.criteria:
        for count in sorted(shape.remove, reverse=True):
            if state.get("selection", criterion, count) is not None:
                continue
            began = time.perf_counter()
            selection = select_layers(
                fitting.decoder,
                fitting.text,
                count,
                criterion,
                options=fitting.options,
                run=fitting.run,
                also=shape.remove,
            )
            seconds = time.perf_counter() - began
            settled = {**selection.choices, count: selection.removed}
            for other in sorted(set(shape.remove) & settled.keys()):
                if state.get("selection", criterion, other) is None:
                    # The criteria that choose layer by layer score single layers.
                    lengths = (1, other)
                    scores = [s for s in selection.scores if s.stop - s.start in lengths]
                    record = {
                        "removed": settled[other],
                        "seconds": seconds,
                        "scores": [asdict(score) for score in scores],
                    }
                    state.put("selection", criterion, other, record=record)


def _cells(state: GridState, shape: Shape) -> list[Cell]:
    """Return the cells, each once, those of one set of layers together, the smallest first."""
    chosen_by: dict[Removed, list[str]] = {}
    for count in sorted(shape.remove):
        for criterion in shape.criteria:
            removed = tuple(state.get("selection", criterion, count)["removed"])
            chosen_by.setdefault(removed, []).append(criterion)
    return [
        Cell(removed, variant)
        for removed, choosers in chosen_by.items()
        for variant in shape.variants
        if any(variant.serves(criterion) for criterion in choosers)
    ]


def _run(state: GridState, fitting: Fitting, judge: Judge, shape: Shape) -> None:
    """Fit and judge what is not known yet."""
    cells = [
        cell
        for cell in _cells(state, shape)
        if state.get("cell", cell.removed, cell.variant.name) is None
    ]
    with progress_bar("cells", fitting.run.progress and bool(cells), of=len(cells)) as bar:

        def done(cell: Cell, record: dict[str, Any]) -> None:
            state.put("cell", cell.removed, cell.variant.name, record=record)
            bar.update()

        run_cells(fitting, cells, judge, done)


def _measure(state: GridState, fitting: Fitting, shape: Shape, speed: Mapping[str, Any]) -> None:
    """Measure the speed of each shape of model that is not known yet, beside the dense one."""
    stand_ins: dict[str, tuple[tuple[Any, ...], Any]] = {}
    for cell in _cells(state, shape):
        record = state.get("cell", cell.removed, cell.variant.name)
        if "refused" in record:
            continue
        key = speed_key(record, speed)
        if state.get(*key) is None and str(key) not in stand_ins:
            stand_ins[str(key)] = key, stand_in(fitting.decoder, cell.removed, record["operators"])
    if not stand_ins:
        return
    models = {
        "dense": fitting.decoder.model,
        **{label: built for label, (_, built) in stand_ins.items()},
    }
    # What is put here stays: Ctrl-C leaves nothing half known.
    found = compare_throughput(models, **speed, progress=fitting.run.progress, interruptible=False)
    for label, (key, _) in stand_ins.items():
        state.put(*key, record={"model": found[label].to_dict()})
