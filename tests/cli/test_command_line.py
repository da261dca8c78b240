"""Exit codes, messages, streams, and what the help loads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ghosted_fast import __version__
from ghosted_fast.cli.app import app
from ghosted_fast.text import generation

VERBS = (
    "demo",
    "select",
    "fit",
    "heal",
    "prune",
    "import",
    "eval",
    "grid",
    "bench",
    "bench-ops",
    "export",
    "doctor",
)

FIT = ("fit", "--model=m", "--calibration=c")
SELECT = ("select", "--model=m", "--calibration=c")
HEAL = ("heal", "m", "--dense=d", "--calibration=c", "--output=o")
GRID = ("grid", "--model=m", "--calibration=c", "--evaluation=e", "--output=o")


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
    command = [sys.executable, "-m", "ghosted_fast", "--version"]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.stdout.strip() == f"ghosted-fast {__version__}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nonsense",), "nonsense"),
        (("fit",), "Missing option '--model'"),
        (("select", "--model", "m", "--calibration", "c", "--remove", "0"), "--remove"),
        ((*FIT, "--output=o"), "expected one of the four, got none"),
        (
            (*FIT, "--output=o", "--removed=1", "--remove=1"),
            "expected one of the four, got --remove and --removed",
        ),
        (
            (*FIT, "--output=o", "--min-speedup=2", "--max-perplexity-increase=1%", "--remove=1"),
            "got --remove and --max-perplexity-increase and --min-speedup",
        ),
        (
            (*FIT, "--max-perplexity-increase=much"),
            "expected a share above 0 such as '10%', got 'much'",
        ),
        (
            (*FIT, "--min-speedup=0.9"),
            "expected a factor above 1 such as '1.3', got '0.9'",
        ),
        (
            (*FIT, "--min-speedup=2", "--recovery=none"),
            "'--min-speedup': expected --remove or --removed with --recovery none",
        ),
        (
            (*FIT, "--min-speedup=1.1", "--dry-run"),
            "'--min-speedup': expected --remove, --removed or --max-perplexity-increase with",
        ),
        (
            (*FIT, "--removed=1", "--output=o", "--recovery=none", "--corrections=1"),
            "'--corrections': expected --recovery ghost with --corrections, got 'none'",
        ),
        ((*SELECT, "--remove=1", "--beam=0"), "--beam"),
        (
            (*SELECT, "--remove=1", "--temperatures=0.7,1"),
            "'--temperatures': expected --calibration self with it, got",
        ),
        ((*SELECT, "--remove=1", "--temperatures=1,0"), "temperatures above 0 such as '0.7,1,1.3'"),
        ((*FIT, "--removed=1"), "--output"),
        ((*FIT, "--output=o", "--removed=4-2"), "'4-2': write '2-4'"),
        (
            (*FIT, "--output=o", "--removed=2-4,3"),
            "'--removed': expected every layer once, got 3 twice in '2-4,3'",
        ),
        (
            (*FIT, "--output=o", "--removed=1", "--tokens=511"),
            "'--tokens': expected at least the 512 of one sequence (--sequence-length), got 511",
        ),
        (
            (*SELECT, "--remove=1", "--tokens=31", "--sequence-length=32"),
            "'--tokens': expected at least the 32 of one sequence",
        ),
        (("eval", "--model=m", "--evaluation=e", "--tokens=5"), "'--tokens': expected at least"),
        (
            (*FIT, "--output=o", "--removed=1", "--evaluation=self"),
            "'--evaluation': expected a text to measure on, got 'self'",
        ),
        (("eval", "--model=m", "--evaluation=self"), "(--calibration self)"),
        ((*GRID, "--remove=3", "--evaluation=self"), "(--calibration self)"),
        (("eval", "--model=m"), "expected one of the three or more, got none"),
        (("eval", "--model=m", "--prompts=a.txt"), "expected --fidelity with it"),
        (("eval", "--model=m", "--tasks= ,"), "'--tasks': expected names with commas between"),
        ((*FIT, "--removed=1", "--criterion=best"), "--criterion"),
        ((*FIT, "--removed=1", "--damping=-1"), "--damping"),
        (
            (*FIT, "--removed=1", "--corrections=few"),
            "--corrections",
        ),
        ((*FIT, "--removed=1", "--heal=-1"), "'--heal': expected a number of tokens such as"),
        ((*HEAL, "--tokens=1.5"), "'--tokens': expected a number of tokens such as '100k'"),
        ((*HEAL, "--minutes=0"), "'--minutes': expected a number above 0, got 0.0"),
        ((*HEAL, "--learning-rate=nan"), "'--learning-rate': expected a number above 0"),
        ((*HEAL, "--rank=-1"), "--rank"),
        ((*HEAL, "--report=r.pdf"), ".html or .json"),
        (("heal", "m", "--calibration=c", "--output=o"), "Missing option '--dense'"),
        (
            (*GRID[:-2], "--evaluation=f", "--output=o", "--remove=3", "--heal=100k"),
            "'--heal': expected --tokens of at least 105120 with --heal 100000",
        ),
        (
            (*FIT, "--removed=1", "--output=o", "--report=r.pdf"),
            ".html or .json",
        ),
        ((*GRID, "--remove=3,five"), "got '3,five'"),
        ((*GRID, "--remove=0"), "numbers above 0"),
        ((*GRID, "--remove=3", "--evaluation=e"), "got one of them twice"),
        ((*GRID, "--remove=3", "--criterion=luck"), "--criterion"),
        ((*GRID, "--remove=3", "--recovery=magic"), "--recovery"),
        ((*GRID, "--remove=3", "--criterion=ghost", "--criterion=ghost"), "expected each once"),
        (
            ("export", "m", "--to=gguf", "--precision=int4"),
            "expected f32, f16, q8_0 with --to gguf",
        ),
        (
            ("export", "m", "--to=ort-genai", "--tokenizer=x.gguf"),
            "'--tokenizer': a tokenizer is taken with --to gguf alone, got --to ort-genai",
        ),
        (("import", "w.pt", "--model=m", "--output=o"), "Missing option '--removed'"),
        (("import", "w.pt", "--model=m", "--output=o", "--removed=3", "--form=W"), "--form"),
        (("bench", "--model", "m", "--seconds", "0"), "--seconds"),
        (("eval", "--model", "m", "--evaluation", "e", "--dtype", "int3"), "--dtype"),
        (("demo", "--dtype", "int3"), "got 'int3'"),
        (("demo", "--remove", "30"), "--remove"),
        (("doctor", "--threads", "0"), "--threads"),
    ],
)
def test_usage_errors(arguments: tuple[str, ...], message: str) -> None:
    assert message in fail(2, *arguments)


def test_what_bench_refuses(model_folder: Path) -> None:
    command = ["bench", "--model", model_folder]
    assert "It is --precision now" in fail(2, *command, "--repeats", "3")
    assert "a share between 0 and 1 such as '2%'" in fail(2, *command, "--precision", "200%")
    assert "expected seconds above 0, got 0" in fail(2, *command, "--seconds", "0")
    assert "--new-tokens" in fail(2, *command, "--new-tokens", "1")


def test_usage_errors_that_need_the_machine(model_folder: Path) -> None:
    assert "no-such" in fail(2, "bench", "--model", model_folder, "--device", "no-such")
    assert "twice" in fail(2, "bench", "--model", model_folder, "--model", model_folder)


def test_missing_model(texts: Path) -> None:
    message = fail(1, "eval", "--model", "./nowhere", "--evaluation", texts)
    assert message.startswith("error: there is no folder or file './nowhere'")


def test_missing_text(model_folder: Path) -> None:
    message = fail(1, "eval", "--model", model_folder, "--evaluation", "nowhere.jsonl")
    assert message.startswith("error: there is no file 'nowhere.jsonl'")


@pytest.mark.parametrize(
    "command",
    [
        ("select", "--remove=1", "--calibration=nowhere.jsonl"),
        ("fit", "--removed=1", "--output=o", "--calibration=nowhere.jsonl"),
        ("grid", "--remove=1", "--output=o", "--calibration=nowhere.jsonl", "--evaluation={}"),
        ("grid", "--remove=1", "--output=o", "--calibration={}", "--evaluation=nowhere.jsonl"),
        ("fit", "--removed=1", "--output=o", "--calibration={}", "--evaluation=nowhere.jsonl"),
        ("heal", "./no-model", "--dense=./no-dense", "--output=o", "--calibration=nowhere.jsonl"),
        ("eval", "--evaluation=nowhere.jsonl"),
    ],
)
def test_a_text_that_is_missing_is_told_before_the_model_is_loaded(
    command: tuple[str, ...], texts: Path
) -> None:
    model = [] if command[0] == "heal" else ["--model=./no-model"]
    message = fail(1, *(part.format(texts) for part in command), *model)
    assert message.startswith("error: there is no file 'nowhere.jsonl'")


def test_layers_that_there_are_not_are_told_before_text_is_written(
    model_folder: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def generate(*_: object, **__: object) -> None:
        raise AssertionError("the model wrote text")

    monkeypatch.setattr(generation, "generate_texts", generate)
    rest = ["--model", model_folder, "--calibration", "self"]
    assert "expected remove in 1..5" in fail(1, "select", *rest, "--remove", 6)
    fit = ["fit", *rest, "--output", tmp_path / "o"]
    assert "expected remove in 1..5" in fail(1, *fit, "--remove", 6)
    assert "0..5" in fail(1, *fit, "--removed", "4-6")
    grid = ["grid", *rest, "--evaluation", texts, "--output", tmp_path / "o"]
    assert "expected remove in 1..5" in fail(1, *grid, "--remove", "1,6")
    assert not list(tmp_path.iterdir())


def test_a_page_that_cannot_be_made_is_told_before_the_model_is_loaded(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    command = ["fit", "--model", "./nowhere", "--calibration", texts, "--removed", "1"]
    command += ["--output", tmp_path / "o", "--report"]
    assert "pip install 'ghosted_fast[report]'" in fail(1, *command, "r.html")
    assert "'./nowhere'" in fail(1, *command, "r.json")


def test_too_little_text(model_folder: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("the cat sat")
    command = ["eval", "--model", model_folder, "--evaluation", short, "--sequence-length", 32]
    assert "expected 32 tokens of text for 1 rows of 32, got 3" in fail(1, *command)
    command = [
        "grid",
        "--model",
        model_folder,
        "--calibration",
        short,
        "--evaluation",
        short,
        "--sequence-length",
        32,
    ]
    message = fail(1, *command, "--remove", 2, "--output", tmp_path / "grid")
    assert f"evaluation text {str(short)!r}: expected 32 tokens" in message
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


@pytest.mark.slow
def test_json_is_all_of_stdout(model_folder: Path, texts: Path, tmp_path: Path) -> None:
    """In a process of its own, so that nothing escapes the test runner's streams."""
    command = [sys.executable, "-m", "ghosted_fast", "fit", "--model", str(model_folder)]
    command += ["--calibration", str(texts), "--removed", "2", "--output", str(tmp_path / "o")]
    command += ["--tokens", "512", "--sequence-length", "32", "--json"]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout)["removed"] == [2]
