"""What messages tell users to type exists."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.main import get_command

import ghosted_fast
from ghosted_fast.cli.app import app

PACKAGE = Path(ghosted_fast.__file__).parent
# Options of the whole program, of pip, of torchrun and of vLLM.
OTHERS = {"--help", "--version", "--nproc-per-node", "--upgrade", "--no-build-isolation"}
OTHERS |= {"--no-deps", "--no-cache-dir", "--only-binary", "--quiet", "--dest", "--no-binary"}
OTHERS |= {"--compilation-config"}
OTHERS |= {
    "--disable-pip-version-check",
    "--python-version",
    "--platform",
    "--implementation",
    "--abi",
}


def options() -> set[str]:
    command = get_command(app)
    found = set(OTHERS)
    for verb in command.commands.values():  # type: ignore[attr-defined]
        for parameter in verb.params:
            found |= {*parameter.opts, *parameter.secondary_opts}
    return found


def texts(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


@pytest.mark.parametrize(
    "path",
    [p for p in sorted(PACKAGE.rglob("*.py")) if p.name not in ("old_names.py", "plots.py")],
    ids=lambda path: path.relative_to(PACKAGE).as_posix(),
)
def test_options_in_texts_exist(path: Path) -> None:
    known = options()
    stale = {
        (line, option)
        for line, text in texts(path)
        for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text)
        if option not in known
    }
    assert not stale
