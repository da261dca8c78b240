"""`fit --recipe`: the same model again, what the command line changes, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from ghosted_fast.checkpoint.recipe import RECIPE, read_recipe
from ghosted_fast.cli._shared.fit_args import HowManyArgs, RecipeArgs
from ghosted_fast.cli._shared.output_args import OutputArgs
from ghosted_fast.cli._shared.recipe import _OF_A_RUN, Recipe
from ghosted_fast.cli.app import app
from ghosted_fast.models.loading import load_model

SMALL = ("--tokens", 512, "--sequence-length", 32)


def run(*arguments: object, status: int = 0) -> str:
    """Run the command line, expect a status, and return what it says."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    return result.stdout if status == 0 else " ".join(result.stderr.replace("│", " ").split())


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [item.getMessage() for item in caplog.records if item.name.endswith("_shared.recipe")]


@pytest.fixture(scope="module")
def fitted(model_folder: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("models") / "fitted"
    run("fit", "--model", model_folder, "--calibration", texts, "--removed", "1,3-4", "--output",
        output, "--corrections", 0, "--damping", "1e-5", *SMALL)  # fmt: skip
    return output


def written(path: Path, model: Path, text: Path, **options: object) -> Path:
    """Write a recipe by hand."""
    given = {"model": str(model), "calibration": str(text), "tokens": 512, "sequence-length": 32}
    path.write_text(yaml.safe_dump({"fit": given | options}))
    return path


@pytest.mark.parametrize(
    "asked",
    [
        ("--removed", "1,3-4"),
        ("--remove", 2, "--criterion", "shortgpt", "--bias", "--first-state", "on"),
        ("--remove", 2, "--recovery", "none", "--criterion", "streamline"),
        pytest.param(("--remove", 1, "--features", "raw", "--seed", 3), marks=pytest.mark.slow),
        pytest.param(("--max-perplexity-increase", "400%"), marks=pytest.mark.slow),
        pytest.param(("--removed", "2", "--calibration", "self"), marks=pytest.mark.slow),
        pytest.param(
            ("--removed", "2", "--calibration", "self", "--temperatures", "0.5,2"),
            marks=pytest.mark.slow,
        ),
        pytest.param(("--removed", "2", "--recovery", "replaceme"), marks=pytest.mark.slow),
    ],
    ids=lambda asked: " ".join(map(str, asked)),
)
def test_a_recipe_makes_the_same_model(
    model_folder: Path, texts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, asked: Any
) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    run("fit", "--model", model_folder, "--calibration", texts, *SMALL, *asked, "--output", first)
    run("fit", "--recipe", first / RECIPE, "--output", again)
    names = [path.name for path in first.iterdir()]
    assert "model.safetensors" in names and RECIPE in names
    for name in ("model.safetensors", "digests.json", RECIPE):
        if name in names:
            assert (again / name).read_bytes() == (first / name).read_bytes(), name
    assert not warnings_of(caplog)


def test_what_a_recipe_holds(fitted: Path, model_folder: Path, texts: Path) -> None:
    kept = yaml.safe_load((fitted / RECIPE).read_text())
    assert kept["recipe"] == 1
    options, made = kept["fit"], kept["made"]
    assert options["model"] == str(model_folder) and options["calibration"] == str(texts)
    assert options["removed"] == "1, 3-4" and options["seed"] == 0
    assert options["criterion"] == "ghost", "defaults stand there too"
    assert not {"output", "report", "overwrite", "trust-remote-code", "remove"} & options.keys()
    assert {"ghosted_fast", "torch", "transformers", "Python", "threads"} <= made.keys()
    assert len(made["text"]) == 16 and made["tokens"] == 512 and made["removed"] == "1, 3-4"


def test_the_command_line_wins(fitted: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    run("fit", "--recipe", fitted, "--remove", 1, "--features", "raw", "--criterion", "shortgpt",
        "--output", other)  # fmt: skip
    options = read_recipe(other)["fit"]
    assert options["remove"] == "1" and "removed" not in options
    assert options["features"] == "raw" and options["damping"] == "1.0e-05"
    assert len(load_model(other)[0].config.ghost["removed"]) == 1


def test_another_text_is_told_in_one_line(
    fitted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = tmp_path / "other.txt"
    text.write_text("the dog sat on the mat and a cat saw it all . " * 300)
    command = ["fit", "--recipe", fitted, "--overwrite", "--output", tmp_path / "other"]
    run(*command, "--batch-size", 3)
    assert not warnings_of(caplog), "it is the same text, in other batches"
    run(*command, "--calibration", text)
    (line,) = warnings_of(caplog)
    digest = read_recipe(fitted)["made"]["text"]
    assert f"expected the text of the recipe {fitted} (digest {digest}, 512 tokens)" in line
    assert "got another (digest " in line and "\n" not in line


def test_values_as_people_write_them(model_folder: Path, texts: Path, tmp_path: Path) -> None:
    path = tmp_path / "by_hand.yaml"
    path.write_text(
        f"# three lines\nfit:\n  model: {model_folder}\n  calibration: {texts}\n  removed: [1, 3]\n"
        "  first-state: on\n  bias: yes\n  heal: ~\n  memory: null\n  sequential: no\n"
        "  corrections: 0\n  tokens: 512\n  sequence-length: 32\n"
    )
    run("fit", "--recipe", path, "--output", tmp_path / "out")
    options = read_recipe(tmp_path / "out")["fit"]
    assert options["removed"] == "1, 3" and options["first-state"] == "on"
    assert options["bias"] == "true" and options["sequential"] == "false"
    assert "heal" not in options and "memory" not in options


@pytest.mark.parametrize("nothing", ["~", "null", "", "[]"])
def test_no_text_in_a_recipe_is_a_missing_one(
    model_folder: Path, tmp_path: Path, nothing: str
) -> None:
    path = tmp_path / "by_hand.yaml"
    path.write_text(f"fit:\n  model: {model_folder}\n  calibration: {nothing}\n  removed: 1\n")
    shown = run("fit", "--recipe", path, "--output", tmp_path / "out", status=2)
    assert "Missing option '--calibration'" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"removd": "3"}, "got 'removd': write removed or remove"),
        ({"criterium": "ghost"}, "got 'criterium': write criterion"),
        ({"output": "x"}, "expected --output on the command line alone"),
        ({"trust-remote-code": True}, "expected --trust-remote-code on the command line alone"),
        ({"threads": 2}, "expected --threads on the command line alone"),
        ({"removed": {"a": 1}}, "expected one value of 'removed'"),
        ({"removed": [1, [2]]}, "expected one value of 'removed'"),
        ({"removed": "4-2"}, "'4-2': write '2-4'"),
        ({"tokens": "many"}, "--tokens"),
        ({"criterion": "luck"}, "--criterion"),
        ({"bias": "perhaps"}, "--bias"),
        ({"removed": "1", "remove": 1}, "expected one of the four, got --remove and --removed"),
    ],
)
def test_what_is_refused(
    model_folder: Path, texts: Path, tmp_path: Path, options: Any, message: str
) -> None:
    path = written(tmp_path / "r.yaml", model_folder, texts, **options)
    assert message in run("fit", "--recipe", path, "--output", tmp_path / "out", status=2)


def test_what_is_written_and_shown_is_of_a_run_and_not_of_a_model() -> None:
    options = {
        item.name for group in (OutputArgs, RecipeArgs) for item in dataclasses.fields(group)
    }
    assert options <= _OF_A_RUN


def test_a_recipe_that_is_not_there_is_a_wrong_command_line(tmp_path: Path) -> None:
    shown = run("fit", "--recipe", tmp_path / "no.yaml", "--output", tmp_path / "out", status=2)
    assert "expected a recipe in" in shown and "No such file" in shown
    assert "Missing option '--model'" in run("fit", "--output", tmp_path / "out", status=2)


def test_of_a_bound_on_speed_the_layers_are_kept() -> None:
    recipe = Recipe((HowManyArgs(min_speedup=1.3, criterion="shortgpt"),), None)
    kept = recipe.written([torch.zeros(2, 8, dtype=torch.int64)], {"removed": [3, 4, 6]})
    assert kept["fit"] == {
        "removed": "3-4, 6", "criterion": "shortgpt", "beam": 16, "corrected-candidates": 0,
    }  # fmt: skip
    bound = dataclasses.replace(recipe.groups[0], min_speedup=None, max_perplexity_increase=0.1)
    kept = Recipe((bound,), None).written([], {"removed": [3]})
    assert kept["fit"]["max-perplexity-increase"] == 0.1 and "removed" not in kept["fit"]
