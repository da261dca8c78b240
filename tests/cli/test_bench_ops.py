"""`ghosted-fast bench-ops`: wrong flags end before the work, results go where asked."""

from __future__ import annotations

import csv
import functools
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_ops.simulated import Machine, machine
from click.testing import Result
from typer.testing import CliRunner

from ghosted_fast.bench_ops import ghost_apply, runner
from ghosted_fast.bench_ops.cases import OURS
from ghosted_fast.cli.app import app
from ghosted_fast.cli.bench_ops import CaseArgs, EffortArgs
from ghosted_fast.timing.rounds import time_variants


def invoke(*arguments: object) -> Result:
    command = ["bench-ops", "--quiet", *map(str, arguments)]
    return CliRunner().invoke(app, command)  # type: ignore[return-value]


def said(result: Result) -> str:
    return " ".join(result.stderr.replace("│", " ").split())


Simulate = Callable[[Machine], None]


@pytest.fixture
def simulate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulate]:
    """Returns what puts a machine in the place of this one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)

    def put(simulated: Machine) -> None:
        monkeypatch.setattr(CaseArgs, "plans", lambda self: [simulated.plan()])
        monkeypatch.setattr(runner, "roofs_of", lambda device: simulated.roofs())
        monkeypatch.setattr(runner, "timer_for", lambda device: simulated.timer)
        clock = functools.partial(time_variants, clock=lambda: simulated.clock)
        monkeypatch.setattr(runner, "time_variants", clock)

    yield put
    torch.set_num_threads(before)


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("the work has begun")

    monkeypatch.setattr(runner, "measure", work)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--operator", "gram"], 2, "expected one of gram_update, ghost_apply, ghost_solve"),
        (["--width", "0"], 2, "'--width'"),
        (["--rows", "-1"], 2, "'--rows'"),
        (["--operator", "ghost_solve", "--rows", "4"], 2, "as many rows as its width; got 4"),
        (["--operator", "ghost_solve", "--dtype", "fp32"], 2, "fp64 always; got fp32"),
        (["--dtype", "int8"], 2, "expected one of bfloat16, float16, float32, bf16, fp16, fp32"),
        (["--threads", "0"], 2, "'--threads'"),
        (["--device", "tpu"], 2, "'--device'"),
        (["--precision", "0"], 2, "a share between 0 and 1 such as '2%', got '0'"),
        (["--precision", "200%"], 2, "a share between 0 and 1 such as '2%', got '200%'"),
        (["--seconds", "0"], 2, "expected seconds above 0, got 0"),
        (["--seconds", "nan"], 2, "expected seconds above 0, got nan"),
        (["--seconds", "inf"], 2, "expected seconds above 0, got inf"),
        (["--plot", "p.png"], 2, "expected a name in .svg, got 'p.png'"),
        (["--output", "o", "--csv", "c"], 2, "expected it or single files, got --csv"),
        (["--csv", "f", "--json-file", "f"], 2, "expected a file of its own, got 'f' again"),
        (["--backend", "cuda"], 1, "expected a backend of auto, native, reference, triton"),
        (["--width", "9999999", "--operator", "ghost_solve"], 1, "GiB of free memory"),
        (["--against", "absent.json"], 1, "expected a file that bench-ops wrote as JSON"),
    ],
)
def test_wrong_flags_end_before_the_work(arguments: list[str], status: int, message: str) -> None:
    result = invoke("--width", 8, *arguments)
    assert result.exit_code == status, result.output
    assert message in said(result) and result.stdout == ""
    assert "Traceback" not in result.stderr


@pytest.mark.usefixtures("no_work")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so() -> None:
    assert "expected a CUDA device" in said(invoke("--device", "cuda"))
    assert "no CUDA device" in said(invoke("--backend", "triton"))


@pytest.mark.usefixtures("no_work")
def test_files_that_are_there_are_refused_before_the_work(tmp_path: Path) -> None:
    there = tmp_path / "operators.csv"
    there.write_text("mine")
    for option, path in (("--csv", there), ("--output", tmp_path), ("--json-file", there)):
        result = invoke(option, path)
        assert result.exit_code == 2 and "which exists: name another" in said(result)
        assert f"'{option}'" in said(result)
    assert "expected a folder, got the file" in said(invoke("--output", there))
    assert "expected a file, got the folder" in said(invoke("--csv", tmp_path, "--overwrite"))
    assert there.read_text() == "mine"


@pytest.mark.usefixtures("no_work")
def test_a_plot_needs_matplotlib_before_the_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    for arguments in (["--output", tmp_path / "o"], ["--plot", tmp_path / "p.svg"]):
        result = invoke(*arguments)
        assert result.exit_code == 1 and "ghosted_fast[report]" in said(result)


@pytest.mark.usefixtures("no_work")
def test_another_machine_is_refused_before_the_work(tmp_path: Path, simulate: Simulate) -> None:
    simulate(Machine(machine()))
    path = tmp_path / "before.json"
    there = {**runner.machine_of(CaseArgs().setting()), "processor": "Other 9000"}
    settings = {"precision": 0.02}
    path.write_text(
        json.dumps(
            {
                "format": 1,
                "machine": there,
                "settings": settings,
                "roof_source": "",
                "cases": [],
            }
        )
    )
    result = invoke("--against", path)
    assert result.exit_code == 1
    assert "processor Other 9000 there and" in said(result)


def test_a_wrong_result_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ghost_apply, "ghost_apply", lambda x, *_, **__: x.clone())
    target = tmp_path / "rows.csv"
    arguments = ["--operator", "ghost_apply", "--width", 64, "--rows", 20]
    for shown in ([], ["--json"]):
        result = invoke(*arguments, "--csv", target, *shown)
        assert result.exit_code == 1 and result.stdout == "" and not target.exists()
        assert "expected the result of fp64" in said(result)
        assert "nothing is reported" in said(result)


def test_tables_and_files(tmp_path: Path, simulate: Simulate) -> None:
    pytest.importorskip("matplotlib")
    simulate(Machine(machine(), 0.01))
    folder = tmp_path / "new" / "results"
    result = invoke("--output", folder)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["ghost_apply,", "1", "thread"]
    assert result.stdout.count(OURS) == 2
    assert [line.strip() for line in lines[-3:]] == [
        str(folder / name) for name in ("operators.json", "operators.csv", "roofline.svg")
    ]
    data = json.loads((folder / "operators.json").read_text())
    rows = list(csv.DictReader(io.StringIO((folder / "operators.csv").read_text())))
    (case,) = data["cases"]
    assert [row["variant"] for row in rows] == [row["variant"] for row in case["rows"]]
    assert (folder / "roofline.svg").read_text().startswith("<?xml")
    assert invoke("--output", folder).exit_code == 2
    assert invoke("--output", folder, "--overwrite").exit_code == 0


def test_json_is_all_there_is_on_stdout(tmp_path: Path, simulate: Simulate) -> None:
    simulate(Machine(machine(), 0.01))
    path = tmp_path / "file.json"
    result = invoke("--json", "--json-file", path, "--precision", "5%", "--seconds", "3")
    data: dict[str, Any] = json.loads(result.stdout)
    assert data == json.loads(path.read_text())
    assert data["complete"] and data["settings"]["precision"] == 0.05
    assert data["settings"]["seconds"] == 3.0 and data["settings"]["backend"] == "auto"


def test_against_an_earlier_run(tmp_path: Path, simulate: Simulate) -> None:
    before = tmp_path / "before.json"
    simulate(Machine(machine(), 0.02))
    assert invoke("--json-file", before).exit_code == 0
    simulate(Machine(machine(), 0.02, lambda _: 1.5, seed=1))
    result = invoke("--against", before)
    assert result.exit_code == 0, result.output
    assert "0 of 2 rows of ours lost speed" in result.stdout
    slower = Machine(machine(ghosted_fast=1.1), 0.02, seed=2)
    simulate(slower)
    result = invoke("--against", before)
    assert result.exit_code == 1
    assert "1 of 2 rows of ours lost speed beyond noise" in result.stdout and said(result) == ""
    found = json.loads(invoke("--against", before, "--json").stdout)["changes"]
    assert [item["verdict"] for item in found] == ["loss", *["no change seen"] * 3]


def test_a_loss_is_measured_once_more(
    tmp_path: Path, simulate: Simulate, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tmp_path / "before.json"
    simulate(Machine(machine(), 0.01))
    invoke("--json-file", before)
    machines = [Machine(machine(ghosted_fast=1.3), 0.01), Machine(machine(), 0.01, seed=1)]
    runs, run_plans = [], runner.run_plans

    def each_on_its_own(*arguments: Any, **options: Any) -> Any:
        simulate(machines[len(runs)])
        runs.append(arguments)
        plans = [machines[len(runs) - 1].plan()]
        return run_plans(plans, *arguments[1:], **options)

    monkeypatch.setattr(runner, "run_plans", each_on_its_own)
    result = invoke("--against", before)
    assert len(runs) == 2 and result.exit_code == 0
    assert "0 of 2 rows of ours lost speed" in result.stdout


def test_ctrl_c_shows_what_is_known(
    tmp_path: Path, simulate: Simulate, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulated = Machine(machine(), 0.01)
    simulate(simulated)
    plans = [simulated.plan(f"d=8 rows={index}") for index in range(3)]
    monkeypatch.setattr(CaseArgs, "plans", lambda self: plans)
    measured, measure = list[object](), runner.measure

    def interrupted(*arguments: Any) -> Any:
        if measured:
            raise KeyboardInterrupt
        measured.append(arguments)
        return measure(*arguments)

    monkeypatch.setattr(runner, "measure", interrupted)
    path = tmp_path / "rows.csv"
    result = invoke("--csv", path)
    assert result.exit_code == 130
    assert "d=8 rows=0" in result.stdout and "interrupted: 1 cases" in result.stdout
    assert len(path.read_text().splitlines()) == 1 + 4
    data = json.loads(invoke("--json").stdout)
    assert not data["complete"] and data["cases"] == []


def test_which_cases_are_measured() -> None:
    found = [str(plan) for plan in CaseArgs(width=[64, 64]).plans()]
    assert found == [
        "gram_update G plain d=64 T=2048 bfloat16",
        "gram_update C plain d=64 T=2048 bfloat16",
        "gram_update G+C plain d=64 T=2048 bfloat16",
        "gram_update G+C normed d=64 T=2048 bfloat16",
        "ghost_apply d=64 rows=1 bfloat16",
        "ghost_apply d=64 rows=16 bfloat16",
        "ghost_apply d=64 rows=512 bfloat16",
        "ghost_solve d=64 float64",
        "divergence KL words=49152 rows=256 bfloat16",
        "divergence KL+gradient words=49152 rows=256 bfloat16",
        "divergence local model words=49152 rows=256 bfloat16",
    ]
    chosen = CaseArgs(
        operator=["ghost_solve", "ghost_apply"], width=[8, 16], rows=[3], dtype=["fp16", "float32"]
    )
    assert [str(plan) for plan in chosen.plans()] == [
        "ghost_solve d=8 float64",
        "ghost_solve d=16 float64",
        "ghost_apply d=8 rows=3 float16",
        "ghost_apply d=8 rows=3 float32",
        "ghost_apply d=16 rows=3 float16",
        "ghost_apply d=16 rows=3 float32",
    ]


def test_defaults_are_those_of_the_library() -> None:
    assert EffortArgs().effort() == runner.Effort()
    assert CaseArgs().setting().backend == "auto"
