"""What is lost with layers removed, and what each way to make up for it brings back.

Two models, SmolLM2-135M-Instruct and Gemma 3 270M in bf16, calibrated on web text and judged on
passages of Wikipedia and of stories. For each: the grid of every criterion with every published
recovery and with ours; gaps that hold the layer in which massive activations arise; few
calibration tokens, and text that the model wrote itself. All is fetched; results are kept in
the output folder, and a run that was stopped goes on. That takes hours on two cores.

The tables are `summary.md` in the output folder.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ghosted_fast._atomic_files import write_atomically
from ghosted_fast.assets.downloads import fetch_demo_assets, fetch_gemma3, fetch_stories
from ghosted_fast.facts import layers_as_text
from ghosted_fast.grid import Grid, GridPlan, corrected, healed, run_grid
from ghosted_fast.grid.state import GridState
from ghosted_fast.grid.summary import summaries
from ghosted_fast.grid.table import BEST_PUBLISHED, marked
from ghosted_fast.grid.variants import WITH_OPERATOR
from ghosted_fast.measure.perplexity import perplexity
from ghosted_fast.models.loading import load_model
from ghosted_fast.options import Corrections, RunOptions
from ghosted_fast.pipeline import ghost_model
from ghosted_fast.recovery import RECOVERIES
from ghosted_fast.surgery.cut import prune_model
from ghosted_fast.text.batches import Batch, iterate_batches
from ghosted_fast.text.fingerprints import model_digest, text_digest
from ghosted_fast.text.generation import generate_texts
from ghosted_fast.text.loading import load_texts, token_batches

CALIBRATION_TOKENS, FEW_TOKENS, MANY_TOKENS = 49152, 8192, 131072
# Of the calibration text; the rest is what healed models are judged on.
HEALED_TOKENS = 40960
# What takes minutes per cell is done for our own choice of layers alone.
OURS = replace(corrected(), criteria=("ghost",))
HEALED = [
    replace(healed(HEALED_TOKENS, name), criteria=("ghost",))
    for name in ("ghost", "ghost-paper", "none")
]
# What others put in, with the corrections that ours has.
RIVALS = [
    replace(corrected(recovery=name), criteria=("ghost",))
    for name in WITH_OPERATOR
    if name != "ghost"
]
CRITERIA = ("ghost", "streamline", "shortgpt", "sleb", "taylor", "angular")
EVALUATION_TOKENS = 5120
LENGTH, BATCH = 512, 8
Texts = dict[str, list[Batch]]


@dataclass(frozen=True)
class Study:
    """What is done with one model.

    Attributes:
        name: What tables call it.
        folder: Name of its folder of results.
        fetch: Returns the file of its weights.
        counts: Numbers of layers to remove.
        healed: The numbers for which models are healed too.
        massive_gaps: Gaps that hold the layer where massive activations arise.
        robust: The number of layers for the comparison of calibration texts.
    """

    name: str
    folder: str
    fetch: Callable[[], Path]
    counts: tuple[int, ...]
    healed: tuple[int, ...]
    massive_gaps: tuple[tuple[int, int], ...]
    robust: int


STUDIES = (
    Study(
        "SmolLM2-135M-Instruct",
        "smollm2",
        lambda: fetch_demo_assets().model,
        counts=(3, 5, 7, 9),
        healed=(5, 7),
        massive_gaps=((11, 16), (11, 18), (9, 16)),
        robust=5,
    ),
    Study("Gemma 3 270M", "gemma3", fetch_gemma3, (2, 4, 6), (), (), 4),
)


def _batches(tokenizer: Any, path: Path, tokens: int) -> list[Batch]:
    texts = load_texts(str(path))
    return list(iterate_batches(token_batches(tokenizer, texts, tokens, LENGTH, BATCH)))


def _grids(
    study: Study, model: Any, calibration: list[Batch], texts: Texts, output: Path
) -> Callable[..., Grid]:
    """Return what runs a part of the model's grid, or finds it done: all parts in one folder."""

    def run_part(counts: Sequence[int], **plan: Any) -> Grid:
        return run_grid(
            model,
            calibration,
            texts,
            counts,
            output / study.folder,
            plan=GridPlan(name=study.name, **plan),
            run=RunOptions(progress=True),
        )

    return run_part


def _more(
    study: Study, model: Any, tokenizer: Any, calibration: list[Batch], texts: Texts, grid: Grid,
    state: GridState,
) -> dict[str, Any]:  # fmt: skip
    """Return the perplexities of what is no cell of the grid, by what it is."""
    web = fetch_demo_assets().calibration

    def judged(*key: Any, fit: Callable[[], Any]) -> dict[str, float]:
        known = state.get(*key)
        if known is None:
            began = time.perf_counter()
            smaller = fit()
            seconds = time.perf_counter() - began
            found = {name: perplexity(smaller, batches).value for name, batches in texts.items()}
            known = state.put(*key, record={**found, "seconds": seconds})
        return dict(known)

    def ghosted(
        batches: list[Batch],
        removed: Sequence[int],
        recovery: str = "ghost",
        corrections: Corrections = 0,
    ) -> Any:
        run = RunOptions(corrections=corrections if recovery == "ghost" else 0)
        return ghost_model(model, batches, removed=removed, recovery=recovery, run=run)[0]

    found: dict[str, Any] = {"massive": {}, "calibration": {}}
    for start, stop in study.massive_gaps:
        removed = range(start, stop)
        rows = {"none": judged("none", start, stop, fit=partial(prune_model, model, removed))}
        for recovery in ("ghost-paper", "ghost"):
            fit = partial(ghosted, calibration, removed, recovery)
            rows[recovery] = judged(recovery, start, stop, fit=fit)
        fit = partial(ghosted, calibration, removed, "ghost", "auto")
        rows[OURS.name] = judged(OURS.name, start, stop, fit=fit)
        found["massive"][layers_as_text(range(start, stop))] = rows
    (chosen,) = [
        item["removed"]
        for item in grid.selections
        if (item["criterion"], item["remove"]) == ("ghost", study.robust)
    ]
    for tokens in (FEW_TOKENS, CALIBRATION_TOKENS, MANY_TOKENS):
        fit = partial(ghosted, _batches(tokenizer, web, tokens), chosen)
        found["calibration"][f"web text, {tokens} tokens"] = judged("web", tokens, fit=fit)

    def on_own_text() -> Any:
        own = generate_texts(model, tokenizer, CALIBRATION_TOKENS, progress=True, chat=False)
        batches = token_batches(tokenizer, own, CALIBRATION_TOKENS, LENGTH, BATCH)
        return ghosted(list(iterate_batches(batches)), chosen)

    name = f"the model's own text, {CALIBRATION_TOKENS} tokens"
    found["calibration"][name] = judged("self", fit=on_own_text)
    return found


def _table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [columns, ["---"] * len(columns), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _ratios(row: dict[str, Any], dense: dict[str, Any]) -> str:
    """Return the perplexity of each text relative to the dense model's."""
    if row["refused"]:
        return "-"
    values = row["perplexity"]
    return " / ".join(f"{values[text]['value'] / dense[text]['value']:.2f}" for text in dense)


def _grids_summary(named: Sequence[tuple[Study, Grid]]) -> str:
    """Return a row for each model and number of layers: the best published rows, and ours."""
    lines = []
    for study, grid in named:
        dense = grid.dense["perplexity"]
        best = marked(grid.rows, BEST_PUBLISHED)
        for count in study.counts:
            rows = {
                (row["criterion"], row["recovery"]): row
                for row in grid.rows
                if row["remove"] == count
            }
            shown = [
                rows[pair]
                for pair in (
                    ("streamline", "none"),
                    ("streamline", "ghost-paper"),
                    (best[count]["criterion"], best[count]["recovery"]),
                    ("ghost", "ghost"),
                    ("ghost", OURS.name),
                )
            ]
            values = [_ratios(row, dense) for row in shown]
            values[2] += f" ({best[count]['criterion']} + {best[count]['recovery']})"
            values[4] = f"**{values[4]}** ({shown[4]['corrections']})"
            removed = f"{count} of {grid.dense['layers']}"
            lines.append([study.name, removed, *values, layers_as_text(shown[4]["removed"])])
    columns = [
        "model",
        "removed",
        "streamline, nothing in their place",
        "streamline + the published ghost",
        "best published",
        "ours, no corrections",
        "ours (corrections)",
        "our layers",
    ]
    texts = " / ".join(named[0][1].texts)
    heads = "; ".join(
        f"{study.name} "
        + " / ".join(f"{value['value']:.2f}" for value in grid.dense["perplexity"].values())
        for study, grid in named
    )
    return f"Perplexity relative to the dense model, {texts}. Dense: {heads}.\n\n" + _table(
        columns, lines
    )


def _lead(grids: Sequence[Grid]) -> str:
    """Return the geometric-mean excess of ours over all cells, relative to the rivals'."""
    lines = []
    for recovery in ("ghost", OURS.name):
        best: list[float] = []
        paper: list[float] = []
        for grid in grids:
            (own,) = [
                item
                for item in summaries(grid)
                if (item.criterion, item.recovery) == ("ghost", recovery)
            ]
            cells = len(grid.texts) * len({row["remove"] for row in grid.rows})
            for value, logs in ((own.to_best_published, best), (own.to_paper, paper)):
                logs += [math.log(value) if value else math.nan] * cells
        means = [f"{math.exp(sum(logs) / len(logs)):.2f}" for logs in (best, paper)]
        lines.append([recovery, *means])
    columns = ["ours", "to the best published, cell by cell", "to streamline + ghost-paper"]
    return _table(columns, lines)


def _variants_summary(grid: Grid, names: Sequence[str]) -> str:
    """Return the rows of some recoveries, each with its corrections, in our choice of layers."""
    lines = []
    for row in grid.rows:
        if row["criterion"] == "ghost" and row["recovery"] in names and not row["refused"]:
            values = [f"{1 + row['excess'][text]:.3f}x" for text in grid.texts]
            seconds = f"{row['seconds']['recover']:.0f}"
            cost = [seconds, f"{row['peak_memory'] / 1e9:.1f} GB"]
            what = [str(row["remove"]), row["recovery"], str(row["corrections"])]
            lines.append([*what, *values, *cost])
    columns = ["removed", "recovery", "corrections", *grid.texts, "seconds", "peak memory"]
    return _table(columns, lines)


def _more_summary(found: dict[str, Any], grid: Grid) -> str:
    dense = {text: grid.dense["perplexity"][text]["value"] for text in grid.texts}
    parts = []
    if found["massive"]:
        lines = []
        for gap, rows in found["massive"].items():
            for name, row in rows.items():
                values = [f"{row[text]:.2f} ({row[text] / dense[text]:.2f}x)" for text in dense]
                paper = rows["ghost-paper"]
                shares = [(row[text] - dense[text]) / (paper[text] - dense[text]) for text in dense]
                lines.append([gap, name, *values, " / ".join(f"{share:.3f}" for share in shares)])
        columns = ["gap", "recovery", *dense, "excess relative to ghost-paper's"]
        parts.append(_table(columns, lines))
    lines = [
        [name, *(f"{row[text]:.2f}" for text in dense)]
        for name, row in found["calibration"].items()
    ]
    parts.append(_table(["calibration", *dense], lines))
    return "\n".join(parts)


def main() -> None:
    """Run the studies and write the summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("recovery"), help="folder of results")
    parser.add_argument(
        "--model", choices=[study.folder for study in STUDIES], nargs="*", help="only these models"
    )
    parser.add_argument("--no-healing", action="store_true", help="leave out the healed rows")
    parser.add_argument(
        "--correct-rivals",
        action="store_true",
        help="also give what others put into our gaps the corrections that our ghosts have",
    )
    arguments = parser.parse_args()
    output, assets = arguments.output, fetch_demo_assets()
    rivals = RIVALS if arguments.correct_rivals else []
    compared = [*RECOVERIES, OURS, *rivals]
    files = {"Wikipedia": assets.evaluation, "stories": fetch_stories()}
    sections: list[str] = []
    grids: list[tuple[Study, Grid]] = []
    for study in STUDIES:
        if arguments.model and study.folder not in arguments.model:
            continue
        model, tokenizer = load_model(str(study.fetch()), dtype="bfloat16")
        texts = {name: _batches(tokenizer, path, EVALUATION_TOKENS) for name, path in files.items()}
        calibration = _batches(tokenizer, assets.calibration, CALIBRATION_TOKENS)
        run = _grids(study, model, calibration, texts, output)
        grid = run(study.counts, criteria=CRITERIA, recoveries=compared)
        grids.append((study, grid))
        facts = {
            "model": model_digest(model),
            "texts": {name: text_digest(batches) for name, batches in texts.items()},
        }
        with GridState(output / study.folder / "more", facts) as state:
            found = _more(study, model, tokenizer, calibration, texts, grid, state)
        parts = [f"## {study.name}: other gaps and texts\n", _more_summary(found, grid)]
        if rivals:
            names = [OURS.name, *(name for item in rivals for name in (item.recovery, item.name))]
            parts.append(_variants_summary(grid, names))
        if study.healed and not arguments.no_healing:
            recoveries = [*compared, *HEALED]
            healed_grid = run(study.healed, criteria=("ghost",), recoveries=recoveries)
            names = ["ghost", OURS.name, *(variant.name for variant in HEALED)]
            parts.append(_variants_summary(healed_grid, names))
            run(study.counts, criteria=CRITERIA, recoveries=compared)  # the page
        sections.append("\n".join(parts))
    lead = ["## Excess perplexity of ours, geometric mean\n", _lead([grid for _, grid in grids])]
    summary = "\n".join([_grids_summary(grids), *lead, *sections])
    write_atomically(output / "summary.md", summary)
    print(summary)  # noqa: T201
    pages = [str(output / study.folder / "index.html") for study, _ in grids]
    print(f"Pages: {', '.join(pages)}")  # noqa: T201


if __name__ == "__main__":
    main()
