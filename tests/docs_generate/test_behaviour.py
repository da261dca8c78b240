"""The tables of accuracy and generation, from a file that the test makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from docs.generate import behaviour
from ghosted_fast.measure.paired import paired_difference

TASKS = ("local/quartz", "local/knowledge")
# Of dense and of a row, each question: the answer that is chosen; the right one is always 1.
DENSE, OTHER = ("1101", "0123"), ("1021", "2123")


def asked(chosen: tuple[str, ...]) -> dict[str, Any]:
    return {
        task: {"metric": "acc", "chosen": answers, "right": right(answers)}
        for task, answers in zip(TASKS, chosen, strict=True)
    }


def right(answers: str) -> str:
    return "".join(str(int(answer == "1")) for answer in answers)


def point(row: str, remove: int, **more: Any) -> dict[str, Any]:
    likeness = {"agreement": 0.812, "divergence": 0.3456, "parts_after": 7.5, "never_parts": 0.25}
    likeness |= {"num_tokens": 2000, "num_prompts": 32, "new_tokens": 64}
    return {
        "row": row, "remove": remove, "criterion": "sleb", "recovery": "nbl",
        "removed": list(range(4, 4 + remove)), "tasks": asked(OTHER), "fidelity": likeness,
        "problems": {"copying": "1000"}, **more,
    }  # fmt: skip


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = {
        "name": "Tiny", "layers": 30, "template": True,
        "chance": {"local/quartz": 0.5, "local/knowledge": 0.25},
        "dense": {"tasks": asked(DENSE), "problems": {"copying": "1110"}},
        "points": [
            point("healed", 7, learned=98304), point("published", 7),
            point("ours", 5), point("nothing", 5),
        ],
    }  # fmt: skip
    model["points"][2]["fidelity"] |= {"parts_after": None}
    started = {"name": "Started", "points": []}
    content = {"models": {"tiny": model, "started": started}}
    (tmp_path / "behaviour.json").write_text(json.dumps(content))
    monkeypatch.setattr(behaviour, "RESULTS", tmp_path)


def cells(text: str) -> list[list[str]]:
    lines = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("|")]
    return lines[2:]


def test_accuracy(made: None) -> None:
    shown = behaviour.accuracy()
    assert shown.startswith("**Tiny.** Questions: 4 of quartz, 4 of knowledge.\n")
    assert "Started" not in shown
    chance, dense, *rows = cells(shown)
    assert chance[2:] == ["chance", "50.0", "25.0", "37.5", ""]
    assert dense[2:] == ["dense", "75.0", "25.0", "50.0", ""]
    assert [row[:3] for row in rows] == [
        ["5 of 30", "4-8", "nothing"],
        ["5 of 30", "4-8", "ours"],
        ["7 of 30", "4-10", "best published pair: sleb + nbl"],
        ["7 of 30", "4-10", "ours, healed on 98,304 tokens"],
    ]
    # Two of four quartz answers are others, of knowledge one wrong answer became another.
    assert rows[0][-1] == "37.5"
    one = paired_difference([[1, 0, 0, 1]], [[1, 1, 0, 1]])
    assert rows[0][3] == f"50.0 ({100 * one.low:+.1f} to {100 * one.high:+.1f})"
    assert one.low < one.high == 0
    assert rows[0][4] == "25.0 (+0.0 to +0.0)"
    assert rows[0][5].startswith("37.5 (")


def test_generation(made: None) -> None:
    shown = behaviour.generation()
    assert "32 prompts through the chat template, 2,000 tokens of answers of up to 64" in shown
    assert "4 problems of each kind" in shown
    dense, nothing, ours, *_ = cells(shown)
    assert dense[-1] == "75.0"
    assert nothing[3:7] == ["81.2", "0.346", "7.5", "25"]
    assert ours[5] == "over 64"
    low, high = (100 * end for end in (-1.0, 0.0))
    assert nothing[7] == f"25.0 ({low:+.1f} to {high:+.1f})"


def test_without_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(behaviour, "RESULTS", tmp_path)
    assert behaviour.accuracy() == behaviour.generation() == "Not measured yet.\n"


def test_every_row_of_the_program_has_a_label(monkeypatch: pytest.MonkeyPatch) -> None:
    from support.benchmark_module import load_benchmark

    assert list(load_benchmark("behaviour_table", monkeypatch).ROWS) == list(behaviour.LABELS)
