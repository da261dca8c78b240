"""What a shell is told when the user presses Tab, that it is told quickly, and how it is set up."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from typer.testing import CliRunner

from ghosted_fast.assets.questions import PREFIX, SETS
from ghosted_fast.cli._shared import values
from ghosted_fast.cli.app import app

CRITERIA, RECOVERIES = list(get_args(values.Criterion)), list(get_args(values.Recovery))
DTYPES = list(get_args(values.Dtype))
TASKS = [PREFIX + name for name in SETS]


def asked(*words: str) -> dict[str, str]:
    """Return the variables with which bash asks how a command line goes on."""
    line = ["ghosted-fast", *words]
    return {
        "_GHOSTED_FAST_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(line),
        "COMP_CWORD": str(len(line) - 1),
    }


def completed(*words: str) -> list[str]:
    """Return what bash is told; the last word is the one that is not complete."""
    result = CliRunner().invoke(app, [], env=asked(*words), prog_name="ghosted-fast")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result.stdout.split()


def test_verbs() -> None:
    assert {"fit", "grid", "export", "doctor", "bench-ops"} <= set(completed(""))
    assert completed("be") == ["bench", "bench-ops"]


def test_options() -> None:
    assert completed("fit", "--rem") == ["--remove", "--removed"]
    assert "--install-completion" in completed("--")
    assert "--recipe" in completed("fit", "--model", "m", "--")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("fit", "--criterion"), CRITERIA),
        (("select", "--criterion"), CRITERIA),
        (("grid", "--criterion"), CRITERIA),
        (("fit", "--recovery"), RECOVERIES),
        (("grid", "--recovery", "none", "--recovery"), RECOVERIES),
        (("fit", "--dtype"), DTYPES),
        (("demo", "--dtype"), DTYPES),
        (("eval", "--dtype"), DTYPES),
        (("fit", "--calibrate-in"), ["int8", "nf4"]),
        (("fit", "--device"), ["auto", "cpu", "cuda"]),
        (("bench", "--engine"), ["transformers", "vllm"]),
        (("export", "m", "--to"), ["gguf", "ort-genai"]),
        (("export", "m", "--precision"), ["f32", "f16", "q8_0", "fp32", "int8", "int4"]),
        (("bench-ops", "--operator"), ["gram_update", "ghost_apply", "ghost_solve", "divergence"]),
        (("import", "f", "--form"), ["auto", "full", "delta"]),
        (("eval", "--tasks"), TASKS),
        (("fit", "--model"), []),
    ],
)
def test_values(words: tuple[str, ...], expected: list[str]) -> None:
    assert completed(*words, "") == expected
    if expected:
        assert completed(*words, expected[-1][:2]) == [
            value for value in expected if value.startswith(expected[-1][:2])
        ]


def test_tasks_go_on_behind_a_comma() -> None:
    found = completed("eval", "--tasks", f"{TASKS[1]},lo")
    assert found == [f"{TASKS[1]},{name}" for name in TASKS if name != TASKS[1]]


@pytest.mark.parametrize("words", [("--num-layers", "3"), ("--heal", "x"), ("--damping", "-1")])
def test_what_is_wrong_in_the_line_is_not_told_yet(words: tuple[str, ...]) -> None:
    assert completed("fit", *words, "--cri") == ["--criterion"]


def test_a_recipe_is_not_read_for_it(tmp_path: Path) -> None:
    named = ("fit", "--recipe", str(tmp_path / "no.yaml"))
    assert completed(*named, "--criterion", "sl") == ["sleb"]


@pytest.mark.parametrize("words", [("fit", "--criterion", ""), ("eval", "--tasks", ""), ("fi",)])
def test_nothing_heavy_is_loaded_for_it(words: tuple[str, ...]) -> None:
    script = (
        "import atexit, sys; from ghosted_fast.cli import main; heavy = ('torch', 'transformers', "
        "'numpy', 'matplotlib', 'yaml'); atexit.register(lambda: print([name for name in heavy if "
        "name in sys.modules], file=sys.stderr)); main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **asked(*words)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr.strip()) == (0, "[]")
    assert done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_what_is_installed_works_in_bash(tmp_path: Path) -> None:
    program = tmp_path / "ghosted-fast"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ghosted_fast "$@"\n')
    program.chmod(0o755)
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1",
    }

    def call(*command: str) -> str:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "completion installed" in call("ghosted-fast", "--install-completion", "bash")
    script = (
        "source ~/.bashrc; COMP_WORDS=(ghosted-fast fit --criterion s); COMP_CWORD=3; "
        '_ghosted_fast_completion ghosted-fast; echo "${COMPREPLY[@]}"'
    )
    assert call("bash", "--norc", "-c", script).split() == ["streamline", "shortgpt", "sleb"]
