"""What was called otherwise before ends with status 2 and the new name."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from ghosted_fast.cli.app import app


def told(*arguments: str) -> str:
    """Run the command line, expect that it is wrong, and return what it says."""
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    return " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.parametrize("verb", ["fit", "select", "grid", "demo"])
@pytest.mark.parametrize("value", [("--num-layers", "5"), ("--num-layers=5",)])
def test_num_layers(verb: str, value: tuple[str, ...]) -> None:
    said = told(verb, "--overwrite", *value)
    new = "No such option: --num-layers. It is --remove now (how many layers to take out)"
    assert new + ("; which ones is --removed." if verb == "fit" else ".") in said


@pytest.mark.parametrize("verb", ["fit", "select", "grid"])
@pytest.mark.parametrize("value", [("--input", "hidden"), ("--input=normed",)])
def test_input(verb: str, value: tuple[str, ...]) -> None:
    said = told(verb, *value, "--model", "m")
    assert "No such option: --input. It is --features now: normed, or raw for" in said


@pytest.mark.parametrize("verb", ["fit", "select", "grid"])
@pytest.mark.parametrize("value", [("--features", "hidden"), ("--features=hidden",)])
def test_hidden_features(verb: str, value: tuple[str, ...]) -> None:
    assert "'--features': 'hidden' is called 'raw' now." in told(verb, "--model", "m", *value)


def test_compare() -> None:
    assert "No such command 'compare'. It is 'grid' now" in told("compare", "--model", "m")
    assert "No such command 'compare'. It is 'grid' now" in told("compare", "--help")


@pytest.mark.parametrize("option", ["--num-layers", "--input"])
def test_verbs_that_never_had_an_option_know_of_no_other(option: str) -> None:
    for verb in ("bench", "doctor"):
        said = told(verb, option, "5")
        assert f"No such option: {option}" in said and " now" not in said


def test_old_words_may_be_values() -> None:
    said = told("fit", "--model=m", "--calibration=c", "--removed=1", "--field", "hidden")
    assert "expected a folder for the checkpoint" in said


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (("fit", "--remov", "3"), "--remove"),
        (("select", "--critrion", "ghost"), "--criterion"),
        (("grid", "--recoveries", "ghost"), "--recovery"),
        (("gri",), "grid"),
    ],
)
def test_the_nearest_name_is_told_of_a_typing_mistake(
    arguments: tuple[str, ...], meant: str
) -> None:
    said = told(*arguments)
    assert "No such" in said and meant in said


@pytest.mark.parametrize("verb", ["fit", "grid"])
@pytest.mark.parametrize("value", [("--refine", "48"), ("--refine=48",)])
def test_refine(verb: str, value: tuple[str, ...]) -> None:
    said = told(verb, "--model", "m", *value)
    assert "No such option: --refine. It is --heal now (how many tokens to train on" in said
