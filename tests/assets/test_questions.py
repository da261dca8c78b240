"""Multiple-choice sets out of their files, and the tasks that are made of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ghosted_fast.assets.questions import SETS, Question, read_questions, write_tasks
from ghosted_fast.errors import SourceError

RECORDS = {
    "socialiqa": (
        "Jo ran. Why? A: to be late; B: for fun; C: no idea.",
        "B",
        Question("Jo ran. Why?\nAnswer:", ("to be late", "for fun", "no idea"), 1),
    ),
    "quartz": (
        "More heat makes it\n\n A: colder\n B: warmer",
        "B",
        Question("More heat makes it", ("colder", "warmer"), 1),
    ),
    "parables": (
        "A fox.\nWhich moral is meant?\nA) Wait. B) Run.\nThe output should look like A.",
        ["The final answer is: A"],
        Question("A fox.\nThe moral of this story:", ("Wait.", "Run."), 0),
    ),
    "logiqa": (
        "\nPassage: It rains.Question: What follows?\nA. A.Sun.\nB. B.Wet.\nC. C.Dry.\nAnswer:",
        "C",
        Question("It rains.\nQuestion: What follows?\nAnswer:", ("Sun.", "Wet.", "Dry."), 2),
    ),
}


def write(path: Path, *records: dict) -> Path:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", SETS)
def test_each_form_is_read_once(tmp_path: Path, name: str) -> None:
    if name == "knowledge":
        record = {"question": "7 + 1?\n\nA. 8\nB. 9\nAnswer:", "answer": "A"}
        expected = Question("Question: 7 + 1?\nAnswer:", ("8", "9"), 0)
    else:
        text, ideal, expected = RECORDS[name]
        record = {"input": [{"content": "Choose."}, {"content": text}], "ideal": ideal}
    path = write(tmp_path / "a.jsonl", record, record)
    assert list(read_questions(path, name)) == [expected]


@pytest.mark.parametrize(("text", "ideal"), [("No answers", "A"), ("It is\n A: x\n B: y", "C")])
def test_what_is_no_question_is_refused(tmp_path: Path, text: str, ideal: str) -> None:
    path = write(tmp_path / "a.jsonl", {"input": [{"content": text}], "ideal": ideal})
    with pytest.raises(SourceError, match=r"line 1 of .* is no multiple-choice question: found"):
        list(read_questions(path, "quartz"))


def test_tasks_are_files_of_questions(tmp_path: Path) -> None:
    text, ideal, expected = RECORDS["quartz"]
    source = write(tmp_path / "source.jsonl", {"input": [{"content": text}], "ideal": ideal})
    folder = tmp_path / "tasks"
    folder.mkdir()
    write_tasks(folder, {"quartz": source})
    task = json.loads((folder / "quartz.yaml").read_text())
    assert task["task"] == "local/quartz"
    (line,) = Path(task["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()
    assert json.loads(line) == {
        "prompt": expected.prompt,
        "choices": list(expected.choices),
        "answer": expected.answer,
    }
