"""Groups of options: what becomes of a dataclass, and what the verbs have of it."""

from __future__ import annotations

import ast
import inspect
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_type_hints

import pytest
import typer
from typer.testing import CliRunner

import ghosted_fast.cli
from ghosted_fast.assets.questions import PREFIX, SETS
from ghosted_fast.cli._shared import fit_args, input_args, output_args
from ghosted_fast.cli._shared.precision_args import PrecisionArgs
from ghosted_fast.cli._shared.results import Result
from ghosted_fast.cli._shared.verb import options_of, verb
from ghosted_fast.cli.app import app
from ghosted_fast.cli.bench import SpeedArgs
from ghosted_fast.cli.bench_ops import CaseArgs, EffortArgs, FilesArgs
from ghosted_fast.cli.demo import DemoArgs
from ghosted_fast.cli.eval import FidelityArgs
from ghosted_fast.cli.fit import RecoveryArgs
from ghosted_fast.cli.grid import ComparedArgs, FolderArgs, JudgedArgs
from ghosted_fast.cli.heal import HealArgs, PairArgs
from ghosted_fast.demo import DemoOptions
from ghosted_fast.measure.throughput import SpeedSettings
from ghosted_fast.options import (
    Count,
    GhostOptions,
    HealOptions,
    Layers,
    PerplexityBound,
    RunOptions,
    SpeedBound,
)

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]

GROUPS = {
    "select": [input_args.ModelArgs, input_args.CalibrationArgs, fit_args.SelectionArgs,
               fit_args.GhostArgs, fit_args.LaunchArgs],
    "fit": [input_args.ModelArgs, input_args.CalibrationArgs, input_args.EvaluationArgs,
            fit_args.HowManyArgs, fit_args.GhostArgs, RecoveryArgs, output_args.OutputArgs,
            fit_args.LaunchArgs],
    "heal": [PairArgs, input_args.LearnedTextArgs, HealArgs, output_args.NewFolderArgs,
             fit_args.RanksArgs],
    "grid": [input_args.ModelArgs, input_args.CalibrationArgs, ComparedArgs, JudgedArgs,
             fit_args.GhostArgs, FolderArgs],
    "eval": [input_args.ModelsArgs, input_args.TextArgs, input_args.TaskArgs, FidelityArgs,
             output_args.ReportArgs],
    "bench": [input_args.ModelsArgs, SpeedArgs, PrecisionArgs],
    "bench-ops": [CaseArgs, EffortArgs, FilesArgs],
}  # fmt: skip


def number(text: str) -> int | Literal["auto"]:
    return "auto" if text == "auto" else int(text)


@dataclass(frozen=True, kw_only=True)
class Fruit:
    title: ClassVar = "Fruit"
    apples: Annotated[int, typer.Option("--apples", min=0, help="Apples.")] = 1
    pears: Annotated[
        int | Literal["auto"], typer.Option("--pears", parser=number, metavar="N", help="Pears.")
    ] = "auto"

    def __post_init__(self) -> None:
        if self.apples == 13:
            raise typer.BadParameter("not 13 of them", param_hint="'--apples'")


@dataclass(frozen=True, kw_only=True)
class Basket(Fruit):
    title: ClassVar = "Basket"
    colour: Annotated[str, typer.Option("--colour", help="Its colour.")]
    eggs: Annotated[
        list[int | Literal["auto"]],
        typer.Option("--eggs", parser=number, metavar="N", help="Eggs; repeat it."),
    ] = field(default_factory=lambda: [6])


def run(function: Any, *arguments: str) -> Any:
    small = typer.Typer(add_completion=False)
    small.command()(verb(function))
    return CliRunner().invoke(small, arguments)


def carry(basket: Basket, far: Annotated[bool, typer.Option("--far", help="Far.")] = False) -> Any:
    """Carry a basket."""
    return Result({}, [f"{basket} {far}"])


def test_a_group_is_handed_over_as_it_was_declared() -> None:
    shown = run(carry, "--colour", "red", "--pears", "3", "--eggs", "1", "--eggs", "auto", "--far")
    expected = Basket(colour="red", apples=1, pears=3, eggs=[1, "auto"])
    assert shown.stdout == f"{expected} True\n"
    shown = run(carry, "--colour", "red")
    assert shown.stdout == f"{Basket(colour='red')} False\n"


def test_own_options_come_before_those_of_the_bases_under_titles() -> None:
    found = {item.name: item for item in options_of(Basket)}
    assert list(found) == ["colour", "eggs", "apples", "pears"]
    assert found["colour"].default is inspect.Parameter.empty
    panels = [item.annotation.__metadata__[0].rich_help_panel for item in found.values()]
    assert panels == ["Basket", "Basket", "Fruit", "Fruit"]
    hints = get_type_hints(Basket, include_extras=True)
    assert hints["apples"].__metadata__[0].rich_help_panel is None, "the declaration was changed"


def test_what_a_group_refuses_is_a_usage_error() -> None:
    refused = run(carry, "--colour", "red", "--apples", "13")
    assert refused.exit_code == 2
    assert "'--apples': not 13 of them" in " ".join(refused.stderr.split())
    assert run(carry, "--colour", "red", "--apples", "-1").exit_code == 2
    assert run(carry).exit_code == 2


def test_an_option_is_declared_once() -> None:
    def twice(basket: Basket, fruit: Fruit) -> None:
        pass

    with pytest.raises(TypeError, match="each option once, got twice: apples, pears"):
        verb(twice)


@pytest.mark.parametrize(
    ("name", "group"), [(n, g) for n, groups in GROUPS.items() for g in groups]
)
def test_every_option_of_a_group_is_one_of_the_verb(name: str, group: Any) -> None:
    options = {item.name: item for item in COMMANDS[name].params}
    for declared in options_of(group):
        option = options[declared.name]
        assert option.help == declared.annotation.__metadata__[0].help
        assert option.required is (declared.default is inspect.Parameter.empty)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_lists_each_option_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = CliRunner().invoke(app, [name, "--help"])
    assert shown.exit_code == 0
    listed = [
        word
        for line in shown.stdout.splitlines()
        if line.startswith("│")
        for word in line.strip("│ *").split()[:3]
        if word.startswith("--")
    ]
    expected = [
        text
        for item in COMMANDS[name].params
        if item.param_type_name == "option"
        for text in (*item.opts, *item.secondary_opts)
    ]
    assert sorted(listed) == sorted([*expected, "--help"])


def test_functions_are_short() -> None:
    for path in Path(ghosted_fast.cli.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                where = f"{path.name}: {node.name}"
                assert len(node.args.args) + len(node.args.kwonlyargs) <= 8, where
                body = node.body[1:] if ast.get_docstring(node) else node.body
                assert not body or (node.end_lineno or 0) - body[0].lineno < 60, where


def test_what_the_library_takes() -> None:
    ghosts = fit_args.GhostArgs(features="raw", bias=True, damping=0.5, first_state="on")
    expected = GhostOptions(features="raw", bias=True, damping=0.5, first_state="on")
    assert ghosts.options() == expected
    assert fit_args.GhostArgs().options() == GhostOptions()
    assert fit_args.GhostArgs().options(sequential=False) == GhostOptions(sequential=False)
    how_many = fit_args.HowManyArgs
    assert how_many(remove=3).how_many() == Count(3)
    assert how_many(removed=(1, 2)).how_many() == Layers((1, 2))
    assert how_many(removed=(1, 2)).remove_or_bound() is None
    assert how_many(max_perplexity_increase=0.1).how_many() == PerplexityBound(0.1)
    assert how_many(min_speedup=1.3).how_many() == SpeedBound(1.3)


def test_defaults_are_those_of_the_library() -> None:
    run, ghost = RunOptions(), GhostOptions()
    assert list(SpeedArgs().settings(PrecisionArgs())) == [SpeedSettings()]
    assert fit_args.SelectionArgs().beam == run.beam
    assert fit_args.SelectionArgs().corrected_candidates == run.corrected_candidates
    assert fit_args.ImproveArgs() == fit_args.ImproveArgs(corrections=run.corrections, heal=None)
    for item in fields(fit_args.GhostArgs):
        assert item.default == getattr(ghost, item.name)
    assert RecoveryArgs().sequential == ghost.sequential
    assert HealArgs().options(3) == HealOptions(tokens=1_000_000, seed=3)
    assert run.heal is None and fit_args.ImproveArgs().heal_options(3) is None
    assert fit_args.ImproveArgs(heal=500).heal_options(3) == HealOptions(tokens=500, seed=3)


def test_the_demo_takes_its_options() -> None:
    assert DemoArgs().options() == DemoOptions()
    asked = DemoArgs(remove=3, dtype=["float32", "bf16"], tokens=1024, quick=True)
    expected = DemoOptions(remove=3, dtypes=("float32", "bf16"), tokens=1024, quick=True)
    assert asked.options() == expected


def test_numbers_of_a_grid() -> None:
    compared = ComparedArgs(remove=[(3, 5), (2, 3)], recovery=["none", "ghost"], heal=7000)
    assert compared.counts == [2, 3, 5]
    names = [item if isinstance(item, str) else item.name for item in compared.recoveries(0)]
    ours = ["none healed, 7,000 tokens", "ghost healed, 7,000 tokens"]
    assert names == ["none", "ghost", "ghost + corrections", *ours]
    plain = ComparedArgs(remove=[(3,)], recovery=["none", "ghost"], corrections=0)
    assert plain.recoveries(0) == ["none", "ghost"]


def test_rivals_of_a_grid_are_corrected_too() -> None:
    recovery = ["none", "prunecomp", "nbl", "ghost", "replaceme"]
    compared = ComparedArgs(remove=[(3,)], recovery=recovery, correct_rivals=True)
    names = [item if isinstance(item, str) else item.name for item in compared.recoveries(0)]
    assert names == [*recovery, "nbl + corrections", "ghost + corrections"]
    with pytest.raises(typer.BadParameter, match="expected corrections with it"):
        ComparedArgs(remove=[(3,)], corrections=0, correct_rivals=True)


def test_help_names_the_tasks() -> None:
    hints = get_type_hints(input_args.TaskArgs, include_extras=True)
    assert all(PREFIX + name in hints["tasks"].__metadata__[0].help for name in SETS)
