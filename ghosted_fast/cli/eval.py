"""`ghosted-fast eval`: perplexity of several models on the same tokens."""

from __future__ import annotations

from ghosted_fast.cli import options
from ghosted_fast.cli.verb import Result


def evaluate(
    model: options.ModelsOption,
    evaluation: options.EvaluationOption,
    field: options.FieldOption = None,
    split: options.SplitOption = None,
    tokens: options.TextTokensOption = 5120,
    sequence_length: options.SequenceLengthOption = 512,
    batch_size: options.BatchSizeOption = 8,
    dtype: options.DtypeOption = "auto",
    device: options.DeviceOption = "auto",
    seed: options.SeedOption = 0,
) -> Result:
    """Measure the perplexity of one or more models on a text.

    All models read the tokens that the first model's tokenizer makes of the text.
    """
    from ghosted_fast.cli.loading import open_models
    from ghosted_fast.cli.tables import model_table
    from ghosted_fast.comparison import compare_models
    from ghosted_fast.sources import load_texts, token_batches

    texts = load_texts(evaluation, field, split)
    models, tokenizer = open_models(model, dtype, device)
    batches = token_batches(tokenizer, texts, tokens, sequence_length, batch_size)
    rows = compare_models(models, batches, progress=True, seed=seed)
    return Result({"models": [row.to_dict() for row in rows]}, [model_table(rows)])
