"""Models and texts by name: hub ids, folders and files become a model and batches of tokens."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ghosted_fast.errors import ArgumentError, MissingExtraError, SourceError
from ghosted_fast.readers import (
    first_line,
    hub_records,
    json_records,
    parquet_records,
    read_paragraphs,
    texts_of,
)

SELF = "self"
_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_TEXT_SUFFIXES = (".txt", ".md", ".rst", ".jsonl", ".ndjson", ".parquet")
_SEPARATOR = "\n\n"
# Long enough that a tokenizer works at full speed and that few words are cut at a block's end.
_BLOCK_CHARACTERS = 1 << 20


def resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Return the torch dtype that a name means; `None` and "auto" mean the checkpoint's own.

    Raises:
        ArgumentError: The dtype is not one that the kernels take.
    """
    if dtype is None or dtype == "auto":
        return None
    found = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in _DTYPES.values():
        raise ArgumentError(
            f"expected dtype to be one of auto, {', '.join(_DTYPES)}, got {dtype!r}"
        )
    return found


def load_model(
    spec: str | Path, dtype: str | torch.dtype | None = None, gguf_file: str | None = None
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer, in evaluation mode.

    Args:
        spec: A hub id, a local folder, or the path of a GGUF file.
        dtype: Weights' dtype, by name ("bfloat16", "bf16", ...) or as torch has it; `None` or
            "auto" keeps the checkpoint's own.
        gguf_file: Name of the GGUF file inside `spec`, where `spec` is a folder or a hub id.

    Returns:
        The model (`transformers.PreTrainedModel`) and the tokenizer.

    Raises:
        SourceError: There is no such file, folder or hub model, or it cannot be loaded.
        MissingExtraError: A GGUF file was named and package gguf or accelerate is absent.
        ArgumentError: The dtype is unknown.
    """
    wanted = resolve_dtype(dtype)
    name, gguf_file = _locate_model(str(spec), gguf_file)
    if gguf_file is not None:
        _require_gguf()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=wanted or "auto", **options, **_unpacked(gguf_file)
        )
    except (OSError, ValueError, KeyError) as error:
        raise SourceError(f"cannot load the model {str(spec)!r}: {first_line(error)}") from error
    return model.eval(), tokenizer


def cast_parameters(model: Any, dtype: torch.dtype) -> Any:
    """Cast a model's parameters in place, as loading it in that dtype does.

    `model.to` would round the buffer of rotary frequencies as well, and the model would differ from
    the same one loaded from a checkpoint.

    Args:
        model: The model.
        dtype: What its parameters become.

    Returns:
        The model.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def _locate_model(spec: str, gguf_file: str | None) -> tuple[str, str | None]:
    """Return what transformers calls the model, and its GGUF file if it is one."""
    path = Path(spec).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise SourceError(
                f"expected a hub id, a folder or a .gguf file, got a file of another kind: {spec!r}"
            )
        return str(path.parent), path.name
    if path.is_dir():
        if gguf_file is not None or (path / "config.json").is_file():
            return str(path), gguf_file
        candidates = sorted(file.name for file in path.glob("*.gguf"))
        if len(candidates) == 1:
            return str(path), candidates[0]
        held = (
            f"several GGUF files ({', '.join(candidates)}): name one"
            if candidates
            else ("neither config.json nor a .gguf file")
        )
        raise SourceError(f"the folder {spec!r} holds {held}")
    if _looks_like_path(spec, (".gguf",)) or not _HUB_ID.fullmatch(spec):
        raise SourceError(
            f"there is no folder or file {spec!r}; give an existing path, or a hub id such as "
            "'HuggingFaceTB/SmolLM2-135M-Instruct'"
        )
    return spec, gguf_file


def _looks_like_path(spec: str, suffixes: tuple[str, ...]) -> bool:
    return spec.startswith((".", "/", "~")) or spec.count("/") > 1 or spec.endswith(suffixes)


def _unpacked(gguf_file: str | None) -> dict[str, Any]:
    """Return the options that make plain weights of a GGUF file's blocks.

    Newer versions of transformers keep the blocks packed where they have a kernel for them.
    """
    import transformers

    if gguf_file is None or not hasattr(transformers, "GgufConfig"):
        return {}
    return {"quantization_config": transformers.GgufConfig(dequantize=True)}


def _require_gguf() -> None:
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"a GGUF model needs {' and '.join(missing)}: pip install 'ghosted_fast[gguf]'"
        )


def load_texts(
    spec: str | Path, field: str | None = None, split: str | None = None
) -> Iterator[str]:
    """Read texts from a file or a hub data set, one at a time.

    Args:
        spec: A `.jsonl` or `.parquet` file, any other text file (split at blank lines), or a hub
            data set as `id` or `id:configuration` (needs package datasets).
        field: The field that holds the text; by default "text", else "0", else the only one of
            type string. Plain text files have none.
        split: The hub data set's split, "train" by default.

    Returns:
        An iterator of texts.

    Raises:
        SourceError: The file does not exist or cannot be read, or the field is not there.
        MissingExtraError: Package pyarrow or datasets is needed and absent.
    """
    name = str(spec)
    path = Path(name).expanduser()
    if path.is_file():
        suffix = path.suffix.lower()
        if suffix in (".jsonl", ".ndjson"):
            return texts_of(json_records(path), field, name)
        if suffix == ".parquet":
            return texts_of(parquet_records(path), field, name)
        return read_paragraphs(path)
    if path.is_dir():
        raise SourceError(f"{name!r} is a folder; name one text, .jsonl or .parquet file in it")
    if name == SELF:
        raise SourceError("'self' is text that a model generates: call generate_texts")
    hub_id, _, configuration = name.partition(":")
    if _looks_like_path(name, _TEXT_SUFFIXES) or not _HUB_ID.fullmatch(hub_id):
        raise SourceError(
            f"there is no file {name!r}; give a text, .jsonl or .parquet file, a hub data set, "
            "or 'self'"
        )
    return texts_of(hub_records(hub_id, configuration or None, split), field, name)


def token_batches(
    tokenizer: Any,
    texts: Iterable[str],
    num_tokens: int,
    sequence_length: int = 512,
    batch_size: int = 8,
) -> list[Tensor]:
    """Cut texts into full rows of tokens.

    The texts, joined by a blank line, form one stream, so a smaller `num_tokens` gives the first
    rows of a larger one. Each row begins with the BOS token if the tokenizer adds one by itself.

    Args:
        tokenizer: A transformers tokenizer.
        texts: The texts; only as many are read as are needed.
        num_tokens: Tokens wanted; rounded down to whole rows.
        sequence_length: Tokens in a row, BOS included.
        batch_size: Rows in a batch; the last may have fewer.

    Returns:
        Batches of token ids [batch, sequence_length], int64.

    Raises:
        ArgumentError: A number is too small, or `num_tokens` is less than one row.
        SourceError: The texts hold fewer tokens than asked for.
    """
    prefix = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    if sequence_length < len(prefix) + 2 or batch_size < 1:
        raise ArgumentError(
            f"expected sequence_length >= {len(prefix) + 2} and batch_size >= 1, "
            f"got {sequence_length} and {batch_size}"
        )
    num_rows = num_tokens // sequence_length
    if num_rows < 1:
        raise ArgumentError(f"expected num_tokens >= {sequence_length}, one row, got {num_tokens}")
    row_tokens = sequence_length - len(prefix)
    needed = num_rows * row_tokens
    stream: list[int] = []
    for block in _blocks(texts):
        stream += tokenizer(block, add_special_tokens=False, verbose=False)["input_ids"]
        if len(stream) >= needed:
            break
    if len(stream) < needed:
        whole = len(stream) // row_tokens * sequence_length
        advice = f"give more text, or ask for {whole}" if whole else "give more text"
        raise SourceError(
            f"expected {needed} tokens of text for {num_rows} rows of {sequence_length}, "
            f"got {len(stream)}: {advice}"
        )
    rows = torch.tensor(stream[:needed], dtype=torch.int64).view(num_rows, row_tokens)
    if prefix:
        rows = torch.cat([torch.full((num_rows, 1), prefix[0]), rows], dim=1)
    return list(rows.split(batch_size))


def adds_bos(tokenizer: Any) -> bool:
    """Return whether the tokenizer begins a text with the BOS token by itself."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return False
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    return tokenizer("a")["input_ids"][:1] == [bos] and plain[:1] != [bos]


def _blocks(texts: Iterable[str]) -> Iterator[str]:
    """Join texts by blank lines into blocks whose borders do not depend on what is needed."""
    block: list[str] = []
    size = 0
    for text in texts:
        block.append(text)
        size += len(text)
        if size >= _BLOCK_CHARACTERS:
            yield _SEPARATOR.join([*block, ""])
            block, size = [], 0
    if any(block):
        yield _SEPARATOR.join(block)
