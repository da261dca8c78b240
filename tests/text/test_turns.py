"""Conversations that a model writes itself, through a chat template."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.tiny_text import tiny_tokenizer
from transformers import LlamaForCausalLM

from ghosted_fast.errors import ArgumentError, SourceError
from ghosted_fast.testing import tiny_model
from ghosted_fast.text.generation import generate_texts
from ghosted_fast.text.turns import Turns

SYSTEM, USER, END, ANSWER = "w0", "w1", "w2", "w3"
TEMPLATE = (
    "{{ bos_token }}w0 {% for m in messages %}w1 {{ m.content }} w2 {% endfor %}"
    "{% if add_generation_prompt %}w3 {% endif %}"
)
UNUSABLE = {
    "refuses": "{{ raise_exception('roles must alternate') }}",
    "opens no answer": "w1 {% for m in messages %}{{ m.content }}{% endfor %}",
    "leaves it out": "w1 w2 w3",
    "writes it twice": TEMPLATE.replace("{{ m.content }}", "{{ m.content }} {{ m.content }}"),
}


def chatting(template: str | None = TEMPLATE, adds_bos: bool = True) -> Any:
    tokenizer = tiny_tokenizer(adds_bos)
    tokenizer.eos_token = END
    tokenizer.chat_template = template
    return tokenizer


def id_of(word: str) -> int:
    return int(tiny_tokenizer().convert_tokens_to_ids(word))


@pytest.fixture
def drawn_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what makes a model draw words by given logits, and the tokens that it was given."""

    def force(model: Any, logits: dict[str, float]) -> list[torch.Tensor]:
        forward, seen = LlamaForCausalLM.forward, []
        wanted = torch.full((model.config.vocab_size,), -torch.inf)
        for word, value in logits.items():
            wanted[id_of(word)] = value

        def biased(self: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(kwargs["input_ids"].clone())
            output = forward(self, *args, **kwargs)
            output.logits = wanted.expand(len(output.logits), 1, -1)
            return output

        monkeypatch.setattr(type(model), "forward", biased)
        return seen

    return force


def test_a_question_and_its_answer_stand_as_the_template_has_them(drawn_of: Any) -> None:
    model = tiny_model("llama", 2)
    seen = drawn_of(model, {"cat": 0.0, "dog": 0.0, END: 0.0})
    texts = list(generate_texts(model, chatting(), 2000, sequence_length=12, batch_size=400))
    assert len(texts) > 200
    asked, answered = [], []
    for text in texts:
        before, _, behind = text.partition(f" {END} {ANSWER}")
        system, user, *question = before.split()
        assert (system, user) == (SYSTEM, USER) and {*question} <= {"cat", "dog"}
        *answer, last = behind.split()
        assert {*answer} <= {"cat", "dog"} and "<s>" not in text
        assert last == END or len(question) + len(answer) + 1 == 12
        asked.append(len(question))
        answered.append(len(answer) if last == END else 12)
    # A question of no words is left out, one of six is at an end; an answer may be empty.
    assert min(asked) == 1 and max(asked) == 6
    assert asked.count(1) / len(asked) == pytest.approx(1 / 3, abs=0.09)
    assert answered.count(0) / len(answered) == pytest.approx(1 / 3, abs=0.09)
    assert answered.count(1) / len(answered) == pytest.approx(2 / 9, abs=0.09)
    assert seen[0].shape == (400, 3)


def test_conversations_repeat_and_leave_the_random_state_alone() -> None:
    model, tokenizer = tiny_model("llama", 2), chatting()
    before = torch.random.get_rng_state()
    texts = list(generate_texts(model, tokenizer, 300, 24, 3, seed=5))
    assert torch.equal(before, torch.random.get_rng_state())
    assert len(set(texts)) == len(texts) and all(text.startswith("w0 w1 ") for text in texts)
    assert texts == list(generate_texts(model, tokenizer, 300, 24, 3, seed=5, chat=True))
    assert texts != list(generate_texts(model, tokenizer, 300, 24, 3, seed=6))


def test_each_temperature_has_as_many_rows(drawn_of: Any) -> None:
    model = tiny_model("llama", 2)
    drawn_of(model, {"cat": 0.0, "dog": 1.0})
    texts = list(generate_texts(model, chatting(), 4000, 10, 400, temperatures=(1.0, 0.5)))[:400]
    for start, odds in ((0, 1.0), (1, 2.0)):
        words = " ".join(texts[start::2]).split()
        share = words.count("dog") / (words.count("dog") + words.count("cat"))
        assert share == pytest.approx(1 / (1 + 2.718281828**-odds), abs=0.04)
    assert {len(text.split()) for text in texts} == {14}, "none ends, and half is the question"


@pytest.mark.parametrize("in_template", [True, False])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_bos_stands_once(drawn_of: Any, in_template: bool, adds_bos: bool) -> None:
    model = tiny_model("llama", 2)
    seen = drawn_of(model, {"cat": 0.0})
    template = TEMPLATE if in_template else TEMPLATE.removeprefix("{{ bos_token }}")
    tokenizer = chatting(template, adds_bos)
    text = next(iter(generate_texts(model, tokenizer, 10, 4, 2)))
    begin = [1] if in_template or adds_bos else []
    assert seen[0].tolist() == [[*begin, id_of(SYSTEM), id_of(USER)]] * 2
    # Rows of tokens begin with it where the tokenizer adds it, and the text has it where not.
    assert text.count("<s>") == int(in_template and not adds_bos)


def test_what_a_configuration_ends_with_ends_turns_too(drawn_of: Any) -> None:
    model, tokenizer = tiny_model("llama", 2), chatting()
    tokenizer.eos_token = None
    drawn_of(model, {"cat": 0.0, "w7": 0.0, "w8": 0.0})
    model.generation_config.eos_token_id = [id_of("w7"), id_of("w8")]
    for text in generate_texts(model, tokenizer, 500, 12, 100):
        question, _, answer = text.partition(f" {END} {ANSWER}")
        assert set(question.split()) == {SYSTEM, USER, "cat"}
        assert not {"w7", "w8"} & set(answer.split()[:-1])


def test_a_word_that_ends_the_users_turn_does_not_end_the_answer() -> None:
    tokenizer = chatting(TEMPLATE.replace("w2", "sat on"))
    turns = Turns.of(SimpleNamespace(), tokenizer)
    assert turns.closing == tuple(map(id_of, ("sat", "on", ANSWER)))
    assert turns.ends == {id_of(END)}


@pytest.mark.parametrize("template", UNUSABLE.values(), ids=UNUSABLE)
def test_a_template_that_opens_no_turns(template: str, caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = tiny_model("llama", 2), chatting(template)
    plain = list(generate_texts(model, tokenizer, 100, 12, 4, chat=False))
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert plain == list(generate_texts(model, tokenizer, 100, 12, 4))
    [warning] = caplog.records
    assert "plain text and no conversations: expected the tokenizer's chat" in warning.getMessage()
    with pytest.raises(SourceError, match="take it off the tokenizer"):
        list(generate_texts(model, tokenizer, 100, 12, 4, chat=True))


def test_without_a_template_and_without_a_question() -> None:
    model = tiny_model("llama", 2)
    plain = list(generate_texts(model, chatting(None), 100, 12, 4))
    assert plain == list(generate_texts(model, chatting(), 100, 12, 4, chat=False))
    with pytest.raises(ArgumentError, match="chat template for chat=True, got one without"):
        list(generate_texts(model, chatting(None), 100, 12, 4, chat=True))


def test_a_model_that_asks_nothing_is_told(drawn_of: Any) -> None:
    model = tiny_model("llama", 2)
    drawn_of(model, {END: 0.0})
    with pytest.raises(SourceError, match="own text is empty after 0 of 100 tokens"):
        list(generate_texts(model, chatting(), 100, 12, 4))
