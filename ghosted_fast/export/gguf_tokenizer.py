"""A tokenizer as llama.cpp reads it: taken from a GGUF file, or made of a transformers one."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from ghosted_fast.errors import SourceError

# The patterns by which byte-level tokenizers cut text, and what llama.cpp calls them.
_PATTERNS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
}
_REMEDY = "name a GGUF file of the dense model, whose tokenizer is then taken: --tokenizer FILE"


def add_tokenizer(writer: Any, tokenizer: Any, vocabulary_size: int) -> None:
    """Add a tokenizer's fields to a GGUF file.

    Args:
        writer: A `gguf.GGUFWriter`.
        tokenizer: A transformers tokenizer, or the path of a GGUF file.
        vocabulary_size: Rows of the model's embedding; tokens without a name get one.

    Raises:
        SourceError: The tokenizer is of a kind that llama.cpp is not known to have, or has more
            tokens than the model.
    """
    if isinstance(tokenizer, (str, os.PathLike)):
        _copy_fields(writer, Path(tokenizer), vocabulary_size)
    else:
        _add_byte_level(writer, tokenizer, vocabulary_size)


def _copy_fields(writer: Any, path: Path, vocabulary_size: int) -> None:
    """Copy every field of a file's tokenizer."""
    import gguf

    if not path.is_file():
        raise SourceError(f"expected a GGUF file with a tokenizer, there is no file {str(path)!r}")
    try:
        fields = gguf.GGUFReader(path).fields
    except ValueError as error:
        raise SourceError(f"cannot read {str(path)!r} as GGUF: {error}") from error
    tokens = fields.get("tokenizer.ggml.tokens")
    if tokens is None or len(tokens.data) != vocabulary_size:
        raise SourceError(
            f"expected a tokenizer of {vocabulary_size} tokens, the model's, in {str(path)!r}, "
            f"got {0 if tokens is None else len(tokens.data)}: name the dense model's GGUF file"
        )
    for name, field in fields.items():
        if name.startswith("tokenizer."):
            kinds = [*field.types, None]
            writer.add_key_value(name, field.contents(), kinds[0], sub_type=kinds[1])


def _add_byte_level(writer: Any, tokenizer: Any, vocabulary_size: int) -> None:
    """Add a byte-level BPE tokenizer of transformers."""
    import gguf

    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = {} if backend is None else json.loads(backend.to_str())
    pre = _pattern_name(described)
    if pre is None:
        raise SourceError(
            f"llama.cpp has no known counterpart of this tokenizer ({type(tokenizer).__name__}, "
            f"{described.get('model', {}).get('type')}): {_REMEDY}"
        )
    if len(tokenizer) > vocabulary_size:
        raise SourceError(
            f"expected at most {vocabulary_size} tokens, the rows of the model's embedding, got a "
            f"tokenizer of {len(tokenizer)}"
        )
    added = {token["id"]: token["special"] for token in described["added_tokens"]}
    names = {index: name for name, index in tokenizer.get_vocab().items()}
    kinds = []
    for index in range(vocabulary_size):
        if index not in names:
            kinds.append(gguf.TokenType.UNUSED)
        elif index in added:
            special = added[index]
            kinds.append(gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED)
        else:
            kinds.append(gguf.TokenType.NORMAL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([names.get(index, f"[PAD{index}]") for index in range(vocabulary_size)])
    writer.add_token_types(kinds)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=vocabulary_size)
    special.add_special_token.setdefault("bos", False)
    special.add_to_gguf(writer, quiet=True)


def _pattern_name(described: dict[str, Any]) -> str | None:
    """Return what llama.cpp calls the way a tokenizer cuts text; None if that is unknown."""
    if described.get("model", {}).get("type") != "BPE" or described.get("normalizer") not in (
        None,
        {"type": "NFC"},
    ):
        return None
    outer = described.get("pre_tokenizer") or {}
    steps = outer.get("pretokenizers") or [outer]
    if steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    before = steps[:-1]
    if not before and steps[-1]["use_regex"]:
        return "gpt-2"
    if len(before) != 1:
        return None
    (step,) = before
    if step["type"] == "Digits" and step["individual_digits"] and steps[-1]["use_regex"]:
        return "smollm"
    if step["type"] == "Split" and not steps[-1]["use_regex"]:
        return _PATTERNS.get(step["pattern"].get("Regex", ""))
    return None
