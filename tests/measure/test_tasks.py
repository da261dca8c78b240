"""Accuracy through lm-evaluation-harness, end to end on a tiny model; no hub is needed."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_text import TEXT, save_tiny_model, tiny_tokenizer
from typer.testing import CliRunner

from ghosted_fast.cli.app import app
from ghosted_fast.errors import ArgumentError, MissingExtraError, SourceError
from ghosted_fast.measure import tasks
from ghosted_fast.measure.paired import paired_difference
from ghosted_fast.measure.tasks import (
    LOCAL_TASKS,
    TaskScore,
    accuracy,
    check_tasks,
    evaluate_tasks,
    with_flips,
)
from ghosted_fast.pipeline import ghost_model
from ghosted_fast.surgery.cut import prune_model
from ghosted_fast.testing import random_tokens, tiny_model

pytestmark = pytest.mark.slow

WORDS = list(dict.fromkeys(TEXT.split()))
COUNT = 12


@pytest.fixture
def questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str], int]]:
    """Put small sets of words in the place of the real ones; return the questions."""
    pytest.importorskip("lm_eval", reason="no lm_eval: pip install 'ghosted_fast[lm-eval]'")
    draw = random.Random(0)
    items = [
        (" ".join(draw.choices(WORDS, k=6)), draw.sample(WORDS, 2), draw.randrange(2))
        for _ in range(COUNT)
    ]
    path = tmp_path / "quartz.jsonl"
    records = (
        {"input": [{"content": f"{text}\n A: {one}\n B: {two}"}], "ideal": "AB"[answer]}
        for text, (one, two), answer in items
    )
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    monkeypatch.setattr(tasks, "fetch_questions", lambda: {"quartz": path})
    return items


def direct_accuracy(model: Any, tokenizer: Any, questions: list) -> float:
    """Return the share of questions whose right word is the likelier one."""
    right = 0
    for prompt, choices, answer in questions:
        tokens = tokenizer(prompt, return_tensors="pt").input_ids
        words = [tokenizer(word).input_ids[0] for word in choices]
        with torch.inference_mode():
            logits = model(tokens).logits[0, -1]
        right += int(logits[words].argmax()) == answer
    return right / len(questions)


def test_accuracy_of_dense_and_ghosted(questions: list) -> None:
    model, tokenizer = tiny_model("llama", 6).train(), tiny_tokenizer()
    batches = [random_tokens(8, 64, seed=seed) for seed in range(4)]
    ghosted, _ = ghost_model(model.eval(), batches, removed=[2, 3])
    model.train()
    for item in (model, ghosted):
        training = item.training
        (score,) = evaluate_tasks(item, tokenizer, ["local/quartz"])
        expected = direct_accuracy(item.eval(), tokenizer, questions)
        item.train(training)
        assert score.value == pytest.approx(expected)
        assert score.stderr == pytest.approx((expected * (1 - expected) / (COUNT - 1)) ** 0.5)
        assert (score.metric, score.num_samples) == ("acc", COUNT)
    assert model.training
    assert accuracy(model, tokenizer, ["local/quartz"], limit=4) == {
        "local/quartz": pytest.approx(direct_accuracy(model.eval(), tokenizer, questions[:4]))
    }


def chosen(model: Any, tokenizer: Any, questions: list) -> list[int]:
    """Return the likelier word of each question."""
    found = []
    for prompt, choices, _ in questions:
        tokens = tokenizer(prompt, return_tensors="pt").input_ids
        words = [tokenizer(word).input_ids[0] for word in choices]
        with torch.inference_mode():
            found.append(int(model(tokens).logits[0, -1][words].argmax()))
    return found


def test_answers_that_flip(questions: list) -> None:
    dense, tokenizer = tiny_model("llama", 6), tiny_tokenizer()
    smaller = prune_model(dense, [1, 2, 3])
    (own,), (other,) = (
        evaluate_tasks(model, tokenizer, ["local/quartz"], choices=True)
        for model in (smaller, dense)
    )
    ours, theirs = (chosen(model, tokenizer, questions) for model in (smaller, dense))
    assert list(own.choices or ()) == ours and list(other.choices or ()) == theirs
    (score,) = with_flips([own], [other])
    flips = sum(a != b for a, b in zip(ours, theirs, strict=True)) / COUNT
    assert 0 < flips == score.flips
    assert with_flips([other], [other])[0].flips == 0.0
    assert "choices" not in score.to_dict() and score.to_dict()["flips"] == flips
    assert list(own.right or ()) == [a == b for a, (_, _, b) in zip(ours, questions, strict=True)]
    assert score.difference == paired_difference([own.right or ()], [other.right or ()])
    assert score.difference.value == pytest.approx(own.value - other.value)
    assert score.to_dict()["difference"]["num_samples"] == COUNT and "right" not in score.to_dict()


def test_the_answer_of_the_highest_likelihood_per_character_is_chosen() -> None:
    sample = {
        "filtered_resps": [(-8.0, False), (-9.0, False)],
        "arguments": [("the", " cat"), ("the", " elephant")],
    }
    assert tasks._choices([sample], "acc") == (0,)
    assert tasks._choices([sample], "acc_norm") == (1,)
    assert tasks._choices([{**sample, "filtered_resps": ["a text"]}], "exact_match") is None
    assert tasks._choices(None, "acc") is None


def test_a_mean_is_compared_where_all_its_parts_are_known() -> None:
    def scores(right: tuple[bool, ...], last: tuple[bool, ...] | None) -> list[TaskScore]:
        parts = [
            TaskScore(name, "acc", 0.5, None, 2, choices=(0, 1), right=right)
            for name in tasks.PAPER_TASKS
        ]
        mean = TaskScore(tasks.PAPER, "mean acc", 0.5, None, 2 * len(parts))
        another = replace(parts[0], task="piqa", right=tuple(not item for item in right))
        return [another, *parts[:-1], replace(parts[-1], right=last), mean]

    dense = scores((True, True), (True, True))
    *_, whole = with_flips(scores((True, False), (False, False)), dense)
    assert whole.difference is not None
    assert whole.difference.value == pytest.approx(-(8 * 0.5 + 1) / 9)
    *_, last, partial = with_flips(scores((True, False), None), dense)
    assert last.difference is None and partial.difference is None
    assert last.flips == partial.flips == 0.0


def test_right_or_wrong_is_the_metrics_word() -> None:
    samples = [{"acc": 1.0, "acc_norm": 0.0, "f1": 0.4}, {"acc": False, "acc_norm": True}]
    assert tasks._right(samples, "acc") == (True, False)
    assert tasks._right(samples, "acc_norm") == (False, True)
    assert tasks._right(samples, "f1") is None


def test_eval_prints_scores(tmp_path: Path, questions: list) -> None:
    folder = str(save_tiny_model(tmp_path / "tiny"))
    command = ["eval", "--model", folder, "--tasks", "local/quartz", "--limit", "5"]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0, shown.output
    assert "local/quartz (acc)" in shown.stdout
    assert "±" in shown.stdout
    printed = CliRunner().invoke(app, [*command, "--json"])
    (record,) = json.loads(printed.stdout)["models"]
    assert record["perplexity"] is None
    assert record["tasks"][0]["num_samples"] == 5


def test_eval_prints_differences(tmp_path: Path, questions: list) -> None:
    folders = [save_tiny_model(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    command = ["eval", "--model", str(folders[0]), "--model", str(folders[1])]
    command += ["--tasks", "local/quartz"]
    record = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)["models"][1]
    found = record["tasks"][0]["difference"]
    shown = CliRunner().invoke(app, command, env={"COLUMNS": "200"}).stdout
    said = f"{100 * found['value']:+.1f} ({100 * found['low']:+.1f} to {100 * found['high']:+.1f})"
    assert found["low"] < found["high"] and said in shown
    assert "Score less that of" in shown


def test_eval_needs_something_to_measure(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["eval", "--model", "tiny"], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert "expected one of the three or more" in result.output


def test_help_names_the_tasks() -> None:
    shown = CliRunner().invoke(app, ["eval", "--help"], env={"COLUMNS": "400"}).stdout
    assert all(task in shown for task in LOCAL_TASKS)


def test_unknown_task() -> None:
    pytest.importorskip("lm_eval")
    assert check_tasks(["local/quartz", "local/quartz"]) == ["local/quartz"]
    with pytest.raises(ArgumentError, match=r"no task 'local/quarz'.* like it") as caught:
        check_tasks(["local/quarz"])
    assert all(task in str(caught.value) for task in LOCAL_TASKS)
    with pytest.raises(ArgumentError, match="expected tasks, got none"):
        check_tasks([])


def test_data_that_cannot_be_reached() -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(SourceError, match=r"cannot read the data of arc_easy.*local/quartz"):
        evaluate_tasks(tiny_model("llama", 2), tiny_tokenizer(), ["arc_easy"], limit=1)


def test_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'ghosted_fast\[lm-eval\]'"):
        check_tasks(["local/quartz"])


def test_numbers_are_checked() -> None:
    pytest.importorskip("lm_eval")
    for name in ("limit", "batch_size"):
        with pytest.raises(ArgumentError, match=f"expected {name} >= 1, got 0"):
            evaluate_tasks(None, None, ["local/quartz"], **{name: 0})
