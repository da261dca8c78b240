"""Exit codes, messages, streams, and what the help loads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from ghosted_fast import __version__
from ghosted_fast.cli.app import app
from ghosted_fast.cli.options import parse_damping, parse_increase, parse_layers, parse_speedup

VERBS = ("demo", "select", "fit", "import", "eval", "compare", "bench", "doctor")

COMPARE = ("compare", "--model=m", "--calibration=c", "--evaluation=e", "--output=o")


def fail(status: int, *arguments: object) -> str:
    """Run the command line, expect a status and an empty stdout, and return its stderr."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.parametrize("verb", [(), *[(verb,) for verb in VERBS]])
def test_help(verb: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, [*verb, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.stdout


def test_help_loads_neither_torch_nor_transformers() -> None:
    script = (
        "import sys; from typer.testing import CliRunner; from ghosted_fast.cli.app import app; "
        f"codes = [CliRunner().invoke(app, [verb, '--help']).exit_code for verb in {VERBS}]; "
        "print(codes, [name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert finished.stdout.strip() == f"{[0] * len(VERBS)} []", finished.stderr


def test_entry_point_and_version() -> None:
    command = [sys.executable, "-m", "ghosted_fast.cli", "--version"]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.stdout.strip() == f"ghosted-fast {__version__}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nonsense",), "nonsense"),
        (("fit",), "Missing option '--model'"),
        (("select", "--model", "m", "--calibration", "c", "--num-layers", "0"), "--num-layers"),
        (("fit", "--model", "m", "--calibration", "c", "--output", "o"), "several or none"),
        (
            ("fit", "--model=m", "--calibration=c", "--output=o", "--removed=1", "--num-layers=1"),
            "several or none",
        ),
        (
            ("fit", "--model=m", "--calibration=c", "--max-perplexity-increase=much"),
            "expected a share above 0 such as '10%', got 'much'",
        ),
        (
            ("fit", "--model=m", "--calibration=c", "--min-speedup=0.9"),
            "expected a factor above 1 such as '1.3', got '0.9'",
        ),
        (
            ("fit", "--model=m", "--calibration=c", "--min-speedup=2", "--recovery=none"),
            "expected --num-layers or --removed with --dry-run, or with a recovery but ghost",
        ),
        (("select", "--model=m", "--calibration=c", "--num-layers=1", "--beam=0"), "--beam"),
        (("fit", "--model=m", "--calibration=c", "--removed=1"), "--output"),
        (("fit", "--model=m", "--calibration=c", "--output=o", "--removed=4-2"), "'4-2'"),
        (("fit", "--model=m", "--calibration=c", "--removed=1", "--criterion=best"), "--criterion"),
        (("fit", "--model=m", "--calibration=c", "--removed=1", "--damping=-1"), "--damping"),
        (
            ("fit", "--model=m", "--calibration=c", "--removed=1", "--corrections=few"),
            "--corrections",
        ),
        (("fit", "--model=m", "--calibration=c", "--removed=1", "--refine=-1"), "--refine"),
        (
            ("fit", "--model=m", "--calibration=c", "--removed=1", "--output=o", "--report=r.pdf"),
            ".html or .json",
        ),
        ((*COMPARE, "--num-layers=3,five"), "got '3,five'"),
        ((*COMPARE, "--num-layers=0"), "numbers above 0"),
        ((*COMPARE, "--num-layers=3", "--evaluation=e"), "got one of them twice"),
        ((*COMPARE, "--num-layers=3", "--criterion=luck"), "--criterion"),
        ((*COMPARE, "--num-layers=3", "--recovery=magic"), "--recovery"),
        (("import", "w.pt", "--model=m", "--output=o"), "Missing option '--removed'"),
        (("import", "w.pt", "--model=m", "--output=o", "--removed=3", "--form=W"), "--form"),
        (("bench", "--model", "m", "--repeats", "0"), "--repeats"),
        (("eval", "--model", "m", "--evaluation", "e", "--dtype", "int3"), "--dtype"),
        (("demo", "--dtype", "int3"), "got 'int3'"),
        (("demo", "--num-layers", "30"), "--num-layers"),
        (("doctor", "--threads", "0"), "--threads"),
    ],
)
def test_usage_errors(arguments: tuple[str, ...], message: str) -> None:
    assert message in fail(2, *arguments)


def test_usage_errors_that_need_the_machine(model_folder: Path) -> None:
    assert "no-such" in fail(2, "bench", "--model", model_folder, "--device", "no-such")
    assert "twice" in fail(2, "bench", "--model", model_folder, "--model", model_folder)


def test_missing_model(texts: Path) -> None:
    message = fail(1, "eval", "--model", "./nowhere", "--evaluation", texts)
    assert message.startswith("error: there is no folder or file './nowhere'")


def test_missing_text(model_folder: Path) -> None:
    message = fail(1, "eval", "--model", model_folder, "--evaluation", "nowhere.jsonl")
    assert message.startswith("error: there is no file 'nowhere.jsonl'")


def test_too_little_text(model_folder: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("the cat sat")
    command = ["eval", "--model", model_folder, "--evaluation", short]
    assert "expected 5120 tokens of text for 10 rows of 512, got 3" in fail(1, *command)
    command = ["compare", "--model", model_folder, "--calibration", short, "--evaluation", short]
    message = fail(1, *command, "--num-layers", 2, "--output", tmp_path / "grid")
    assert f"evaluation text {str(short)!r}: expected 5120 tokens" in message
    assert not (tmp_path / "grid").exists()


@pytest.mark.parametrize("removed", ["0-5", "7"])
def test_layers_that_cannot_be_removed(
    model_folder: Path, texts: Path, tmp_path: Path, removed: str
) -> None:
    message = fail(
        1, "fit", "--model", model_folder, "--calibration", texts, "--removed", removed,
        "--output", tmp_path / "o", "--tokens", "512", "--sequence-length", "32",
    )  # fmt: skip
    assert "expected" in message
    assert not list(tmp_path.iterdir())


def test_existing_output_is_refused_before_the_work(
    model_folder: Path, texts: Path, tmp_path: Path
) -> None:
    command = ["fit", "--model", "nowhere/at-all", "--calibration", texts, "--removed", "2"]
    message = fail(1, *command, "--output", tmp_path)
    assert f"{str(tmp_path)!r} exists: name another, or pass --overwrite" in message
    (tmp_path / "r.html").touch()
    message = fail(1, *command, "--output", tmp_path / "o", "--report", tmp_path / "r.html")
    assert "exists" in message


def test_debug_shows_the_traceback(texts: Path) -> None:
    command = ["eval", "--model", "./nowhere", "--evaluation", str(texts), "--debug"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert type(result.exception).__name__ == "SourceError"


def test_json_is_all_of_stdout(model_folder: Path, texts: Path, tmp_path: Path) -> None:
    """In a process of its own, so that nothing escapes the test runner's streams."""
    command = [sys.executable, "-m", "ghosted_fast.cli", "fit", "--model", str(model_folder)]
    command += ["--calibration", str(texts), "--removed", "2", "--output", str(tmp_path / "o")]
    command += ["--tokens", "512", "--sequence-length", "32", "--json"]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout)["removed"] == [2]


@pytest.mark.parametrize(
    ("text", "layers"),
    [("3", [3]), ("14-18", [14, 15, 16, 17, 18]), ("8,3, 7", [3, 7, 8]), ("1-2,5-5", [1, 2, 5])],
)
def test_parse_layers(text: str, layers: list[int]) -> None:
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "3,3", "2-4,3", "5-2", "1:3"])
def test_parse_layers_refuses(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        parse_layers(text)


def test_parse_damping() -> None:
    assert parse_damping("auto") == "auto"
    assert parse_damping("1e-4") == 1e-4
    assert parse_damping("0") == 0.0
    for text in ("-1", "nan", "inf", "much"):
        with pytest.raises(typer.BadParameter):
            parse_damping(text)


def test_parse_budgets() -> None:
    assert parse_increase(None) is None and parse_speedup(None) is None
    assert parse_increase("10%") == pytest.approx(0.1) and parse_increase("0.05") == 0.05
    assert parse_speedup("1.3") == 1.3 and parse_speedup("1.3x") == 1.3
    for text in ("0%", "-1", "nan", "ten", "inf"):
        with pytest.raises(typer.BadParameter):
            parse_increase(text)
    for text in ("1", "0.5", "nan", "fast"):
        with pytest.raises(typer.BadParameter):
            parse_speedup(text)
