"""What models are asked: built in or out of files, and through the chat template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.tiny_text import tiny_tokenizer

from ghosted_fast.errors import SourceError
from ghosted_fast.measure.prompts import QUESTIONS, read_questions
from ghosted_fast.text.chat import prompt_tokens

TEMPLATE = (
    "{% for m in messages if m.role == 'user' %}the {{ m.content }} . {% endfor %}"
    "{% if add_generation_prompt %}bird{% endif %}"
)


def test_questions_differ() -> None:
    assert len(set(QUESTIONS)) == len(QUESTIONS) == 32


def test_texts_and_first_questions_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "asked.jsonl"
    said = [("system", "be kind"), ("user", "why?"), ("assistant", "so"), ("user", "and?")]
    talk = [{"role": role, "content": content} for role, content in said]
    records = [{"messages": talk}, {"prompt": "how?", "completion": "thus"}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert read_questions(str(path)) == ["why?", "how?"]
    path.write_text("".join(json.dumps({"text": f" {i} " + "x" * 3000}) + "\n" for i in range(99)))
    found = read_questions(str(path))
    assert len(found) == 64 and found[3].startswith("3 x") and len(found[3]) == 2000
    assert len(read_questions(str(path), most=2)) == 2


def test_a_file_without_questions(tmp_path: Path) -> None:
    path = tmp_path / "asked.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "assistant", "content": "so"}]}) + "\n")
    with pytest.raises(SourceError, match="expected texts to ask"):
        read_questions(str(path))


def test_the_chat_template_is_around_a_question() -> None:
    tokenizer = tiny_tokenizer(adds_bos=True)
    plain = prompt_tokens(tokenizer, "cat sat")
    assert tokenizer.convert_ids_to_tokens(plain) == ["<s>", "cat", "sat"]
    tokenizer.chat_template = TEMPLATE
    asked = prompt_tokens(tokenizer, "cat sat")
    assert tokenizer.convert_ids_to_tokens(asked) == ["the", "cat", "sat", ".", "bird"]


def test_a_template_that_refuses() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no users here') }}"
    with pytest.raises(SourceError, match="no users here"):
        prompt_tokens(tokenizer, "cat")
