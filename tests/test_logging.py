"""What the library says goes to one logger, and nobody hears it unasked."""

from __future__ import annotations

import ast
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ghosted_fast

ROOT = Path(__file__).parents[1]
FILES = [*(ROOT / "ghosted_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
# Other libraries' own, which are made quiet while they work.
OTHERS = {"lm_eval", "vllm.transformers_utils.config"}
SAYS = {"debug", "info", "warning", "warn", "error", "exception", "critical", "log"}


def said(*lines: str) -> tuple[str, str]:
    """Run a program, and return what it wrote to stdout and stderr."""
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_the_logger_has_no_ears_of_its_own() -> None:
    logger = logging.getLogger(ghosted_fast.__name__)
    assert {type(handler) for handler in logger.handlers} == {logging.NullHandler}
    assert logger.level == logging.NOTSET and logger.propagate
    assert not logger.disabled


WARN = "logging.getLogger('ghosted_fast.text.loading').warning('the text is short')"


def test_it_is_quiet_by_default() -> None:
    assert said("import logging, ghosted_fast", WARN) == ("", "")
    assert said("import logging", WARN)[1] == "the text is short\n", "Python's own last resort"


def test_a_program_that_listens_hears_it() -> None:
    heard = said("import logging, ghosted_fast", "logging.basicConfig()", WARN)
    assert heard == ("", "WARNING:ghosted_fast.text.loading:the text is short\n")


def calls(path: Path) -> list[ast.Call]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_every_logger_is_named_after_its_module() -> None:
    count = 0
    for path in FILES:
        for call in calls(path):
            if ast.unparse(call.func) not in ("logging.getLogger", "getLogger"):
                continue
            name = call.args[0]
            known = isinstance(name, ast.Constant) and name.value in OTHERS
            assert known or ast.unparse(name) == "__name__", path
            count += not known
    assert count > 10


def test_nothing_is_said_to_all_or_configured_but_by_the_command_line() -> None:
    loud = {f"logging.{name}" for name in (*SAYS, "basicConfig", "config.dictConfig")}
    for path in FILES:
        found = {ast.unparse(call.func) for call in calls(path)} & loud
        expected = {"logging.basicConfig"} if path.match("cli/_shared/verb.py") else set()
        assert found == expected, path


@pytest.mark.slow
def test_a_whole_run_is_quiet() -> None:
    out, err = said(
        "import ghosted_fast as gf",
        "from support.tiny_text import TEXT, tiny_tokenizer",
        "from ghosted_fast.testing import tiny_model",
        "batches = gf.token_batches(tiny_tokenizer(), [TEXT] * 90, 4096, 32, fewest=256)",
        "smaller, report = gf.ghost_model(tiny_model('llama'), batches, remove=2)",
        "gf.perplexity(smaller, batches)",
    )
    assert (out, err) == ("", "")
