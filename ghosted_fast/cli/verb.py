"""What all verbs share: how a result is shown, and how a failure ends."""

from __future__ import annotations

import functools
import inspect
import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from ghosted_fast import _env
from ghosted_fast.errors import GhostedFastError, RankError, RanksLostError

# Of lines that go to a file or a pipe, where nobody wants a table folded at 80 columns.
_PLAIN_WIDTH = 160

AsJson = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON, and nothing else, on stdout.")
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Threads for the processor; torch's choice if not given.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Log more; show the traceback of a failure.")]


@dataclass(frozen=True)
class TextTable:
    """A table to print.

    Attributes:
        columns: Headings.
        rows: Cells, as text.
        title: What stands above it.
        numeric: Whether all columns but the first hold numbers, which are aligned right.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str | None = None
    numeric: bool = True


@dataclass(frozen=True)
class Result:
    """What a verb found out.

    Attributes:
        data: The result for `--json`.
        shown: The result for people: tables, and lines of text.
        passed: Whether the verb's own checks held; if not, it ends with status 1.
    """

    data: dict[str, Any]
    shown: Sequence[TextTable | str] = field(default_factory=tuple)
    passed: bool = True


def verb(function: Callable[..., Result | None], shares: bool = False) -> Callable[..., None]:
    """Make a command of a function: print its result, and turn errors into exit codes.

    The command gains `--json`, `--threads` and `--debug`. It ends with status 2 if the command
    line is wrong, and with 1 and one line on stderr if the work failed.

    Args:
        function: Does the work; returns None where another process has the result.
        shares: Whether processes that `torchrun` started share the work. If not, they are refused.
    """
    own = inspect.signature(function, eval_str=True)
    shared = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, kind, default in (
            ("as_json", AsJson, False),
            ("threads", Threads, None),
            ("debug", Debug, False),
        )
    ]

    @functools.wraps(function)
    def command(*, as_json: bool, threads: int | None, debug: bool, **options: Any) -> None:
        launch = _env.launched()
        follows = launch is not None and launch.rank > 0
        logging.basicConfig(
            stream=sys.stderr,
            level=logging.INFO if debug else logging.ERROR if follows else logging.WARNING,
            format="%(name)s: %(message)s",
        )
        if follows:
            _env.silence_bars()
        if launch is not None and not shares:
            raise typer.BadParameter(
                f"expected one process, got {launch.size}: only fit and select share their work, "
                "start the others without torchrun"
            )
        try:
            if threads is not None:
                import torch

                torch.set_num_threads(threads)
            result = function(**options)
        except (GhostedFastError, OSError, MemoryError, RuntimeError) as error:
            if debug:
                raise
            # What another process failed of, that one says, and the first.
            if not follows or not isinstance(error, RankError) or isinstance(error, RanksLostError):
                who = "" if launch is None else f" (rank {launch.rank})"
                typer.echo(f"error{who}: {_one_line(error)}", err=True)
            raise typer.Exit(1) from error
        if result is None or follows:
            return
        _print(result, as_json)
        if not result.passed:
            raise typer.Exit(1)

    parameters = [*own.parameters.values(), *shared]
    command.__signature__ = own.replace(  # type: ignore[attr-defined]
        parameters=parameters, return_annotation=None
    )
    command.__annotations__ = {item.name: item.annotation for item in parameters}
    return command


def usage_error(message: str, option: str) -> typer.BadParameter:
    """Return the error for a wrong command line; typer shows it and ends with status 2."""
    return typer.BadParameter(message, param_hint=f"'{option}'")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _print(result: Result, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(result.data, indent=2, ensure_ascii=False))
        return
    terminal = sys.stdout.isatty()
    console = Console(width=None if terminal else _PLAIN_WIDTH, highlight=False, markup=False)
    for item in result.shown:
        if isinstance(item, str):
            console.print(item, soft_wrap=True)
        else:
            console.print(_rich_table(item, terminal))


def _rich_table(item: TextTable, terminal: bool) -> Table:
    from rich import box

    table = Table(
        title=item.title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD if terminal else None,
        pad_edge=terminal,
    )
    for index, column in enumerate(item.columns):
        justify: Literal["left", "right"] = "right" if item.numeric and index else "left"
        table.add_column(column, justify=justify, overflow="fold")
    for row in item.rows:
        table.add_row(*row)
    return table
