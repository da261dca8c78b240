"""The grid: criteria x recoveries x numbers of layers, on one model and the same tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ghosted_fast import distributed
from ghosted_fast.errors import ArgumentError
from ghosted_fast.fit.candidates import DEFAULT_SCORE_TOKENS
from ghosted_fast.grid.cells import Cell, Fitting, Removed, run_cells, stand_in
from ghosted_fast.grid.judging import Judge
from ghosted_fast.grid.outputs import check_outputs, write_outputs
from ghosted_fast.grid.plan import Variant, check_plan, variants_of
from ghosted_fast.grid.state import GridState
from ghosted_fast.grid.table import Grid, grid_of, speed_key
from ghosted_fast.grid.variants import corrected
from ghosted_fast.measure.speed import compare_throughput
from ghosted_fast.measure.system import machine_facts
from ghosted_fast.models.families import find_family
from ghosted_fast.models.families import num_layers as layer_count
from ghosted_fast.options import GhostOptions
from ghosted_fast.recovery import RECOVERIES
from ghosted_fast.selection.criteria import CRITERIA
from ghosted_fast.selection.select import select_layers
from ghosted_fast.text.batches import iterate_batches
from ghosted_fast.text.fingerprints import model_digest, text_digest


def compare_grid(
    model: Any,
    calibration: Iterable[Any],
    evaluations: Mapping[str, Iterable[Any]],
    num_layers: Sequence[int],
    output: str | Path,
    *,
    criteria: Sequence[str] = tuple(CRITERIA),
    recoveries: Sequence[str | Variant] = (*RECOVERIES, corrected()),
    name: str | None = None,
    options: GhostOptions | None = None,
    sequential: bool = True,
    score_tokens: int = DEFAULT_SCORE_TOKENS,
    speed: Mapping[str, int] | None = None,
    accuracy: Callable[[Any], dict[str, float]] | None = None,
    accuracy_name: str = "",
    memory_budget: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = False,
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
        num_layers: Numbers of layers to remove.
        output: Folder for the state, `results.json`, `results.md` and `index.html`.
        criteria: Names out of `CRITERIA`.
        recoveries: Names out of `RECOVERIES`, or variants of them (`corrected`, `refined`). By
            default all, and the ghost with corrections, which is the library's default.
        name: What the model is called; by default what its configuration says.
        options: How ghosts are fitted.
        sequential: As in `ghost_model`.
        score_tokens: As in `select_layers`.
        speed: Arguments of `compare_throughput`, for example `{"repeats": 3}`, to measure speed,
            once for each shape of model; None leaves it out.
        accuracy: A function of a model that returns its accuracy by task, in 0..1; None leaves
            the columns out.
        accuracy_name: What it measures; results of another are not taken for these.
        memory_budget: Bytes for statistics; default: half of the free memory.
        seed: Of the bootstrap.
        overwrite: Whether results of other settings in the folder may be replaced.
        progress: Whether to show progress bars on stderr.

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
            "call this on one rank, within ghosted_fast.distributed.alone()"
        )
    options = options or GhostOptions()
    texts = {text: list(iterate_batches(batches)) for text, batches in evaluations.items()}
    fitting = Fitting(
        list(iterate_batches(calibration)), options, sequential, memory_budget, progress
    )
    variants = variants_of(recoveries)
    check_plan(model, fitting.calibration, texts, num_layers, criteria)
    check_outputs()
    name = name or str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    facts = {
        "model": name,
        "weights": model_digest(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "calibration": text_digest(fitting.calibration),
        "evaluations": {text: text_digest(batches) for text, batches in texts.items()},
        "ghosts": {**asdict(options), "sequential": sequential},
        "score_tokens": score_tokens,
        "accuracy": accuracy_name if accuracy is not None else None,
        "seed": seed,
    }
    judge = Judge(model, texts, accuracy, seed)
    with GridState(Path(output), facts, overwrite) as state, _evaluating(model):
        if state.get("dense") is None:
            state.put("dense", record=judge(model))
        _select(state, model, fitting, num_layers, criteria, score_tokens)
        _run(state, model, fitting, judge, num_layers, criteria, variants)
        if speed is not None:
            _measure(state, model, num_layers, criteria, variants, speed)
        about = {
            **facts,
            "family": find_family(model).name,
            "num_layers": layer_count(model),
            "calibration_tokens": sum(batch.num_tokens for batch in fitting.calibration),
            "machine": machine_facts(),
        }
        grid = grid_of(state, about, num_layers, criteria, variants, speed)
        write_outputs(Path(output), grid)
    return grid


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _select(
    state: GridState,
    model: Any,
    fitting: Fitting,
    num_layers: Sequence[int],
    criteria: Sequence[str],
    score_tokens: int,
) -> None:
    """Choose the layers of each criterion and number; one run may settle several numbers."""
    for criterion in criteria:
        for count in sorted(num_layers, reverse=True):
            if state.get("selection", criterion, count) is not None:
                continue
            began = time.perf_counter()
            selection = select_layers(
                model,
                fitting.calibration,
                count,
                criterion,
                options=fitting.options,
                score_tokens=score_tokens,
                memory_budget=fitting.memory_budget,
                also=num_layers,
                progress=fitting.progress,
            )
            seconds = time.perf_counter() - began
            settled = {**selection.choices, count: selection.removed}
            for other in sorted(set(num_layers) & settled.keys()):
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


def _cells(
    state: GridState,
    num_layers: Sequence[int],
    criteria: Sequence[str],
    variants: Sequence[Variant],
) -> list[Cell]:
    """Return the cells, each once, those of one set of layers together, the smallest first."""
    chosen_by: dict[Removed, list[str]] = {}
    for count in sorted(num_layers):
        for criterion in criteria:
            removed = tuple(state.get("selection", criterion, count)["removed"])
            chosen_by.setdefault(removed, []).append(criterion)
    return [
        Cell(removed, variant)
        for removed, choosers in chosen_by.items()
        for variant in variants
        if any(variant.serves(criterion) for criterion in choosers)
    ]


def _run(
    state: GridState,
    model: Any,
    fitting: Fitting,
    judge: Judge,
    num_layers: Sequence[int],
    criteria: Sequence[str],
    variants: Sequence[Variant],
) -> None:
    """Fit and judge what is not known yet."""
    cells = [
        cell
        for cell in _cells(state, num_layers, criteria, variants)
        if state.get("cell", cell.removed, cell.variant.name) is None
    ]
    with tqdm(total=len(cells), desc="cells", disable=not (fitting.progress and cells)) as bar:

        def done(cell: Cell, record: dict[str, Any]) -> None:
            state.put("cell", cell.removed, cell.variant.name, record=record)
            bar.update()

        run_cells(model, cells, fitting, judge, done)


def _measure(
    state: GridState,
    model: Any,
    num_layers: Sequence[int],
    criteria: Sequence[str],
    variants: Sequence[Variant],
    speed: Mapping[str, int],
) -> None:
    """Measure the speed of each shape of model that is not known yet, beside the dense one."""
    stand_ins: dict[str, tuple[tuple[Any, ...], Any]] = {}
    for cell in _cells(state, num_layers, criteria, variants):
        record = state.get("cell", cell.removed, cell.variant.name)
        if "refused" in record:
            continue
        key = speed_key(record, speed)
        if state.get(*key) is None and str(key) not in stand_ins:
            stand_ins[str(key)] = key, stand_in(model, cell.removed, record["operators"])
    if not stand_ins:
        return
    models = {"dense": model, **{label: built for label, (_, built) in stand_ins.items()}}
    found = compare_throughput(models, **speed)
    dense = found["dense"].to_dict()
    for label, (key, _) in stand_ins.items():
        state.put(*key, record={"model": found[label].to_dict(), "dense": dense})
