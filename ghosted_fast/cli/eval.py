"""`ghosted-fast eval`: perplexity and accuracy of several models on the same text and tasks."""

from __future__ import annotations

from ghosted_fast.cli import options
from ghosted_fast.cli.verb import Result, usage_error


def evaluate(
    model: options.ModelsOption,
    evaluation: options.OptionalTextOption = None,
    tasks: options.TasksOption = None,
    limit: options.LimitOption = None,
    field: options.FieldOption = None,
    split: options.SplitOption = None,
    tokens: options.TextTokensOption = 5120,
    sequence_length: options.SequenceLengthOption = 512,
    batch_size: options.BatchSizeOption = 8,
    dtype: options.DtypeOption = "auto",
    device: options.DeviceOption = "auto",
    seed: options.SeedOption = 0,
) -> Result:
    """Measure the perplexity of models on a text, their accuracy on tasks, or both.

    All models read the tokens that the first model's tokenizer makes of the text.
    """
    from ghosted_fast.cli.loading import open_models
    from ghosted_fast.cli.tables import accuracy_table, model_table
    from ghosted_fast.measure.models_table import compare_models
    from ghosted_fast.measure.tasks import check_tasks, evaluate_tasks
    from ghosted_fast.text.loading import load_texts, token_batches

    names = [name for name in (tasks or "").split(",") if name.strip()]
    if evaluation is None and tasks is None:
        raise usage_error("expected one of the two or both, got none", "--evaluation / --tasks")
    if tasks is not None:
        names = check_tasks([name.strip() for name in names])
    texts = None if evaluation is None else load_texts(evaluation, field, split)
    models, tokenizer = open_models(model, dtype, device)
    batches = None
    if texts is not None:
        batches = token_batches(tokenizer, texts, tokens, sequence_length, batch_size)
    rows = compare_models(models, batches, progress=True, seed=seed)
    records = [row.to_dict() for row in rows]
    tables = [model_table(rows)]
    if names:
        scores = {
            name: evaluate_tasks(item, tokenizer, names, limit, progress=True)
            for name, item in models.items()
        }
        for record in records:
            record["tasks"] = [score.to_dict() for score in scores[record["name"]]]
        tables.append(accuracy_table(scores))
    return Result({"models": records}, tables)
