"""What makes a command of a function: the options of its groups, and how a failure ends."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from ghosted_fast import _env
from ghosted_fast.cli._shared.failures import (
    check_working_folder,
    ending_on_terminate,
    escape_odd_names,
    leave_stdout,
    line_of,
)
from ghosted_fast.cli._shared.results import Result, show
from ghosted_fast.cli._shared.values import MOST, MOST_SEED
from ghosted_fast.errors import RankError, RanksLostError

# What a shell says of a program that SIGINT has ended.
_INTERRUPTED = 130
_MOST_THREADS = 4096
AsJson = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON, and nothing else, on stdout.")
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Threads for the processor; torch's choice if not given.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Log more; show the traceback of a failure.")]


def verb(function: Callable[..., Result | None], shares: bool = False) -> Callable[..., None]:
    """Make a command of a function: print its result, and turn errors into exit codes.

    A parameter that is annotated with a dataclass, a group of options, becomes the options that its
    fields declare, and the function is called with the group. The command gains `--json`,
    `--threads` and `--debug`. It ends with status 2 if the command line is wrong, and with 1 and
    one line on stderr if the work failed.

    Args:
        function: Does the work; returns None where another process has the result.
        shares: Whether processes that `torchrun` started share the work. If not, they are refused.
    """
    own = inspect.signature(function, eval_str=True)
    groups = {
        name: item.annotation
        for name, item in own.parameters.items()
        if is_dataclass(item.annotation)
    }

    @functools.wraps(function)
    def command(*, as_json: bool, threads: int | None, debug: bool, **values: Any) -> None:
        launch = _env.launched()
        follows = launch is not None and launch.rank > 0
        escape_odd_names()
        _log(debug, follows)
        if launch is not None and not shares:
            raise typer.BadParameter(
                f"expected one process, got {launch.size}: only fit, heal and select share their "
                "work, start the others without torchrun"
            )
        _check_sizes({**values, "threads": threads})
        arguments = grouped(values, groups)
        try:
            # torchrun waits for its processes, and ends those that do not end by themselves.
            with ending_on_terminate() if launch is None else nullcontext():
                check_working_folder()
                if threads is not None:
                    import torch

                    torch.set_num_threads(threads)
                result = function(**arguments)
        except (typer.BadParameter, typer.Exit, typer.Abort):
            raise
        except Exception as error:  # whatever the libraries below raise
            if debug:
                raise
            # What another process failed of, that one says, and the first.
            if not follows or not isinstance(error, RankError) or isinstance(error, RanksLostError):
                who = "" if launch is None else f" (rank {launch.rank})"
                said = line_of(error, function.__name__.split("_")[0], values)
                typer.echo(f"error{who}: {said}", err=True)
            raise typer.Exit(1) from error
        if result is None or follows:
            return
        _show(result, as_json)
        if result.interrupted:
            raise typer.Exit(_INTERRUPTED)
        if not result.passed:
            raise typer.Exit(1)

    parameters = _expanded(own, groups)
    command.__signature__ = own.replace(  # type: ignore[attr-defined]
        parameters=parameters, return_annotation=None
    )
    command.__annotations__ = {item.name: item.annotation for item in parameters}
    return command


def _show(result: Result, as_json: bool) -> None:
    """Print a result, where there is room for it."""
    try:
        show(result, as_json)
        sys.stdout.flush()
    except OSError as error:
        leave_stdout()
        if not isinstance(error, BrokenPipeError):
            typer.echo(
                f"error: expected a stdout that takes the result, got {error.strerror}: the work "
                "is done, send its output elsewhere",
                err=True,
            )
        raise typer.Exit(1) from error


def _log(debug: bool, follows: bool) -> None:
    """Send log lines to stderr; of processes that follow another, no more than their errors."""
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO if debug else logging.ERROR if follows else logging.WARNING,
        format="%(name)s: %(message)s",
    )
    if follows:
        _env.silence_bars()


def _check_sizes(values: Mapping[str, Any]) -> None:
    """Raise for a number that is a slip of the hand.

    Raises:
        typer.BadParameter: It is larger than any that means something.
    """
    for name, value in values.items():
        most = {"seed": MOST_SEED, "threads": _MOST_THREADS}.get(name, MOST)
        for number in value if isinstance(value, list | tuple) else (value,):
            if isinstance(number, int) and number > most:
                raise usage_error(f"expected at most {most}, got {number}",
                                  f"--{name.replace('_', '-')}")  # fmt: skip


def _expanded(own: inspect.Signature, groups: Mapping[str, Any]) -> list[inspect.Parameter]:
    """Return a command's parameters: those of its function, groups expanded, and the shared ones.

    Raises:
        TypeError: One stands there twice.
    """
    parameters: list[inspect.Parameter] = []
    for item in own.parameters.values():
        if item.name in groups:
            parameters += options_of(item.annotation)
        else:
            parameters.append(item.replace(kind=inspect.Parameter.KEYWORD_ONLY))
    parameters.append(_keyword("as_json", AsJson, False))
    parameters.append(_keyword("threads", Threads, None))
    parameters.append(_keyword("debug", Debug, False))
    names = [item.name for item in parameters]
    if twice := {name for name in names if names.count(name) > 1}:
        raise TypeError(f"expected each option once, got twice: {', '.join(sorted(twice))}")
    return parameters


def options_of(group: Any) -> Iterator[inspect.Parameter]:
    """Yield the options of a group: what its own fields declare, then those of its bases.

    In the help they stand under the `title` of the class that declares them.

    Args:
        group: A dataclass whose fields are annotated as typer has it:
            `name: Annotated[type, typer.Option(...)] = default`. An option that can be repeated is
            a list; one whose parser finds several values in a text is a tuple.
    """
    declared: dict[str, Field[Any]] = {item.name: item for item in fields(group)}
    hints = get_type_hints(group, include_extras=True)
    for base in group.__mro__:
        for name in inspect.get_annotations(base):
            if item := declared.pop(name, None):
                default = item.default
                if item.default_factory is not MISSING:
                    default = item.default_factory()
                yield _keyword(name, _declaration(hints[name], base.title), default)


def grouped(values: Mapping[str, Any], groups: Mapping[str, Any]) -> dict[str, Any]:
    """Return a function's arguments: its groups, each made of its options, and the other values.

    Raises:
        typer.BadParameter: The options of a group do not go together.
    """
    names = {name: {item.name for item in fields(group)} for name, group in groups.items()}
    taken = set().union(*names.values())
    arguments = {name: value for name, value in values.items() if name not in taken}
    for name, group in groups.items():
        arguments[name] = group(**{item: values[item] for item in names[name]})
    return arguments


def usage_error(message: str, option: str) -> typer.BadParameter:
    """Return the error for a wrong command line; typer shows it and ends with status 2."""
    return typer.BadParameter(message, param_hint=f"'{option}'")


def _declaration(annotation: Any, title: str) -> Any:
    """Return a field's annotation as typer takes it, under a title in the help."""
    kind, option = get_args(annotation)
    if option.parser is not None:
        # Typer refuses unions, also where a parser makes the value.
        repeated = any(get_origin(part) is list for part in (kind, *get_args(kind)))
        kind = list[Any] if repeated else Any
    option = copy.copy(option)
    option.rich_help_panel = title
    return Annotated[kind, option]


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    if default is MISSING:
        default = inspect.Parameter.empty
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=annotation)
