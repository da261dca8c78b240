"""`ghosted-fast eval`: perplexity and accuracy of several models on the same text and tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import typer

from ghosted_fast.cli._shared.input_args import EvaluationOption, ModelsArgs, TaskArgs, TextArgs
from ghosted_fast.cli._shared.results import Result
from ghosted_fast.cli._shared.verb import usage_error


@dataclass(frozen=True, kw_only=True)
class MeasuredTextArgs(TextArgs):
    """The text that perplexity is measured on."""

    title: ClassVar = "Text to measure on"
    evaluation: EvaluationOption = None
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens of text.")] = 5120

    def __post_init__(self) -> None:
        if self.evaluation is not None:
            self.check_tokens(self.tokens, "--tokens")


def evaluate(models: ModelsArgs, text: MeasuredTextArgs, tasks: TaskArgs) -> Result:
    """Measure the perplexity of models on a text, their accuracy on tasks, or both.

    All models read the tokens that the first model's tokenizer makes of the text.
    """
    if text.evaluation is None and tasks.tasks is None:
        raise usage_error("expected one of the two or both, got none", "--evaluation / --tasks")

    from ghosted_fast.cli._shared.tables import accuracy_table, model_table
    from ghosted_fast.measure.models_table import compare_models
    from ghosted_fast.measure.tasks import evaluate_tasks

    names = tasks.names()
    if text.evaluation is not None:
        text.check_there(text.evaluation)
    models.check(0 if text.evaluation is None else text.sequence_length)
    opened, tokenizer = models.open()
    batches = None
    if text.evaluation is not None:
        batches = text.batches_of(tokenizer, text.evaluation, text.tokens, text.sequence_length)
    rows = compare_models(opened, batches, progress=True, seed=text.seed)
    records = [row.to_dict() for row in rows]
    tables = [model_table(rows)]
    if names:
        scores = {
            name: evaluate_tasks(item, tokenizer, names, tasks.limit, progress=True)
            for name, item in opened.items()
        }
        for record in records:
            record["tasks"] = [score.to_dict() for score in scores[record["name"]]]
        tables.append(accuracy_table(scores))
    return Result({"models": records}, tables)
