"""Conversations in records become what the tokenizer's chat template makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.tiny_text import tiny_tokenizer

from ghosted_fast.errors import SourceError
from ghosted_fast.text.loading import check_texts, load_texts

TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
SAID = "[user] hi [assistant] yes "


def chatting(template: str | None = TEMPLATE, adds_bos: bool = True) -> Any:
    tokenizer = tiny_tokenizer(adds_bos)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ({"id": "a", "messages": MESSAGES}, None),
        ({"prompt": "hi", "messages": MESSAGES}, None),
        ({"talk": MESSAGES}, "talk"),
        ({"conversations": [{"from": "human", "value": "hi"},
                            {"from": "gpt", "value": "yes"}]}, None),
        ({"messages": [{"role": "USER", "content": [{"type": "text", "text": "hi"}]},
                       MESSAGES[1]]}, None),
        ({"prompt": "hi", "completion": "yes"}, None),
        ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, None),
        ({"instruction": "hi", "input": "", "output": "yes"}, None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_conversations(tmp_path: Path, record: dict, field: str | None, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        try:
            table = pyarrow.Table.from_pylist([record, record])
        except pyarrow.ArrowInvalid:
            pytest.skip("a column of two types")
        parquet.write_table(table, path)
    else:
        path.write_text(json.dumps(record) + "\n" + json.dumps(record))
    assert list(load_texts(path, field, tokenizer=chatting())) == [SAID] * 2
    check_texts(path, field)


def test_a_field_of_text_comes_first(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "plain", "messages": MESSAGES}))
    assert list(load_texts(path)) == ["plain"]


def test_without_a_template_it_is_plain_text(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text((json.dumps({"messages": MESSAGES}) + "\n") * 2)
    assert list(load_texts(path, tokenizer=chatting(None))) == ["hi\n\nyes"] * 2
    [warning] = caplog.records
    assert "the tokenizer has no chat template: the messages are read as plain" in warning.message


def test_a_bos_token_that_is_not_added_is_the_templates(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": MESSAGES}))
    tokenizer = chatting(adds_bos=False)
    assert list(load_texts(path, tokenizer=tokenizer)) == ["<s>" + SAID]
    tokenizer.bos_token = "[user]"
    tokenizer.chat_template = TEMPLATE.removeprefix("{{ bos_token }}")
    assert list(load_texts(path, tokenizer=tokenizer)) == [SAID], "it opens a turn"


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"messages": None}, r"record 2 .* no conversation .* messages \(NoneType\)"),
        ({"messages": [{"role": "user", "content": None}]}, "record 2 .* message 1 has no content"),
        ({"messages": [{"content": "hi"}]}, "record 2 .* message 1 has no role"),
        ({"messages": [*MESSAGES, "yes"]}, "record 2 .* message 3 is of type str"),
        ({"text": "plain"}, r"record 2 .* text \(str\)"),
    ],
)
def test_damaged_conversations(tmp_path: Path, second: dict, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": MESSAGES}) + "\n" + json.dumps(second))
    with pytest.raises(SourceError, match=message):
        list(load_texts(path, tokenizer=chatting()))


def test_a_template_that_refuses_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": MESSAGES}))
    with pytest.raises(SourceError, match=r"record 1 .* chat template, got roles must alternate"):
        list(load_texts(path, tokenizer=chatting("{{ raise_exception('roles must alternate') }}")))
    with pytest.raises(SourceError, match=r"got none; pass tokenizer=\.\.\. to load_texts"):
        list(load_texts(path))
