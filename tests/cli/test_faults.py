"""What a shell, a disk and an operating system can do to a verb: one line each, nothing left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ghosted_fast.checkpoint.save import rewrite_facts, save_model
from ghosted_fast.cli._shared.failures import ending_on_terminate, line_of
from ghosted_fast.cli.app import app
from ghosted_fast.errors import ArgumentError
from ghosted_fast.testing import tiny_model

SELECT = ("select", "--remove", "2", "--dry-run")


def shell(script: str, model: Path, texts: Path) -> subprocess.CompletedProcess[str]:
    command = f"{sys.executable} -m ghosted_fast {' '.join(SELECT)} --model {model} "
    command += f"--calibration {texts}"
    return subprocess.run(
        ["bash", "-c", script.replace("VERB", command)], capture_output=True, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "status", "said"),
    [
        ("VERB > /dev/full", 1, "error: expected a stdout that takes the result, got No space"),
        ("VERB | true; exit ${PIPESTATUS[0]}", 1, ""),
        ("VERB >&-", 0, ""),
    ],
)
def test_stdout_that_takes_nothing(
    script: str, status: int, said: str, model_folder: Path, texts: Path
) -> None:
    finished = shell(script, model_folder, texts)
    assert finished.returncode == status, finished.stderr
    assert said in finished.stderr
    assert "Traceback" not in finished.stderr and "Exception ignored" not in finished.stderr


def test_a_working_folder_that_is_gone(model_folder: Path, texts: Path, tmp_path: Path) -> None:
    gone, here = tmp_path / "gone", Path.cwd()
    gone.mkdir()
    os.chdir(gone)
    gone.rmdir()
    try:
        command = [*SELECT, "--model", str(model_folder), "--calibration", str(texts)]
        result = CliRunner().invoke(app, command)
    finally:
        os.chdir(here)
    assert result.exit_code == 1
    assert "expected a working folder, got one that was removed" in result.stderr


def test_names_that_are_not_utf8(texts: Path, tmp_path: Path) -> None:
    odd = str(tmp_path / os.fsdecode(b"\xff"))
    command = ["fit", "--model", odd, "--calibration", str(texts), "--remove", "2", "--output"]
    result = CliRunner().invoke(app, [*command, str(tmp_path / "new")])
    assert result.exit_code == 1
    assert "expected a model's name in UTF-8, got" in result.stderr
    result = CliRunner().invoke(app, [*command, odd])
    assert "got a name that is not UTF-8: name another" in " ".join(result.stderr.split())


def test_sigterm_ends_the_work_as_ctrl_c_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", 2)

    def killed(folder: Path, *_: Any, **__: Any) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "half").touch()
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(model, "save_pretrained", killed)
    with pytest.raises(SystemExit) as caught, ending_on_terminate():
        save_model(model, tmp_path / "model")
    assert caught.value.code == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_facts_are_rewritten_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", 2)
    save_model(model, tmp_path / "model")
    before = (tmp_path / "model" / "config.json").read_bytes()

    def half(folder: Path) -> None:
        (Path(folder) / "config.json").write_text("{")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model.config, "save_pretrained", half)
        with pytest.raises(KeyboardInterrupt):
            rewrite_facts(model.config, tmp_path / "model")
    assert (tmp_path / "model" / "config.json").read_bytes() == before
    model.config.note = "new"
    rewrite_facts(model.config, tmp_path / "model")
    assert b"new" in (tmp_path / "model" / "config.json").read_bytes()
    assert not [path for path in (tmp_path / "model").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ArgumentError("expected a, got b: c"), "expected a, got b: c"),
        (
            KeyError("x"),
            "expected fit to finish on model=m calibration=c,d:30%, got KeyError: 'x': check",
        ),
        (OSError(28, "No space left on device"), "got [Errno 28] No space left on device: check"),
        (MemoryError(), "got MemoryError: no more: take fewer --tokens"),
        (ValueError("two\n\nlines"), "got ValueError: two lines: check"),
    ],
)
def test_every_error_is_a_line(error: Exception, said: str) -> None:
    given = {"model": "m", "calibration": ["c", "d:30%"], "output": None, "tokens": 3}
    line = line_of(error, "fit", given)
    assert said in line and "\n" not in line


@pytest.mark.parametrize("debug", [False, True])
def test_debug_shows_the_traceback(
    model_folder: Path, texts: Path, monkeypatch: pytest.MonkeyPatch, debug: bool
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("of some library")

    monkeypatch.setattr("ghosted_fast.pipeline.statistics_bytes_needed", broken)
    command = [*SELECT, "--model", str(model_folder), "--calibration", str(texts)]
    result = CliRunner().invoke(app, command + ["--debug"] * debug)
    assert result.exit_code == 1
    assert isinstance(result.exception, KeyError if debug else SystemExit)
    assert ("got KeyError: 'of some library'" in result.stderr) is not debug
