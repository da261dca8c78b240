"""A small tokenizer and some text, for tests that begin with text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ghosted_fast.testing import VOCABULARY_SIZE, tiny_model

TEXT = "the cat sat on the mat and the dog saw it . a bird sang to the cat , and all was well ."


def tiny_tokenizer(adds_bos: bool = False) -> Any:
    """Return a word tokenizer: <unk> 0, <s> 1, then the words of `TEXT`, and fillers."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", *dict.fromkeys(TEXT.split())]
    words += [f"w{i}" for i in range(VOCABULARY_SIZE - len(words))]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            "<s> $A", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", pad_token="<unk>"
    )


def save_tiny_model(folder: Path, num_layers: int = 6, seed: int = 0) -> Path:
    """Save a random model with its tokenizer, and return the folder."""
    tiny_model("llama", num_layers, seed=seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
