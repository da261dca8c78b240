"""`--tasks paper`: lm-eval's own nine tasks on rows that the test makes, scored by hand as well."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_text import TEXT, save_tiny_model, tiny_tokenizer
from typer.testing import CliRunner

from ghosted_fast.cli.app import app
from ghosted_fast.errors import SourceError
from ghosted_fast.measure.tasks import PAPER_TASKS, check_tasks, evaluate_tasks, with_flips
from ghosted_fast.surgery.cut import prune_model
from ghosted_fast.testing import tiny_model

pytestmark = pytest.mark.slow

WORDS = [word for word in dict.fromkeys(TEXT.split()) if word.isalpha()]
# A row of the data set, the question with each of its answers behind it, and the right one.
Made = tuple[dict[str, Any], list[tuple[str, str]], int]


def words(draw: random.Random, count: int) -> str:
    return " ".join(draw.choices(WORDS, k=count))


def answered(question: str, answers: list[str]) -> list[tuple[str, str]]:
    return [(question, answer) for answer in answers]


def arc(draw: random.Random, asked: str = "question") -> Made:
    question, answers, right = (
        words(draw, 5),
        [words(draw, k) for k in (1, 2, 3)],
        draw.randrange(3),
    )
    row = {asked: question, "choices": {"text": answers, "label": ["A", "B", "C"]},
           "answerKey": "ABC"[right]}  # fmt: skip
    whole = question if asked == "question_stem" else f"Question: {question}\nAnswer:"
    return row, answered(whole, answers), right


def openbookqa(draw: random.Random) -> Made:
    return arc(draw, "question_stem")


def hellaswag(draw: random.Random) -> Made:
    first, second = words(draw, 3), "the cat sat"
    endings, right = [words(draw, k) for k in (4, 3, 2, 1)], draw.randrange(4)
    row = {"ctx_a": first, "ctx_b": second, "activity_label": "mat", "endings": endings,
           "label": str(right)}  # fmt: skip
    return row, answered(f"mat: {first} The cat sat", endings), right


def winogrande(draw: random.Random) -> Made:
    before, behind, right = words(draw, 3), words(draw, 3), draw.randrange(2)
    options = draw.sample(WORDS, 2)
    row = {"sentence": f"{before} _ {behind}", "option1": options[0], "option2": options[1],
           "answer": str(right + 1)}  # fmt: skip
    return row, [(f"{before} {option}", behind) for option in options], right


def boolq(draw: random.Random) -> Made:
    passage, question, right = words(draw, 6), words(draw, 3), draw.randrange(2)
    row = {"passage": passage, "question": question, "label": right}
    return row, answered(f"{passage}\nQuestion: {question}?\nAnswer:", ["no", "yes"]), right


def rte(draw: random.Random) -> Made:
    one, other, right = words(draw, 4), words(draw, 4), draw.randrange(2)
    row = {"sentence1": one, "sentence2": other, "label": right}
    whole = f"{one}\nQuestion: {other} True or False?\nAnswer:"
    return row, answered(whole, ["True", "False"]), right


def copa(draw: random.Random) -> Made:
    premise, right = words(draw, 4), draw.randrange(2)
    choices, kind = [words(draw, 2), words(draw, 3)], draw.choice(["cause", "effect"])
    row = {"premise": f"{premise}.", "question": kind, "label": right,
           "choice1": choices[0].capitalize(), "choice2": choices[1].capitalize()}  # fmt: skip
    link = {"cause": "because", "effect": "therefore"}[kind]
    return row, answered(f"{premise} {link}", choices), right


def race(draw: random.Random) -> Made:
    article, question, right = words(draw, 8), words(draw, 3), draw.randrange(4)
    options = [words(draw, k) for k in (2, 1, 3, 2)]
    problem = {"question": question, "answer": "ABCD"[right], "options": options}
    row = {"article": article, "problems": str([problem])}
    return row, answered(f"Article: {article}\n\n{question}", options), right


MAKERS: dict[str, Callable[[random.Random], Made]] = {
    "ARC-Easy": arc, "ARC-Challenge": arc, "Rowan/hellaswag": hellaswag,
    "winogrande_xl": winogrande, "boolq": boolq, "allenai/openbookqa": openbookqa,
    "rte": rte, "copa": copa, "EleutherAI/race": race,
}  # fmt: skip
KEYS = dict(zip(PAPER_TASKS, MAKERS, strict=True))
ROWS = {key: 4 + place for place, key in enumerate(MAKERS)}


def made(key: str) -> list[Made]:
    draw = random.Random(key)
    return [MAKERS[key](draw) for _ in range(ROWS[key])]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give lm-eval made rows in the place of the hub's."""
    pytest.importorskip("lm_eval", reason="no lm_eval: pip install 'ghosted_fast[lm-eval]'")
    import datasets

    def load(path: str, name: str | None = None, **_: Any) -> Any:
        key = path if path in MAKERS else str(name)
        rows = datasets.Dataset.from_list([row for row, _, _ in made(key)])
        return datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), rows))

    monkeypatch.setattr(datasets, "load_dataset", load)


def by_hand(model: Any, key: str) -> list[bool]:
    """Return which rows a model gets right: the likeliest answer is the right one."""
    tokenizer, found = tiny_tokenizer(), []
    for _, pairs, right in made(key):
        sums = []
        for question, answer in pairs:
            asked, said = (tokenizer(text).input_ids for text in (question, answer))
            with torch.no_grad():
                chances = model(torch.tensor([asked + said])).logits[0].double().log_softmax(-1)
            places = range(len(asked) - 1, len(asked) + len(said) - 1)
            sums.append(sum(float(chances[p, t]) for p, t in zip(places, said, strict=True)))
        found.append(sums.index(max(sums)) == right)
    return found


def test_nine_tasks_and_their_mean(hub: None) -> None:
    model = tiny_model("llama", 3)
    *nine, mean = evaluate_tasks(model, tiny_tokenizer(), ["paper"], choices=True)
    assert [score.task for score in nine] == list(PAPER_TASKS)
    for score in nine:
        right = by_hand(model, KEYS[score.task])
        assert (score.metric, score.num_samples) == ("acc", len(right))
        assert score.value == pytest.approx(sum(right) / len(right)), score.task
    assert (mean.task, mean.metric, mean.num_samples) == ("paper", "mean acc", sum(ROWS.values()))
    assert mean.value == pytest.approx(sum(score.value for score in nine) / 9)
    errors = [score.stderr for score in nine if score.stderr is not None]
    assert mean.stderr == pytest.approx(math.sqrt(sum(e * e for e in errors)) / 9)
    smaller = evaluate_tasks(prune_model(model, [1]), tiny_tokenizer(), ["paper"], choices=True)
    *flipped, over_all = with_flips(smaller, [*nine, mean])
    shares = [score.flips for score in flipped if score.flips is not None]
    assert len(shares) == 9 and over_all.flips != pytest.approx(sum(shares) / 9)
    changed = sum(share * rows for share, rows in zip(shares, ROWS.values(), strict=True))
    assert over_all.flips == pytest.approx(changed / sum(ROWS.values()))
    differences = [score.difference.value for score in flipped if score.difference is not None]
    assert len(differences) == 9 and over_all.difference is not None
    assert over_all.difference.value == pytest.approx(over_all.value - mean.value)
    assert over_all.difference.value == pytest.approx(sum(differences) / 9)


def test_the_command(hub: None, tmp_path: Path) -> None:
    folder = str(save_tiny_model(tmp_path / "tiny", 2))
    other = str(save_tiny_model(tmp_path / "other", 2, seed=1))
    command = ["eval", "--model", folder, "--model", other, "--tasks", "paper", "--limit", "3"]
    done = CliRunner().invoke(app, [*command, "--json"])
    assert done.exit_code == 0, done.output
    dense, changed = json.loads(done.stdout)["models"]
    assert [score["task"] for score in dense["tasks"]] == [*PAPER_TASKS, "paper"]
    assert dense["tasks"][-1]["num_samples"] == 27 and dense["tasks"][-1]["flips"] is None
    assert changed["tasks"][-1]["flips"] > 0


def test_without_the_hub() -> None:
    pytest.importorskip("lm_eval")
    assert check_tasks(["paper", "paper", "local/quartz"]) == ["paper", "local/quartz"]
    with pytest.raises(SourceError, match=r"cannot read the data of arc_easy, arc_challenge"):
        evaluate_tasks(tiny_model("llama", 2), tiny_tokenizer(), ["paper"], limit=1)
