"""Try cuts on tiny random models of every class of transformers, and say what works.

    PYTHONPATH=tests python -m families.sweep --kind causal --output build/families

Each model is cut at its first layer, in the middle, at its last layer and in two places. What must
come out is computed from the dense model with hooks that pass layers by and put the ghosts'
formula in.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers

from families.causal_tables import UNTESTABLE as UNTESTABLE_CAUSAL
from families.measures import (
    cached_apart,
    distance,
    generated_apart,
    ghosts_for,
    logits,
    padded_apart,
    passed_by,
    tokens,
)
from families.outcomes import CUTS, DENSE, FAIL, FAILS, KINDS, OK, REFUSED, Outcome, summary
from families.tiny_models import VARIANTS, causal_types, tiny_causal
from families.tiny_wrappers import tiny_wrapper, wrapper_types
from families.wrapper_tables import UNTESTABLE as UNTESTABLE_WRAPPERS
from ghosted_fast.checkpoint.save import save_model
from ghosted_fast.errors import GhostedFastError
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.options import RunOptions
from ghosted_fast.pipeline import ghost_model
from ghosted_fast.surgery.cut import prune_model, remove_layers, removed_intervals
from ghosted_fast.surgery.removable import check_removable

COLUMNS = ("prune", "ghost", "cache", "padded", "reload", "remote", "select")
SECONDS = 240
_REMOTE = Path(__file__).with_name("load_remote.py")


def layers_of(cut: str, count: int) -> list[int]:
    """Return the layers that a cut takes out of a model."""
    middle = count // 2 - 1
    return {
        "first": [0],
        "middle": [middle, middle + 1],
        "last": [count - 1],
        "gaps": [1, middle + 2],
    }[cut]


def build(kind: str, name: str) -> Any:
    """Return the dense model."""
    if kind == "wrappers":
        return tiny_wrapper(name)
    model_type, _, variant = name.partition("@")
    return tiny_causal(model_type, variant)


def names_of(kind: str) -> list[str]:
    """Return the models of a kind that can be tried."""
    if kind == "causal":
        return [name for name in causal_types() if name not in UNTESTABLE_CAUSAL]
    if kind == "variants":
        return list(VARIANTS)
    return [name for name in wrapper_types() if name not in UNTESTABLE_WRAPPERS]


def loaded(kind: str, folder: Path, **options: Any) -> Any:
    """Return a saved model, loaded by the auto class that its users would take."""
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
    )

    if kind != "wrappers":
        return AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    try:
        return AutoModelForImageTextToText.from_pretrained(folder, **options).eval()
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        return AutoModelForMultimodalLM.from_pretrained(folder, **options).eval()


def check(kind: str, name: str, cut: str, folder: Path) -> Outcome:
    """Try one cut of one model.

    Args:
        kind: One of `KINDS`.
        name: The model.
        cut: One of `CUTS`.
        folder: Where the ghosted model is saved, with the logits that it must give.
    """
    outcome = Outcome(kind, name, cut)
    dense = build(kind, name)
    count, width = Decoder.of(dense).num_layers, Decoder.of(dense).hidden_size
    removed = layers_of(cut, count)
    intervals = removed_intervals(removed, count)
    ghosts = ghosts_for(intervals, width)
    ids = tokens()

    def attempt(column: str, measure: Callable[[], float], limit: float = 1e-4) -> None:
        try:
            far = measure()
        except Exception as error:
            refused = isinstance(error, GhostedFastError) and column in ("prune", "select")
            outcome.columns[column] = REFUSED if refused else FAIL
            outcome.details[column] = f"{type(error).__name__}: {error}"[:600]
        else:
            outcome.columns[column] = OK if far <= limit else FAIL
            if far > limit:
                outcome.details[column] = f"logits {far:.2g} apart"

    def as_dense(column: str, measure: Callable[[Any], float], model: Any) -> None:
        attempt(column, lambda: measure(model), 1e-3)
        if outcome.columns[column] == FAIL and fails(lambda: measure(dense)):
            outcome.columns[column] = DENSE

    def fails(measure: Callable[[], float], limit: float = 1e-3) -> bool:
        try:
            return measure() > limit
        except Exception:
            return True

    def pruned() -> float:
        check_removable(dense, removed)
        with passed_by(dense, intervals):
            expected = logits(dense, ids)
        return distance(logits(prune_model(dense, removed), ids), expected)

    attempt("prune", pruned)
    if outcome.columns["prune"] == REFUSED:
        return outcome
    with passed_by(dense, intervals, ghosts):
        expected = logits(dense, ids)
    try:
        smaller = remove_layers(dense, removed, ghosts)
    except Exception as error:
        outcome.columns["ghost"] = FAIL
        outcome.details["ghost"] = f"{type(error).__name__}: {error}"
        return outcome
    attempt("ghost", lambda: distance(logits(smaller, ids), expected), 1e-3)
    as_dense("cache", lambda m: max(cached_apart(m), generated_apart(m)), smaller)
    as_dense("padded", padded_apart, smaller)

    def reloaded() -> float:
        save_model(smaller, folder)
        torch.save((kind, ids, logits(smaller, ids)), folder / "expected.pt")
        return distance(logits(loaded(kind, folder), ids), logits(smaller, ids))

    def dense_reloaded() -> float:
        dense.save_pretrained(folder / "dense")
        return distance(logits(loaded(kind, folder / "dense"), ids), logits(dense, ids))

    attempt("reload", reloaded, 1e-6)
    if outcome.columns["reload"] != OK and fails(dense_reloaded):
        outcome.columns["reload"] = DENSE

    def masked() -> float:
        return distance(logits(dense, ids, torch.ones_like(ids)), logits(dense, ids))

    def selected() -> float:
        texts = [tokens(4, 32, seed) for seed in range(12)]
        found, _ = ghost_model(
            dense, texts, remove=1, run=RunOptions(corrections=1, progress=False)
        )
        return 0.0 if torch.isfinite(logits(found, ids)).all() else 1.0

    if cut == "middle":
        attempt("select", selected)
        if outcome.columns["select"] == FAIL and fails(masked):
            outcome.columns["select"] = DENSE
    return outcome


def _child(kind: str, name: str, cuts: tuple[str, ...], folder: Path, answers: Connection) -> None:
    """Try the cuts of one model, in a process of its own."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with Path(os.devnull).open("w") as nothing:
        os.dup2(nothing.fileno(), 2)
    for cut in cuts:
        try:
            outcome = check(kind, name, cut, folder / f"{kind}-{name}-{cut}")
        except GhostedFastError as error:
            outcome = Outcome(
                kind, name, cut, {"prune": REFUSED}, {"prune": f"{type(error).__name__}: {error}"}
            )
        except Exception as error:
            outcome = Outcome(
                kind, name, cut, {"prune": FAIL}, {"prune": f"{type(error).__name__}: {error}"}
            )
        answers.send(outcome)
    answers.close()


def run_one(kind: str, name: str, cuts: tuple[str, ...], folder: Path) -> list[Outcome]:
    """Try the cuts of one model, at most `SECONDS` long each."""
    fork = multiprocessing.get_context("fork")
    receive, send = fork.Pipe(duplex=False)
    process = fork.Process(target=_child, args=(kind, name, cuts, folder, send))
    process.start()
    send.close()
    found: list[Outcome] = []
    while len(found) < len(cuts):
        try:
            if not receive.poll(SECONDS):
                break
            found.append(receive.recv())
        except EOFError:
            break
    process.kill()
    process.join()
    lost = {"prune": "crashed or took too long"}
    return found + [Outcome(kind, name, cut, {"prune": FAIL}, lost) for cut in cuts[len(found) :]]


def check_remote(outcomes: list[Outcome], folder: Path) -> None:
    """Load what was saved in a process that has no `ghosted_fast`, and enter what came of it."""
    saved = {f"{o.kind}-{o.name}-{o.cut}": o for o in outcomes if o.columns.get("reload") == OK}
    answers = folder / "remote.jsonl"
    remaining = sorted(saved)
    while remaining:
        subprocess.run(
            [sys.executable, str(_REMOTE), str(folder), str(answers), *remaining],
            check=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        lines = answers.read_text().splitlines() if answers.exists() else []
        said = dict(map(json.loads, lines))
        if not said.keys() & set(remaining):
            said = {remaining[0]: "crashed"}
        for key in sorted(said.keys() & set(remaining)):
            far = said[key]
            good = isinstance(far, float) and far <= 1e-4
            saved[key].columns["remote"] = OK if good else FAIL
            if not good:
                saved[key].details["remote"] = str(far)
        remaining = [key for key in remaining if key not in said]


def sweep(
    kinds: tuple[str, ...], cuts: tuple[str, ...], only: list[str], jobs: int, remote: bool = True
) -> list[Outcome]:
    """Try cuts on models of some kinds, and print a line for each model."""
    folder = Path(tempfile.mkdtemp(prefix="families-"))
    work = [(kind, name) for kind in kinds for name in names_of(kind) if not only or name in only]
    outcomes: list[Outcome] = []
    try:
        with ThreadPoolExecutor(jobs) as pool:
            for found in pool.map(lambda item: run_one(*item, cuts, folder), work):
                outcomes += found
                print(found[0].name, *(f"{o.cut}:{o.verdict}" for o in found), flush=True)
        if remote:
            check_remote(outcomes, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return outcomes


def main() -> None:
    """Run the sweep that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--cuts", nargs="+", choices=CUTS, default=list(CUTS))
    parser.add_argument("--types", nargs="+", default=[], help="Only these models.")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--no-remote", action="store_true")
    parser.add_argument("--output", type=Path, help="File for the verdicts, as JSON.")
    given = parser.parse_args()
    outcomes = sweep(
        tuple(given.kind), tuple(given.cuts), given.types, given.jobs, not given.no_remote
    )
    for outcome in outcomes:
        for column, detail in outcome.details.items():
            print(outcome.name, outcome.cut, column, outcome.columns.get(column), detail)
    print(Counter(model["verdict"] for model in summary(outcomes).values()))
    if given.output is not None:
        write(outcomes, given.output, only=bool(given.types))
    if any(outcome.verdict == FAILS for outcome in outcomes):
        sys.exit(1)


def _added(known: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Return a record with the verdicts of another one in the place of its own."""
    for kind, said in found["kinds"].items():
        models = known["kinds"].setdefault(kind, said)["models"]
        models.update(said["models"])
    return known


def write(outcomes: list[Outcome], path: Path, only: bool = False) -> None:
    """Write the verdicts of all models, with what they were found with."""
    untestable = {"causal": UNTESTABLE_CAUSAL, "variants": {}, "wrappers": UNTESTABLE_WRAPPERS}
    kinds = {outcome.kind for outcome in outcomes}
    record = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "kinds": {
            kind: {
                "models": summary(o for o in outcomes if o.kind == kind),
                "untestable": untestable[kind],
            }
            for kind in KINDS
            if kind in kinds
        },
    }
    if only and path.exists():  # the verdicts on other models stay
        record = _added(json.loads(path.read_text()), record)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
