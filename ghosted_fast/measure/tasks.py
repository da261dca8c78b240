"""Accuracy on tasks of lm-evaluation-harness, for model objects; some tasks need no hub.

Source: lm-evaluation-harness (PyPI `lm_eval`), which scores; the offline sets are those of
`questions`. The tasks `paper` are those of Yun et al., arXiv 2605.15491, and its code: nine of
common sense, without examples, by accuracy ("acc"), and the mean of the nine.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import importlib.util
import io
import logging
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ghosted_fast.assets.downloads import fetch_questions
from ghosted_fast.assets.questions import PREFIX, SETS, write_tasks
from ghosted_fast.errors import ArgumentError, MissingExtraError, SourceError, check_at_least
from ghosted_fast.facts import notebook_table
from ghosted_fast.measure.paired import Difference, paired_difference
from ghosted_fast.models.decoder import evaluating
from ghosted_fast.text.files import first_line

LOCAL_TASKS = tuple(PREFIX + name for name in SETS)
PAPER = "paper"
PAPER_TASKS = (
    *("arc_easy", "arc_challenge", "hellaswag", "winogrande", "boolq", "openbookqa"),
    *("rte", "copa", "race"),
)
# Where a task has several metrics, the first of these that it has is reported.
_METRICS = ("acc_norm", "acc", "exact_match")
# What the paper's table has, whatever else a task has.
_PAPER_METRICS = ("acc",)
# fp32 log-probabilities that one call of the model may make: 1 GiB, for texts of 256 tokens.
_CALL_ELEMENTS = 1 << 28
_USUAL_LENGTH = 256
_MOST_ROWS = 16
# For the standard error of metrics that are no means.
_RESAMPLES = 1000


@dataclass(frozen=True)
class TaskScore:
    """A model's score on a task.

    Attributes:
        task: Its name.
        metric: lm-eval's name of the metric: "acc" (the answer of the highest log-likelihood is
            right), "acc_norm" (that of the highest per character), or what the task has.
        value: The mean over the samples.
        stderr: Standard error of it; None where lm-eval gives none.
        num_samples: Samples.
        flips: Share of the samples of which the model chooses another answer than the dense one,
            see `with_flips`; None of the dense one, and where there are no answers to choose from.
        difference: The score less the dense one's, with an interval; None like `flips`.
        choices: The answer that it chooses for each sample, by its index; None where there are no
            answers to choose from, or nobody asked for them. Not part of the JSON.
        right: Whether that is the right one, for each sample; None like `choices`. Not part of the
            JSON.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    num_samples: int
    flips: float | None = None
    difference: Difference | None = None
    choices: tuple[int, ...] | None = field(default=None, repr=False, compare=False)
    right: tuple[bool, ...] | None = field(default=None, repr=False, compare=False)

    def _repr_html_(self) -> str:
        error = "-" if self.stderr is None else f"{self.stderr:.1%}"
        row = [self.task, self.metric, f"{self.value:.1%}", error, f"{self.num_samples:,}"]
        return notebook_table("Score", [row], ["task", "metric", "score", "±", "samples"])

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        return {k: v for k, v in asdict(self).items() if k not in ("choices", "right")}


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str] = LOCAL_TASKS,
    limit: int | None = None,
    batch_size: int | None = None,
    progress: bool = False,
    choices: bool = False,
) -> list[TaskScore]:
    """Score a model on tasks of lm-evaluation-harness, without examples in the prompt.

    Args:
        model: A transformers causal language model: dense, pruned or ghosted.
        tokenizer: Its tokenizer.
        tasks: Names: those of `LOCAL_TASKS`, which need no hub, lm-eval's own, or "paper" for
            `PAPER_TASKS` by "acc", and the mean of the nine. A group is one score if lm-eval
            aggregates it, else one for each of its tasks.
        limit: How many samples of each task, the first ones; None for all.
        batch_size: Texts at a time; None chooses by the size of the vocabulary.
        progress: Show lm-eval's progress bars on stderr.
        choices: Whether scores also say which answers were chosen, and which of these are right.

    Returns:
        The scores, in the order of the tasks; the mean of the paper's behind the last of them.

    Raises:
        MissingExtraError: Package lm_eval is absent.
        ArgumentError: A task is unknown, there is none, or a number is below 1.
        SourceError: A task's data cannot be read or reached.
    """
    names = _expanded(check_tasks(tasks))
    given = {"limit": limit, "batch_size": batch_size}
    check_at_least(1, **{name: number for name, number in given.items() if number is not None})
    if batch_size is None:
        vocabulary = model.get_output_embeddings().weight.shape[0]
        batch_size = max(1, min(_MOST_ROWS, _CALL_ELEMENTS // (vocabulary * _USUAL_LENGTH)))
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with evaluating(model), _task_manager(names) as manager, _quiet(progress):
        # It sets a padding token on the tokenizer that it is given.
        scored = HFLM(model, "causal", tokenizer=copy.copy(tokenizer), batch_size=batch_size)
        found = simple_evaluate(
            scored,
            tasks=names,
            num_fewshot=0,
            limit=limit,
            task_manager=manager,
            log_samples=choices,
            bootstrap_iters=_RESAMPLES,
            random_seed=None,
            numpy_random_seed=None,
            torch_random_seed=None,
        )
    of_paper = PAPER_TASKS if PAPER in tasks else ()
    counts, samples = found["n-samples"], found.get("samples") or {}
    scores = []
    for name, values in found["results"].items():
        wanted = _PAPER_METRICS if name in of_paper else _METRICS
        if _metric(values, wanted):
            count = counts.get(name, {}).get("effective")
            score = _score(name, values, wanted, count)
            chosen = _choices(samples.get(name), score.metric)
            right = None if chosen is None else _right(samples[name], score.metric)
            scores.append(replace(score, choices=chosen, right=right))
    return _with_mean(scores) if of_paper else scores


def _expanded(names: Sequence[str]) -> list[str]:
    """Return the names with the paper's tasks in the place of their own name, each once."""
    each = ((name,) if name != PAPER else PAPER_TASKS for name in names)
    return list(dict.fromkeys(item for items in each for item in items))


def _with_mean(scores: Sequence[TaskScore]) -> list[TaskScore]:
    """Return scores with the mean of the paper's nine behind them."""
    nine = [score for score in scores if score.task in PAPER_TASKS]
    errors = [score.stderr for score in nine]
    known = [error for error in errors if error is not None]
    mean = TaskScore(
        task=PAPER,
        metric="mean acc",
        value=sum(score.value for score in nine) / len(nine),
        # The tasks' samples have nothing to do with one another.
        stderr=math.hypot(*known) / len(nine) if len(known) == len(nine) else None,
        num_samples=sum(score.num_samples for score in nine),
    )
    last = max(place for place, score in enumerate(scores) if score.task in PAPER_TASKS)
    return [*scores[: last + 1], mean, *scores[last + 1 :]]


def with_flips(scores: Sequence[TaskScore], dense: Sequence[TaskScore]) -> list[TaskScore]:
    """Return scores that say how many answers flip, and how far they are from the dense model's.

    Unlike accuracy, flips show answers that became right as well as those that became wrong. Flips
    of the paper's mean are over all samples, its difference is the mean of the nine.

    Args:
        scores: Of a model, with choices.
        dense: Of the dense model, on the same tasks and samples, with choices.

    Source: Dutta et al., "Accuracy is Not All You Need", arXiv 2407.09141: flips; here of all
        changes of the chosen answer, from one wrong answer to another included.
    """
    both = list(zip(scores, dense, strict=True))
    nine = [pair for pair in both if pair[0].task in PAPER_TASKS]
    found = []
    for pair in both:
        pairs = nine if pair[0].task == PAPER else [pair]
        found.append(replace(pair[0], flips=_flips(pairs), difference=_difference(pairs)))
    return found


def _flips(pairs: Sequence[tuple[TaskScore, TaskScore]]) -> float | None:
    """Return the share of other answers, over all samples whose answers are known."""
    changed = [
        one != other
        for own, dense in pairs
        if own.choices and dense.choices
        for one, other in zip(own.choices, dense.choices, strict=True)
    ]
    return sum(changed) / len(changed) if changed else None


def _difference(pairs: Sequence[tuple[TaskScore, TaskScore]]) -> Difference | None:
    """Return how far the mean of the scores is from the dense model's; None if one is unknown."""
    known = [(own.right, dense.right) for own, dense in pairs if own.right and dense.right]
    if not known or len(known) < len(pairs):
        return None
    return paired_difference([own for own, _ in known], [dense for _, dense in known])


def _choices(samples: Sequence[Mapping[str, Any]] | None, metric: str) -> tuple[int, ...] | None:
    """Return the answer that was chosen for each sample, from lm-eval's record of them.

    Args:
        samples: With the log-likelihood of each answer; None where they were not kept.
        metric: "acc_norm" chooses by the log-likelihood per character, others by it alone.
    """
    chosen = []
    for sample in samples or ():
        answers = sample["filtered_resps"]
        if len(answers) < 2 or not all(isinstance(item, list | tuple) for item in answers):
            return None
        values = [float(item[0]) for item in answers]
        if metric == "acc_norm":
            # A blank stands between the question and an answer, which lm-eval does not count.
            texts = [call[1].removeprefix(" ") for call in sample["arguments"]]
            values = [v / max(len(text), 1) for v, text in zip(values, texts, strict=True)]
        chosen.append(max(range(len(values)), key=values.__getitem__))
    return tuple(chosen) or None


def _right(samples: Sequence[Mapping[str, Any]], metric: str) -> tuple[bool, ...] | None:
    """Return whether the chosen answer of each sample is right; None where the metric differs."""
    values = [sample.get(metric) for sample in samples]
    return tuple(map(bool, values)) if all(value in (0, 1) for value in values) else None


def accuracy(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str] = LOCAL_TASKS,
    limit: int | None = None,
    batch_size: int | None = None,
) -> dict[str, float]:
    """Return the score of each task, as `evaluate_tasks` gives it, without errors or counts."""
    return {
        score.task: score.value
        for score in evaluate_tasks(model, tokenizer, tasks, limit, batch_size)
    }


def check_tasks(tasks: Sequence[str]) -> list[str]:
    """Return the names of tasks, each once, after checking that they can be used.

    Raises:
        MissingExtraError: Package lm_eval is absent.
        ArgumentError: There is no task, or lm-eval does not know one.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingExtraError("tasks need lm_eval: pip install 'ghosted_fast[lm-eval]'")
    names = list(dict.fromkeys(tasks))
    if not names:
        raise ArgumentError(f"expected tasks, got none: {', '.join(LOCAL_TASKS)}, or lm-eval's own")
    others = [name for name in _expanded(names) if name not in LOCAL_TASKS]
    if others:
        known = _lm_eval_tasks()
        for name in others:
            if name not in known:
                near = difflib.get_close_matches(name, [*LOCAL_TASKS, *sorted(known)], n=5)
                raise ArgumentError(
                    f"there is no task {name!r}. Without the hub there are "
                    f"{', '.join(LOCAL_TASKS)}; lm-eval has {len(known)} more"
                    + (f", of which {', '.join(near)} are like it" if near else "")
                )
    return names


@functools.cache
def _lm_eval_tasks() -> frozenset[str]:
    """Return the names that lm-eval itself knows; it reads 14 thousand files for them."""
    from lm_eval.tasks import TaskManager

    return frozenset(TaskManager().all_tasks)


@contextmanager
def _task_manager(names: Sequence[str]) -> Iterator[Any]:
    """Yield lm-eval's manager, which knows its own tasks if need be, and those without the hub."""
    from lm_eval.tasks import TaskManager

    class Manager(TaskManager):
        def load(self, task_list: Any) -> Any:
            try:
                return super().load(task_list)
            except (OSError, ValueError, RuntimeError, ImportError) as error:
                raise SourceError(
                    f"cannot read the data of {', '.join(names)}: {first_line(error)}. Without "
                    f"the hub there are {', '.join(LOCAL_TASKS)}"
                ) from error

    local = [name for name in names if name in LOCAL_TASKS]
    files = fetch_questions() if local else {}
    with tempfile.TemporaryDirectory(prefix="ghosted-fast-tasks-") as temporary:
        folder = Path(temporary)
        sets = [name.removeprefix(PREFIX) for name in local]
        write_tasks(folder, {name: files[name] for name in sets})
        yield Manager(include_path=folder, include_defaults=len(local) < len(names))


@contextmanager
def _quiet(progress: bool) -> Iterator[None]:
    """Keep lm-eval's notes off stderr, and its progress bars too unless they are wanted."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.nullcontext() if progress else contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _metric(values: Mapping[str, Any], wanted: Sequence[str]) -> str | None:
    """Return the key, such as "acc,none", of the metric to report; None where there is none."""
    numbers = [
        key
        for key, value in values.items()
        if "," in key and "_stderr," not in key and isinstance(value, int | float)
    ]
    preferred = [key for name in wanted for key in numbers if key.partition(",")[0] == name]
    return next(iter([*preferred, *numbers]), None)


def _score(
    name: str, values: Mapping[str, Any], wanted: Sequence[str], count: int | None
) -> TaskScore:
    key = _metric(values, wanted)
    assert key is not None
    metric, _, kind = key.partition(",")
    error = values.get(f"{metric}_stderr,{kind}")
    return TaskScore(
        task=name,
        metric=metric,
        value=float(values[key]),
        stderr=float(error) if isinstance(error, int | float) else None,
        num_samples=int(count if count is not None else values.get("sample_len", 0)),
    )
