"""Values of options: what they are read as, and what is refused."""

from __future__ import annotations

from typing import get_args

import pytest
import typer

from ghosted_fast import options
from ghosted_fast.cli._shared import values
from ghosted_fast.recovery import RECOVERIES
from ghosted_fast.selection.criteria import CRITERIA


@pytest.mark.parametrize(
    ("text", "layers"),
    [("3", [3]), ("14-18", [14, 15, 16, 17, 18]), ("8,3, 7", [3, 7, 8]), ("1-2,5-5", [1, 2, 5])],
)
def test_layers(text: str, layers: list[int]) -> None:
    assert values.parse_layers(text) == tuple(layers)


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "3,3", "2-4,3", "5-2", "1:3"])
def test_layers_are_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        values.parse_layers(text)


def test_counts() -> None:
    assert values.parse_counts("3, 5,7") == (3, 5, 7)
    for text in ("", "0", "3,", "-1", "3,five", "3-5"):
        with pytest.raises(typer.BadParameter, match="numbers above 0"):
            values.parse_counts(text)


def test_damping() -> None:
    assert values.parse_damping("auto") == "auto"
    assert values.parse_damping("1e-4") == 1e-4
    assert values.parse_damping("0") == 0.0
    for text in ("-1", "nan", "inf", "much"):
        with pytest.raises(typer.BadParameter):
            values.parse_damping(text)


def test_corrections() -> None:
    assert values.parse_corrections("auto") == "auto"
    assert values.parse_corrections("0") == 0
    for text in ("-1", "1.5", "few", ""):
        with pytest.raises(typer.BadParameter):
            values.parse_corrections(text)


def test_bounds() -> None:
    assert values.parse_increase("10%") == pytest.approx(0.1)
    assert values.parse_increase("0.05") == 0.05
    assert values.parse_speedup("1.3") == 1.3 and values.parse_speedup("1.3x") == 1.3
    for text in ("0%", "-1", "nan", "ten", "inf"):
        with pytest.raises(typer.BadParameter):
            values.parse_increase(text)
    for text in ("1", "0.5", "nan", "fast"):
        with pytest.raises(typer.BadParameter):
            values.parse_speedup(text)


def test_tasks() -> None:
    assert values.parse_tasks("local/quartz, arc_easy,") == ("local/quartz", "arc_easy")
    with pytest.raises(typer.BadParameter, match="names with commas"):
        values.parse_tasks(" ,")


def test_words() -> None:
    parse = values.one_of(values.Recovery)
    assert [parse(name) for name in get_args(values.Recovery)] == list(get_args(values.Recovery))
    with pytest.raises(typer.BadParameter, match=r"one of ghost, none.*got 'magic'"):
        parse("magic")


def test_choices_are_those_of_the_library() -> None:
    assert set(get_args(values.Criterion)) == set(CRITERIA)
    assert set(get_args(values.Recovery)) == set(RECOVERIES)
    assert values.Features == options.Features
    assert values.FirstState == options.FirstState
    assert values.TokenWeight == options.TokenWeight


@pytest.mark.parametrize(
    ("text", "count"),
    [("100k", 100_000), ("1M", 10**6), ("1_000_000", 10**6), (" 2.5k ", 2500), ("3K", 3000),
     ("0.5m", 500_000), ("7", 7), ("1e5", 100_000)],
)  # fmt: skip
def test_token_counts(text: str, count: int) -> None:
    assert values.parse_token_count(text) == count


@pytest.mark.parametrize("text", ["", "k", "0", "-1k", "1.5", "1 2k", "many", "inf", "nan", "1G"])
def test_token_counts_are_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="a number of tokens such as '100k'"):
        values.parse_token_count(text)
