"""`ghosted-fast eval`: perplexity, accuracy and likeness of several models on the same text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import typer

from ghosted_fast.cli._shared import values
from ghosted_fast.cli._shared.input_args import EvaluationOption, ModelsArgs, TaskArgs, TextArgs
from ghosted_fast.cli._shared.output_args import ReportArgs
from ghosted_fast.cli._shared.results import Result, TextTable
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


@dataclass(frozen=True, kw_only=True)
class FidelityArgs:
    """Whether it is measured how closely models follow the first."""

    title: ClassVar = "Likeness to the first model"
    fidelity: Annotated[
        bool,
        typer.Option(
            "--fidelity/--no-fidelity",
            help="Also measure how closely models follow the first one on what it answers, and "
            "small tasks whose answer is exact. No labels are needed.",
        ),
    ] = False
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts",
            parser=values.parse_written_text,
            metavar="TEXT",
            help="What is asked, as for --evaluation: the first 64 texts, or the users' first "
            "messages. Questions that are built in if not given.",
        ),
    ] = None
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", min=1, help="Tokens of an answer, at most.")
    ] = 64

    def __post_init__(self) -> None:
        if self.prompts is not None and not self.fidelity:
            raise usage_error("expected --fidelity with it", "--prompts")

    def read(self, text: TextArgs, tokenizer: Any) -> list[list[int]]:
        """Return the tokens of what is asked, through the tokenizer's chat template."""
        from ghosted_fast.measure.prompts import QUESTIONS, read_questions
        from ghosted_fast.text.chat import prompt_tokens

        asked = list(QUESTIONS)
        if self.prompts is not None:
            asked = read_questions(self.prompts, text.field, text.split)
        return [prompt_tokens(tokenizer, item) for item in asked]


def evaluate(
    models: ModelsArgs,
    text: MeasuredTextArgs,
    tasks: TaskArgs,
    likeness: FidelityArgs,
    output: ReportArgs,
) -> Result:
    """Measure models: perplexity on a text, accuracy on tasks, likeness to the first of them.

    All models read the tokens that the first model's tokenizer makes of the text. With several
    models, tasks also show how many answers are others than the first model's.
    """
    if text.evaluation is None and tasks.tasks is None and not likeness.fidelity:
        raise usage_error("expected one of the three or more, got none",
                          "--evaluation / --tasks / --fidelity")  # fmt: skip

    from ghosted_fast.cli._shared.tables import model_table
    from ghosted_fast.measure.models_table import compare_models

    names = tasks.names()
    output.check_new(None, *models.model)
    for spec in (text.evaluation, likeness.prompts):
        if spec is not None:
            text.check_there(spec)
    models.check(0 if text.evaluation is None else text.sequence_length)
    opened, tokenizer = models.open()
    batches = None
    if text.evaluation is not None:
        batches = text.batches_of(tokenizer, text.evaluation, text.tokens, text.sequence_length)
    rows = compare_models(opened, batches, progress=True, seed=text.seed)
    records = {row.name: row.to_dict() for row in rows}
    shown: list[TextTable | str] = [model_table(rows)]
    if names:
        shown += _on_tasks(opened, tokenizer, names, tasks.limit, records)
    if likeness.fidelity:
        shown += _likeness(opened, tokenizer, text, likeness, records)
    data: dict[str, Any] = {"models": list(records.values())}
    if output.report is not None:
        shown += ["", output.write({"model": " and ".join(opened), **data})]
    return Result(data, shown)


def _on_tasks(
    models: dict[str, Any],
    tokenizer: Any,
    names: list[str],
    limit: int | None,
    records: dict[str, dict[str, Any]],
) -> list[TextTable | str]:
    """Measure accuracy, differences and flips, put them into the records; return their tables."""
    from ghosted_fast.cli._shared.tables import accuracy_table, difference_table, flip_table
    from ghosted_fast.measure.tasks import evaluate_tasks, with_flips

    scores = {
        name: evaluate_tasks(model, tokenizer, names, limit, progress=True, choices=True)
        for name, model in models.items()
    }
    dense, *others = scores
    for name in others:
        scores[name] = with_flips(scores[name], scores[dense])
    for name, record in records.items():
        record["tasks"] = [score.to_dict() for score in scores[name]]
    shown: list[TextTable | str] = ["", accuracy_table(scores)]
    for table in (difference_table(scores), flip_table(scores)):
        shown += [] if table is None else ["", table]
    return shown


def _likeness(
    models: dict[str, Any],
    tokenizer: Any,
    text: MeasuredTextArgs,
    likeness: FidelityArgs,
    records: dict[str, dict[str, Any]],
) -> list[TextTable | str]:
    """Measure likeness and exact answers, put them into the records, and return their tables."""
    from ghosted_fast.cli._shared.tables import exact_table, fidelity_table
    from ghosted_fast.measure.exact_answers import exact_answers
    from ghosted_fast.measure.fidelity import compare_with_dense

    prompts = likeness.read(text, tokenizer)
    size = text.batch_size
    found = compare_with_dense(models, prompts, likeness.new_tokens, size, progress=True)
    exact = exact_answers(models, tokenizer, seed=text.seed, batch_size=size, progress=True)
    for name, record in records.items():
        record["fidelity"] = found[name].to_dict()
        record["exact_answers"] = [score.to_dict() for score in exact[name]]
    return ["", fidelity_table(found), "", exact_table(exact)]
