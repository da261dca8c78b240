"""Models and texts by name, batches of tokens, and text that a model writes itself."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.tiny_text import TEXT, save_tiny_model, tiny_tokenizer

from ghosted_fast.errors import ArgumentError, MissingExtraError, SourceError
from ghosted_fast.models.loading import cast_parameters, load_model
from ghosted_fast.testing import random_tokens
from ghosted_fast.text import loading
from ghosted_fast.text.loading import load_texts, token_batches


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (None, torch.float32),
        ("auto", torch.float32),
        ("bf16", torch.bfloat16),
        ("float16", torch.float16),
        (torch.bfloat16, torch.bfloat16),
    ],
    ids=str,
)
def test_load_model(folder: Path, asked: object, expected: torch.dtype) -> None:
    model, tokenizer = load_model(folder, asked)
    assert model.dtype == expected
    assert not model.training
    assert tokenizer.bos_token_id == 1


def test_cast_parameters_is_what_loading_does(folder: Path) -> None:
    model = cast_parameters(load_model(folder)[0], torch.bfloat16)
    loaded = load_model(folder, "bf16")[0]
    tokens = random_tokens(2, 40)
    with torch.inference_mode():
        assert torch.equal(model(tokens).logits, loaded(tokens).logits)
    assert model.config.dtype == torch.bfloat16


def test_load_model_refuses_a_dtype(folder: Path) -> None:
    with pytest.raises(ArgumentError, match=r"expected dtype to be one of auto, float32.*'int8'"):
        load_model(folder, "int8")


def test_load_model_refuses_a_missing_path() -> None:
    with pytest.raises(SourceError, match=r"no folder or file './nowhere'"):
        load_model("./nowhere")
    with pytest.raises(SourceError, match="no folder or file"):
        load_model("weights.gguf")


def test_load_model_refuses_an_unknown_hub_id() -> None:
    with pytest.raises(SourceError, match="cannot load the model 'nobody/nothing'"):
        load_model("nobody/nothing")


def test_load_model_refuses_folders_and_files_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"neither config.json nor a .gguf file"):
        load_model(tmp_path)
    (tmp_path / "a.gguf").touch()
    (tmp_path / "b.gguf").touch()
    with pytest.raises(SourceError, match=r"several GGUF files \(a.gguf, b.gguf\)"):
        load_model(tmp_path)
    other = tmp_path / "model.bin"
    other.touch()
    with pytest.raises(SourceError, match="a file of another kind"):
        load_model(other)


def test_gguf_needs_its_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.gguf").touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'ghosted_fast\[gguf\]'"):
        load_model(tmp_path)


def test_text_file_is_split_at_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n\none\nmore\n \n\ntwo\n")
    assert list(load_texts(path)) == ["one\nmore", "two"]


@pytest.mark.parametrize(
    ("record", "field", "expected"),
    [
        ({"0": "zero", "text": "here"}, None, "here"),
        ({"0": "zero", "1": "one"}, None, "zero"),
        ({"id": 3, "body": "only"}, None, "only"),
        ({"0": "zero", "text": "here"}, "0", "zero"),
    ],
)
def test_jsonl_field(tmp_path: Path, record: dict, field: str | None, expected: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(record) + "\n\n")
    assert list(load_texts(path, field)) == [expected]


@pytest.mark.parametrize(
    ("content", "field", "message"),
    [
        ('{"a": "x", "b": "y"}', None, r"which field .* a \(str\), b \(str\); name one"),
        ('{"a": "x"}', "b", r"no text in field 'b'; its fields are a \(str\)"),
        ('{"a": "x"}\n{"a": 3}', "a", r"record 2 .* no text in field 'a'"),
        ('{"a": "x"}\n{"a"', None, "line 2 .* is not JSON"),
        ('["a"]', None, "line 1 .* must be a JSON object; got list"),
    ],
)
def test_bad_jsonl(tmp_path: Path, content: str, field: str | None, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(SourceError, match=message):
        list(load_texts(path, field))


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_text_that_is_not_utf8(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b'{"a": "\xff\xfe"}')
    with pytest.raises(SourceError, match=r"is not (UTF-8|JSON)"):
        list(load_texts(path))


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"id": [1, 2], "text": ["one", "two"]}), path)
    assert list(load_texts(path)) == ["one", "two"]
    path.write_bytes(b"no parquet")
    with pytest.raises(SourceError, match="as parquet"):
        list(load_texts(path))


def test_texts_that_do_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for missing in ("nowhere.jsonl", "./nowhere", "no such thing"):
        with pytest.raises(SourceError, match="there is no file"):
            load_texts(missing)
    with pytest.raises(SourceError, match="is a folder"):
        load_texts(tmp_path)
    with pytest.raises(SourceError, match="generate_texts"):
        load_texts("self")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'ghosted_fast\[data\]'"):
        list(load_texts("nobody/nothing"))


def test_token_batches_are_full_rows_of_one_stream() -> None:
    tokenizer = tiny_tokenizer()
    batches = token_batches(tokenizer, [TEXT] * 20, 330, sequence_length=32, batch_size=4)
    assert [list(batch.shape) for batch in batches] == [[4, 32], [4, 32], [2, 32]]
    stream = tokenizer("\n\n".join([TEXT] * 20))["input_ids"]
    assert torch.cat(batches).flatten().tolist() == stream[:320]
    fewer = token_batches(tokenizer, [TEXT] * 20, 64, sequence_length=32, batch_size=4)
    assert torch.equal(fewer[0], batches[0][:2])


def test_token_batches_begin_with_bos_if_the_tokenizer_adds_it() -> None:
    plain = token_batches(tiny_tokenizer(), [TEXT] * 9, 160, sequence_length=16)
    begun = token_batches(tiny_tokenizer(adds_bos=True), [TEXT] * 9, 160, sequence_length=16)
    assert (begun[0][:, 0] == 1).all()
    assert torch.cat(begun)[:, 1:].flatten().tolist() == torch.cat(plain).flatten().tolist()[:150]


def test_token_batches_read_no_more_than_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_BLOCK_CHARACTERS", 200)

    def texts() -> Iterator[str]:
        for _ in range(6):
            yield TEXT
        raise AssertionError("read too far")

    assert len(token_batches(tiny_tokenizer(), texts(), 64, sequence_length=32)[0]) == 2


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "expected 64 tokens of text for 2 rows of 32, got 0: give more text"),
        (["", ""], "got 0: give more text"),
        ([TEXT] * 2, r"got 48: give more text, or ask for 32"),
    ],
)
def test_too_little_text(texts: list[str], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        token_batches(tiny_tokenizer(), texts, 64, sequence_length=32)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((31, 32, 8), "expected num_tokens >= 32, one row, got 31"),
        ((31, 1, 8), "expected sequence_length >= 2"),
        ((64, 32, 0), "expected batch_size >= 1, got 0"),
    ],
)
def test_token_batches_refuse_numbers(numbers: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        token_batches(tiny_tokenizer(), [TEXT], *numbers)
