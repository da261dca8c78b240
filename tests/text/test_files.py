"""Files of text as people have them, and what is refused by name."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.tiny_text import TEXT, tiny_tokenizer

from ghosted_fast.errors import SourceError
from ghosted_fast.text import readers, records
from ghosted_fast.text.files import first_line
from ghosted_fast.text.loading import check_texts, load_texts, token_batches

TWO = ["one two", 'three, "four"\nfive']
ROWS = [{"id": str(i), "text": text} for i, text in enumerate(TWO)]


def as_csv(delimiter: str = ",") -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, ["id", "text"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return file.getvalue()


def as_lines() -> str:
    return "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", as_lines()),
        ("a.jsonl", "\ufeff" + as_lines()),
        ("a.jsonl", as_lines().replace("\n", "\r\n")),
        ("a.jsonl", "\n".join(json.dumps(text) for text in TWO)),
        ("a.json", json.dumps(ROWS)),
        ("a.json", json.dumps(ROWS, indent=4)),
        ("a.json", json.dumps(TWO)),
        ("a.json", json.dumps({"version": 1, "data": ROWS})),
        ("a.json", as_lines()),
        ("a.JSON", "\ufeff" + json.dumps(ROWS)),
        ("a.csv", as_csv()),
        ("a.csv", as_csv(";")),
        ("a.csv", "\ufeff" + as_csv()),
        ("a.tsv", as_csv("\t")),
        ("a.txt", '\ufeffone two\r\n\r\nthree, "four"\r\nfive\r\n'),
        ("a.txt", 'one two\r\rthree, "four"\rfive'),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_files_of_text(tmp_path: Path, name: str, content: str, encoding: str) -> None:
    path = tmp_path / name
    path.write_bytes(content.lstrip("\ufeff" if encoding == "utf-16" else "").encode(encoding))
    assert list(load_texts(path)) == TWO
    check_texts(path)


def zstd(data: bytes) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    return bytes(pyarrow.compress(data, codec="zstd", asbytes=True))


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress), ("zst", zstd)],
)
def test_compressed_files(tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]) -> None:
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(compress(as_lines().encode()))
    assert list(load_texts(path)) == TWO
    path.write_bytes(compress(as_lines().encode() * 500)[:-40])
    with pytest.raises(SourceError, match=r"to unpack, got .*: the file is damaged or incomplete"):
        list(load_texts(path))


def test_a_list_is_read_as_far_as_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "_CHUNK", 64)
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "word " * i} for i in range(40)]) + "x")
    texts = load_texts(path)
    assert [next(texts) for _ in range(40)] == ["word " * i for i in range(40)]
    with pytest.raises(SourceError, match=r"something behind the end of the list"):
        next(texts)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.json",
            '[{"text": "x"}, {"text" "y"}]',
            "record 2 .* is not JSON: .* got Expecting ':'",
        ),
        ("a.json", '[{"text": "x"} {"text": "y"}]', "record 1 .* no ',' or ']'"),
        ("a.json", '[{"text": "x"}', "record 1 .* no ',' or ']'"),
        ("a.json", '[{"text": "x', "record 1 .* is not JSON: .* got Unterminated"),
        ("a.json", '[{"text": "x"}, 3]', "record 2 .* must be a JSON object; got int"),
        ("a.json", "[" * 100000, "record 1 .* is not JSON"),
        ("a.jsonl", "[" * 100000, "line 1 .* is not JSON"),
        ("a.csv", "id,text\n1,a,b\n", "expected 2 values.* line 2 .* got 3: put"),
        ("a.csv", 'id,text\n1,"a"b\n', "line 2 .* is not CSV"),
        ("a.csv", "id,text\n1\n", r"record 1 .* no text in field 'text'; .* leave the record out"),
        ("a.jsonl", '{"text": "x"}\n{"text": null}', r"record 2 .* no text .* text \(NoneType\)"),
        ("a.jsonl", '{"text": "x"}\n{"id": 3}', r"record 2 .* no text .* id \(int\)"),
    ],
)
def test_damaged_records(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(SourceError, match=message):
        list(load_texts(path, "text" if name == "a.csv" else None))


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b"%PDF-1.7\n", "got a PDF document: take the text out of it"),
        (b"PK\x03\x04rest", "got a .docx, .zip or the like: take the text out"),
        (b"\xd0\xcf\x11\xe0", "got an old Office document"),
        (b"GGUF\x03", "got a model in GGUF: give it as the model"),
        (b"\x00\x01\x02", "got a binary file: give a .txt"),
    ],
)
@pytest.mark.parametrize("name", ["a.pdf", "a.txt", "a.jsonl", "a.csv"])
def test_what_is_no_text_is_refused_by_name(
    tmp_path: Path, name: str, head: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(head)
    with pytest.raises(SourceError, match=message):
        load_texts(path)


def test_parquet_and_arrow_files(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"id": [1, 2], "text": TWO})
    for name, new in {"a": pyarrow.ipc.new_stream, "b": pyarrow.ipc.new_file}.items():
        path = str(tmp_path / f"{name}.arrow")
        with pyarrow.OSFile(path, "wb") as file, new(file, table.schema) as writer:
            writer.write_table(table)
    assert list(load_texts(tmp_path)) == TWO * 2
    (tmp_path / "a.arrow").write_bytes(b"no arrow")
    with pytest.raises(SourceError, match=r"as arrow: expected a whole arrow file, got"):
        list(load_texts(tmp_path / "a.arrow"))


def test_folders(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    for name, content in {"README.md": "not this", ".hidden.txt": "nor", "inner/b.txt": "b",
                          "a.txt": "a", "notes.log": "nor this"}.items():  # fmt: skip
        (tmp_path / name).write_text(content)
    assert list(load_texts(tmp_path)) == ["a", "b"]
    (tmp_path / "c.csv").write_text("text\nc\n")
    with pytest.raises(SourceError, match=r"files of one kind .*, got 2 of text, 1 of csv"):
        load_texts(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SourceError, match=r"a model's folder"):
        load_texts(tmp_path)


def test_long_texts_come_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "LONGEST_TEXT", 100)
    path = tmp_path / "a.txt"
    path.write_text("x" * 1000 + "\n\nend")
    assert [len(text) for text in load_texts(path)] == [100] * 10 + [3]
    pieces = list(readers.in_pieces(["one two " * 40, "short"], 100))
    assert "".join(pieces[:-1]) == "one two " * 40
    assert all(piece.endswith(" ") and len(piece) <= 100 for piece in pieces[:-1])
    assert pieces[-1] == "short"


def test_a_tokenizer_gets_no_more_than_it_can_take() -> None:
    longest: list[int] = []

    class Slow:
        bos_token_id, is_fast = None, False

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            longest.append(len(text))
            return {"input_ids": [1] * 16}

    token_batches(Slow(), ["x" * 100_000], 64, sequence_length=32)
    assert max(longest) <= 2 * 4096 and len(longest) == 4
    longest.clear()
    Slow.is_fast = True
    token_batches(Slow(), ["x" * 10_000_000], 64, sequence_length=32)
    assert max(longest) <= 3 << 20 and len(longest) == 4


def test_halves_of_surrogates_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "{TEXT} \\ud800"}}\n' * 4)
    assert len(token_batches(tiny_tokenizer(), load_texts(path), 64, 32)[0]) == 2


def test_what_a_tokenizer_refuses_is_named() -> None:
    class Refusing:
        bos_token_id = None

        def __call__(self, text: str, **_: Any) -> Any:
            raise TypeError("TextEncodeInput must be Union[...]")

    with pytest.raises(SourceError, match=r"got TextEncodeInput .* at 'some text'") as caught:
        token_batches(Refusing(), ["some text"], 64, 32)
    assert isinstance(caught.value.__cause__, TypeError)


def test_too_little_text_is_used_where_it_suffices(caplog: pytest.LogCaptureFixture) -> None:
    batches = token_batches(tiny_tokenizer(), [TEXT] * 4, 640, 32, fewest=64)
    assert sum(len(batch) for batch in batches) == 3
    assert [record.message for record in caplog.records] == [
        "the text holds 96 of the 640 tokens that were asked for: all of it is used"
    ]
    with pytest.raises(SourceError, match=r"expected 128 tokens of text .* got 96: give more text"):
        token_batches(tiny_tokenizer(), [TEXT] * 4, 640, 32, fewest=128)


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "expected text in .*, got none"), ("\n \n", "got none"), ('{"a": 1}', "which field")],
)
def test_texts_are_looked_at_before_a_model_is_loaded(
    tmp_path: Path, content: str, message: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(SourceError, match=message):
        check_texts(path)


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("short", "short"),
        ("\nfirst\nsecond", "first"),
        ("", "ValueError"),
        ("one of " + "a name, " * 500, ("one of " + "a name, " * 500)[:240] + "..."),
    ],
)
def test_of_what_another_library_says_a_line_is_kept(said: str, kept: str) -> None:
    assert first_line(ValueError(said)) == kept
