"""What smaller models still answer and write, beside what the dense model does.

SmolLM2-135M-Instruct and Gemma 3 270M in bf16 lose a sixth to a third of their layers. The rows:
nothing in the place, the published ghost, the best published pair of criterion and recovery, and
ours: without corrections, by default, and healed. For each of them

    tasks      multiple-choice questions that need no hub, the same ones for all
    fidelity   how closely the dense model's own answers to 32 prompts are followed
    problems   small ones whose answer is written, and right to the character

Layers that `recovery_table.py` has chosen for the same weights and text are not chosen again. What
is kept of an answer is which one it was and whether it is right, so that any two rows can be
compared question by question. Each point is written at once; those in the file are not made again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from _results import RESULTS

from ghosted_fast._atomic_files import write_atomically
from ghosted_fast.assets.downloads import fetch_demo_assets, fetch_gemma3, fetch_questions
from ghosted_fast.assets.questions import PREFIX, read_questions
from ghosted_fast.errors import ArgumentError
from ghosted_fast.grid.table import BEST_PUBLISHED, marked
from ghosted_fast.improve.healing import heal
from ghosted_fast.measure.exact_answers import exact_answers
from ghosted_fast.measure.fidelity import compare_with_dense
from ghosted_fast.measure.prompts import QUESTIONS
from ghosted_fast.measure.system import machine_facts
from ghosted_fast.measure.tasks import LOCAL_TASKS, evaluate_tasks
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.models.loading import load_model
from ghosted_fast.models.structure import share_copy
from ghosted_fast.options import HealOptions, RunOptions
from ghosted_fast.pipeline import ghost_model
from ghosted_fast.selection.select import select_layers
from ghosted_fast.surgery.cut import prune_model
from ghosted_fast.text.calibration_text import CalibrationText
from ghosted_fast.text.chat import prompt_tokens
from ghosted_fast.text.fingerprints import model_digest
from ghosted_fast.text.loading import load_texts, token_batches
from ghosted_fast.timing.spans import adding_time

CALIBRATION_TOKENS, LENGTH = 49152, 512
HEALED_TOKENS, HELD_OUT_TOKENS = 98304, 4096
# Those whose questions are short: of the others each would take as long as all of these.
TASKS = ("local/socialiqa", "local/quartz", "local/knowledge")


@dataclass(frozen=True)
class Subject:
    """A model that is measured.

    Attributes:
        name: What tables call it.
        fetch: Returns the file of its weights.
        counts: Numbers of layers to remove.
    """

    name: str
    fetch: Callable[[], Path]
    counts: tuple[int, ...]


# By the names of their folders in `results/recovery`.
SUBJECTS = {
    "smollm2": Subject("SmolLM2-135M-Instruct", lambda: fetch_demo_assets().model, (5, 7)),
    "gemma3": Subject("Gemma 3 270M", fetch_gemma3, (4, 6)),
}


@dataclass(frozen=True)
class Row:
    """How the layers are chosen, and what is put in their place."""

    criterion: str
    recovery: str
    corrected: bool = False
    healed: bool = False


# The pair of "published" is what `recovery_table.py` found to be the best.
ROWS: dict[str, Row | None] = {
    "nothing": Row("streamline", "none"),
    "paper": Row("streamline", "ghost-paper"),
    "published": None,
    "closed form": Row("ghost", "ghost"),
    "ours": Row("ghost", "ghost", corrected=True),
    "healed": Row("ghost", "ghost", corrected=True, healed=True),
}


@dataclass(frozen=True)
class Scale:
    """How much each row is asked.

    Attributes:
        questions: Of each task, the first ones.
        problems: Of each kind.
        new_tokens: Of an answer to a prompt, at most.
        tasks: The tasks.
    """

    questions: int = 500
    problems: int = 200
    new_tokens: int = 64
    tasks: tuple[str, ...] = TASKS


def judged(model: Any, dense: Any, tokenizer: Any, scale: Scale) -> dict[str, Any]:
    """Return what a model answers and writes; of the dense one without its likeness to itself."""
    seconds = dict.fromkeys(("tasks", "fidelity", "problems"), 0.0)
    with adding_time(seconds, "tasks"):
        scores = evaluate_tasks(
            model, tokenizer, scale.tasks, scale.questions, progress=True, choices=True
        )
    found: dict[str, Any] = {
        "tasks": {
            score.task: {
                "metric": score.metric,
                "chosen": _digits(score.choices),
                "right": _digits(score.right),
            }
            for score in scores
        }
    }
    if model is not dense:
        prompts = [prompt_tokens(tokenizer, asked) for asked in QUESTIONS]
        models = {"dense": dense, "smaller": model}
        with adding_time(seconds, "fidelity"):
            likeness = compare_with_dense(models, prompts, scale.new_tokens, progress=True)
        found["fidelity"] = likeness["smaller"].to_dict()
    with adding_time(seconds, "problems"):
        solved = exact_answers({"": model}, tokenizer, scale.problems, batch_size=16, progress=True)
    found["problems"] = {score.kind: _digits(score.right) for score in solved[""]}
    return {**found, "seconds": seconds}


def _digits(values: Iterable[int] | None) -> str:
    """Return numbers below ten as one text."""
    return "".join(str(int(value)) for value in values or ())


class Study:
    """One model's points in the file.

    Args:
        path: The file.
        key: Of the model, in `SUBJECTS`.
        dense: The dense model.
        tokenizer: Its tokenizer.
        scale: How much is asked.
        recovered: What `recovery_table.py` found with the model; None for nothing.

    Raises:
        ArgumentError: The file holds points of another scale, or of other weights.
    """

    def __init__(
        self,
        path: Path,
        key: str,
        dense: Any,
        tokenizer: Any,
        scale: Scale,
        recovered: dict[str, Any] | None,
    ) -> None:
        self._path, self._dense, self._tokenizer, self._scale = path, dense, tokenizer, scale
        self._recovered = recovered or {"about": {}, "selections": [], "rows": []}
        self._calibration = CalibrationText.of(self._web_text(CALIBRATION_TOKENS))
        self._corrected: dict[tuple[int, ...], tuple[Any, int]] = {}
        asked, weights = json.loads(json.dumps(asdict(scale))), model_digest(dense)
        self._file: dict[str, Any] = {"scale": asked, "models": {}}
        if path.exists():
            self._file = json.loads(path.read_text(encoding="utf-8"))
        about = {"name": SUBJECTS[key].name, "weights": weights, "points": []}
        self.found: dict[str, Any] = self._file["models"].setdefault(key, about)
        there, wanted = (self._file["scale"], self.found["weights"]), (asked, weights)
        if there != wanted:
            raise ArgumentError(
                f"expected points of {wanted} in {str(path)!r}, got {there}: choose another "
                "--output, or the numbers that it was made with"
            )

    def begin(self) -> None:
        """Judge the dense model, unless that is done."""
        if "dense" not in self.found:
            self.found |= {
                "machine": machine_facts(),
                "layers": Decoder.of(self._dense).num_layers,
                "template": getattr(self._tokenizer, "chat_template", None) is not None,
                "chance": _chances(self._scale),
                "dense": judged(self._dense, self._dense, self._tokenizer, self._scale),
            }
            self._write()

    def point(self, name: str, count: int) -> None:
        """Make and judge a row without so many layers, unless that is done or it has no pair."""
        row = ROWS[name] or self._published(count)
        points = self.found["points"]
        if row is None or any((item["row"], item["remove"]) == (name, count) for item in points):
            return
        removed = self._removed(row.criterion, count)
        about = {"row": name, "remove": count, **asdict(row), "removed": removed}
        # Two criteria may choose the same layers, and "published" may be "paper".
        what = {key: about[key] for key in ("removed", "recovery", "corrected", "healed")}
        same = next((item for item in points if what.items() <= item.items()), None)
        if same is None:
            seconds = {"make": 0.0}
            with adding_time(seconds, "make"):
                smaller, facts = self._made(row, removed)
            same = {**facts, **judged(smaller, self._dense, self._tokenizer, self._scale)}
            same["seconds"] |= seconds
        points.append({**same, **about})
        self._write()

    def _published(self, count: int) -> Row | None:
        """Return the best published pair, where one is known for so many layers."""
        best = marked(self._recovered["rows"], BEST_PUBLISHED).get(count)
        return None if best is None else Row(best["criterion"], best["recovery"])

    def _removed(self, criterion: str, count: int) -> list[int]:
        """Return the layers that a criterion chooses."""
        about = self._recovered["about"]
        of_these = (self.found["weights"], self._calibration.digest)
        if (about.get("weights"), about.get("calibration")) == of_these:
            for item in self._recovered["selections"]:
                if (item["criterion"], item["remove"]) == (criterion, count):
                    return list(item["removed"])
        run = RunOptions(progress=True)
        return list(
            select_layers(self._dense, self._calibration, count, criterion, run=run).removed
        )

    def _made(self, row: Row, removed: Sequence[int]) -> tuple[Any, dict[str, Any]]:
        """Return a row's model, and what is to be said of it."""
        if row.recovery == "none":
            return prune_model(self._dense, removed), {"corrections": 0}
        if not row.corrected:
            return self._ghosted(row, removed)[0], {"corrections": 0}
        kept = tuple(removed)
        if kept not in self._corrected:
            self._corrected[kept] = self._ghosted(row, removed)
        smaller, corrections = self._corrected[kept]
        facts = {"corrections": corrections}
        if row.healed:
            smaller = share_copy(smaller)
            options = HealOptions(tokens=HEALED_TOKENS, held_out_tokens=HELD_OUT_TOKENS)
            text = self._web_text(HEALED_TOKENS + HELD_OUT_TOKENS + 8 * LENGTH)
            facts["learned"] = heal(smaller, self._dense, text, options, progress=True).tokens
        return smaller, facts

    def _ghosted(self, row: Row, removed: Sequence[int]) -> tuple[Any, int]:
        """Return a model with operators in its gaps, and how many corrections they took."""
        run = RunOptions(corrections="auto" if row.corrected else 0, progress=True)
        smaller, report = ghost_model(
            self._dense, self._calibration, removed=removed, recovery=row.recovery, run=run
        )
        return smaller, sum(item.accepted for item in report.corrections)

    def _web_text(self, tokens: int) -> list[torch.Tensor]:
        """Return the first so many tokens of the calibration text, or all if there are fewer."""
        texts = load_texts(fetch_demo_assets().calibration)
        return token_batches(self._tokenizer, texts, tokens, LENGTH, fewest=8 * LENGTH)

    def _write(self) -> None:
        write_atomically(self._path, json.dumps(self._file, indent=1) + "\n")


def _chances(scale: Scale) -> dict[str, float]:
    """Return the share of each task's questions that guesses would get right."""
    files, found = fetch_questions(), {}
    for task in scale.tasks:
        name = task.removeprefix(PREFIX)
        asked = list(islice(read_questions(files[name], name), scale.questions))
        found[task] = sum(1 / len(item.choices) for item in asked) / len(asked)
    return found


def _recovered(key: str) -> dict[str, Any] | None:
    path = RESULTS / "recovery" / key / "results.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def main() -> None:
    """Make the points that are missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("behaviour.json"))
    parser.add_argument("--model", choices=SUBJECTS, nargs="+", default=list(SUBJECTS))
    parser.add_argument("--remove", type=int, nargs="+", help="numbers of layers to remove")
    parser.add_argument("--rows", choices=ROWS, nargs="+", default=list(ROWS))
    parser.add_argument("--tasks", choices=LOCAL_TASKS, nargs="+", default=list(TASKS))
    parser.add_argument(
        "--questions", type=int, default=Scale.questions,
        help="of each task; and problems of each kind, up to 200",
    )  # fmt: skip
    arguments = parser.parse_args()
    scale = replace(
        Scale(),
        questions=arguments.questions,
        problems=min(Scale.problems, arguments.questions),
        tasks=tuple(arguments.tasks),
    )
    for key in arguments.model:
        subject = SUBJECTS[key]
        dense, tokenizer = load_model(str(subject.fetch()), dtype="bfloat16")
        study = Study(arguments.output, key, dense, tokenizer, scale, _recovered(key))
        study.begin()
        for count in arguments.remove or subject.counts:
            for name in arguments.rows:
                study.point(name, count)


if __name__ == "__main__":
    main()
