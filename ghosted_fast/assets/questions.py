"""Multiple-choice questions that need no hub: sets out of package evals, as files of lm-eval.

Each set becomes a JSONL file of questions and a YAML file, the task. The answer's text is scored,
not its letter: small models know few letters.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ghosted_fast.errors import SourceError

PREFIX = "local/"
_LETTERS = "ABCDE"


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        prompt: All that stands before the answer.
        choices: The answers to choose from.
        answer: Index of the right one.
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class QuestionSet:
    """A set of questions in package evals.

    Attributes:
        member: Its file, below `evals/registry/data`.
        mark: What stands before an answer, with {} for its letter.
        prompt: What the model reads, with {} for the question.
        end: Where the answers end, or "" where they end with the text.
        metric: Of lm-eval: "acc" chooses the answer of the highest log-likelihood, "acc_norm" that
            of the highest per character. The latter where answers differ in length.
        tidy: What is done to a question, and to an answer.
    """

    member: str
    mark: str
    prompt: str
    metric: str
    end: str = ""
    tidy: Callable[[str], str] = str.strip


def _without_letter(text: str) -> str:
    """Drop the letter that is repeated ("A.It rains"), and the word that heads the text."""
    text = text.strip().removeprefix("Passage: ").replace("Question: ", "\nQuestion: ")
    return text[2:].strip() if text[1:2] == "." and text[:1] in _LETTERS else text


SETS = {
    "socialiqa": QuestionSet(
        "theory_of_mind/socialiqa/test.jsonl",
        " {}: ",
        "{}\nAnswer:",
        "acc",
        tidy=lambda text: text.strip().rstrip(".;"),
    ),
    "quartz": QuestionSet("quartz/samples.jsonl", "\n {}: ", "{}", "acc"),
    "parables": QuestionSet(
        "parable-to-moral-match/parable-to-moral-match-en.jsonl",
        "{}) ",
        "{}\nThe moral of this story:",
        "acc_norm",
        end="\nThe output should look like",
        tidy=lambda text: text.partition("\nWhich moral")[0].strip(),
    ),
    "logiqa": QuestionSet(
        "logiqa/logiqa.jsonl",
        "\n{}. ",
        "{}\nAnswer:",
        "acc_norm",
        end="\nAnswer:",
        tidy=_without_letter,
    ),
    "knowledge": QuestionSet(
        "sandbagging/samples-all-large.jsonl",
        "\n{}. ",
        "Question: {}\nAnswer:",
        "acc",
        end="\nAnswer:",
    ),
}


def read_questions(path: Path, name: str) -> Iterator[Question]:
    """Read a set's questions, each once.

    Args:
        path: The file, as package evals has it.
        name: Of the set, a key of `SETS`.

    Raises:
        SourceError: A record is no question with its answers and the letter of the right one.
    """
    kind = SETS[name]
    seen: set[str] = set()
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            text, ideal = _record(json.loads(line))
            if text in seen:
                continue
            seen.add(text)
            question, *choices = _split(text.partition(kind.end)[0] if kind.end else text, kind)
            answer = _LETTERS.find(ideal)
            if not (len(choices) >= 2 and 0 <= answer < len(choices)):
                raise SourceError(
                    f"line {number} of {str(path)!r} is no multiple-choice question: found "
                    f"{len(choices)} answers, and {ideal!r} as the right one"
                )
            yield Question(kind.prompt.format(question), tuple(choices), answer)


def write_tasks(folder: Path, sources: dict[str, Path]) -> None:
    """Write the questions and tasks of sets into a folder, for lm-eval's `include_path`.

    Args:
        folder: An existing folder.
        sources: The file of each set that is wanted, by its name.
    """
    for name, source in sources.items():
        data = folder / f"{name}.jsonl"
        with data.open("w", encoding="utf-8") as target:
            for item in read_questions(source, name):
                record = {"prompt": item.prompt, "choices": item.choices, "answer": item.answer}
                target.write(f"{json.dumps(record)}\n")
        task = {
            "task": PREFIX + name,
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str(data)},
                "cache_dir": str(folder / "cache"),
            },
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "prompt",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "metric_list": [
                {"metric": SETS[name].metric, "aggregation": "mean", "higher_is_better": True}
            ],
            "metadata": {"version": 1.0},
        }
        # JSON is YAML.
        (folder / f"{name}.yaml").write_text(json.dumps(task, indent=2), encoding="utf-8")


def _record(record: dict[str, Any]) -> tuple[str, str]:
    """Return a record's question with its answers, and the letter of the right one."""
    if "question" in record:
        return record["question"], record["answer"]
    ideal = record["ideal"][0] if isinstance(record["ideal"], list) else record["ideal"]
    return record["input"][-1]["content"], ideal[-1:]


def _split(text: str, kind: QuestionSet) -> list[str]:
    """Return the question and its answers."""
    parts = []
    for letter in _LETTERS:
        mark = kind.mark.format(letter)
        if mark not in text:
            break
        part, _, text = text.partition(mark)
        parts.append(kind.tidy(part))
    return [*parts, kind.tidy(text)]
