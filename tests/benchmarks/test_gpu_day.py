"""The day with a GPU, tried out without one: its parts, its state, and what it measures."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support.benchmark_module import BENCHMARKS, load_benchmark

from ghosted_fast.bench_ops import timers
from ghosted_fast.errors import GateError

CPU = torch.device("cpu")


@pytest.fixture
def day(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_benchmark("gpu_day", monkeypatch)


@pytest.fixture
def gpu(day: ModuleType) -> Any:
    import gpu.models
    import gpu.page
    import gpu.plan
    import gpu.running

    return gpu


def setting(gpu: Any, tmp_path: Path, device: str = "cpu") -> Any:
    return gpu.plan.Setting(device, "tiny", tmp_path)


def python_part(gpu: Any, code: str, must_say: str = "", program: str = "") -> Any:
    command = gpu.plan.Command([sys.executable, "-c", code], {"FOUND": "yes"}, must_say)
    return gpu.plan.Part("part", "what it shows", 5, lambda _: command, program)


def test_the_parts_fit_their_limit_and_the_day(gpu: Any) -> None:
    known = gpu.plan.parts()
    names = [part.name for part in known]
    assert len(set(names)) == len(names)
    assert {"build", "tests", "memcheck", "racecheck", "synccheck", "initcheck"} < set(names)
    assert names.index("tests") < names.index("gram_update_batch") < names.index("speed")
    assert all(part.seconds <= 0.7 * gpu.plan.LIMIT for part in known)
    assert gpu.plan.LIMIT <= 8 * 60


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_commands_name_what_is_there_and_fetch_nothing(
    gpu: Any, tmp_path: Path, device: str
) -> None:
    for part in gpu.plan.parts():
        command = part.command(setting(gpu, tmp_path, device))
        text = " ".join(command.words)
        for path in re.findall(r"(?<!\S)tests/\S+", text):
            assert (gpu.plan.ROOT / path).exists(), path
        assert "install" not in text or "--no-index --no-deps" in text
        if part.program:
            assert command.words[0] == part.program
        if "pytest" in command.words and device == "cuda":
            assert not re.search(command.must_say, "3 skipped in 1 s")
            assert re.search(command.must_say, "10 passed, 3 skipped in 1 s")


def test_every_test_for_a_gpu_is_run(gpu: Any, tmp_path: Path) -> None:
    (part,) = (part for part in gpu.plan.parts() if part.name == "tests")
    named = [gpu.plan.ROOT / word for word in part.command(setting(gpu, tmp_path)).words]
    files = sorted((gpu.plan.ROOT / "tests").rglob("test_*.py"))
    marked = [path for path in files if re.search(r"\bmark\.gpu\b", path.read_text())]
    assert len(marked) >= 5
    for path in marked:
        assert path in named or set(path.parents) & set(named), path


def test_the_tests_that_are_named_are_found(gpu: Any, tmp_path: Path) -> None:
    for name in ("memcheck", "counters"):
        (part,) = (part for part in gpu.plan.parts() if part.name == name)
        words = list(part.command(setting(gpu, tmp_path)).words)
        words = words[words.index(sys.executable) :]
        done = subprocess.run(
            [*words, "--collect-only", "-v"], cwd=gpu.plan.ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout
        found = [line for line in done.stdout.splitlines() if "::" in line]
        if name == "memcheck":
            kinds = ("test_values", "test_bad_token_is_named", "test_ghost_apply")
            assert all(any(kind in line for line in found) for kind in kinds)
        assert 1 <= len(found) <= 20


def test_bench_ops_knows_its_options(gpu: Any, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from ghosted_fast.cli.app import app

    text = CliRunner().invoke(app, ["bench-ops", "--help"], env={"COLUMNS": "200"}).stdout
    for part in gpu.plan.parts():
        words = part.command(setting(gpu, tmp_path)).words
        if "bench-ops" in words:
            asked = [word for word in words if word.startswith("--")]
            assert asked and all(option in text for option in asked)


def test_a_part_that_is_done_is_not_run_again(gpu: Any, tmp_path: Path) -> None:
    here = setting(gpu, tmp_path)
    code = "import os; print(os.environ['FOUND'])"
    part = python_part(gpu, code, "yes")
    assert gpu.running.chosen([part], here, [], []) == [part]
    assert gpu.running.run_part(part, here)["status"] == "done"
    assert (tmp_path / "logs" / "part.log").read_text() == "yes\n"
    assert gpu.running.chosen([part], here, [], []) == []
    assert gpu.running.chosen([part], here, [], ["part"]) == [part]
    elsewhere = gpu.plan.Setting("cuda", "tiny", tmp_path)
    assert gpu.running.chosen([part], elsewhere, [], []) == [part]
    with pytest.raises(SystemExit, match="expected parts of part, got 'other'"):
        gpu.running.chosen([part], here, ["other"], [])


@pytest.mark.parametrize(
    ("code", "must_say", "program", "status"),
    [
        ("raise SystemExit(3)", "", "", "failed"),
        ("print('3 skipped')", r"\d+ passed", "", "failed"),
        ("import time; print('began', flush=True); time.sleep(60)", "", "", "too late"),
        ("", "", "no-such-sanitizer", "absent"),
    ],
)
def test_a_part_that_ends_badly_is_told_and_comes_again(
    gpu: Any, tmp_path: Path, code: str, must_say: str, program: str, status: str
) -> None:
    here, part = setting(gpu, tmp_path), python_part(gpu, code, must_say, program)
    limit = 2.0 if status == "too late" else 60.0
    assert gpu.running.run_part(part, here, limit)["status"] == status
    assert gpu.running.chosen([part], here, [], []) == [part]
    gpu.page.write_page([part], here)
    assert f"## part: {status}" in (tmp_path / gpu.page.PAGE_FILE).read_text()


@pytest.mark.slow
def test_a_dry_run_lists_the_parts(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu_day.py"), "--dry-run", "--output", str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "| gram_update_fold |" in done.stdout and "minutes are left" in done.stdout
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_what_to_do(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu_day.py"), "--output", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "--device cpu --shape tiny" in done.stderr


@pytest.mark.slow
def test_a_step_in_a_graph_can_be_replayed_any_number_of_times(gpu: Any) -> None:
    shape = gpu.models.WORK["tiny"]
    model = gpu.models.dense_model(shape, CPU)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not model.training
    with torch.no_grad():
        step = gpu.models.decode_step(model, CPU, 18)  # room for one token after the prompt
        first = step()
        assert all(torch.equal(step(), first) for _ in range(5))


@pytest.mark.slow
def test_a_wrong_step_is_not_timed(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.models, "_GATE", 0.0)
    model = gpu.models.dense_model(gpu.models.WORK["tiny"], CPU)
    monkeypatch.setattr(gpu.models, "relative_rms", lambda step, whole: 1e-3)
    with torch.no_grad(), pytest.raises(GateError, match="a static cache is off by"):
        gpu.models.decode_step(model, CPU, 20)


@pytest.mark.slow
def test_every_figure_of_a_model_is_on_the_page(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timers, "_LONG_CALL", 0.0)
    here = setting(gpu, tmp_path)
    known = [part for part in gpu.plan.parts() if part.name in gpu.plan.MODEL_PARTS]
    for part in known:
        gpu.models.run_model_part(part.name, here)
        state = {"status": "done", "seconds": 1.0, "device": "cpu", "shape": "tiny", "said": []}
        path = gpu.running.state_file(part.name, here)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(state))
    found = gpu.page.write_page(known, here)["parts"]
    models = {"dense", "pruned", "ghosted"}
    assert set(found["speed"]["result"]["batch sizes"]) == {"1", "2"}
    assert set(found["speed"]["result"]["batch sizes"]["2"]) == models
    steps = found["graphs"]["result"]["steps"]
    assert set(steps) == {"prefill", "decode"}
    assert set(steps["prefill"]) == set(steps["decode"]) == models
    passes = found["calibration"]["result"]["passes"]
    assert passes["all intervals"]["intervals"] == 7
    assert passes["one interval"]["ratio"]["low"] > 0
    for phase, tokens in (("prefill", 16), ("decode", 1)):
        step = steps[phase]["ghosted"]
        assert step["to_dense"]["low"] > 0
        assert step["tokens_per_s"]["value"] == pytest.approx(1e3 * tokens / step["ms"]["value"])
    fits = found["fit"]["result"]["fits"]
    assert (
        fits["0 corrections"]["phases"]["correct"] == 0 < fits["1 corrections"]["phases"]["correct"]
    )
    sweeps = found["sweep"]["result"]["sweeps"]
    assert sweeps["0 corrections"]["read_bytes"] < sweeps["1 corrections"]["read_bytes"]
    assert all(item["planned_bytes"] > 0 for item in sweeps.values())
    page = (tmp_path / gpu.page.PAGE_FILE).read_text()
    for text in (
        "decode tok/s",
        "ms by calls",
        "| prefill | pruned |",
        "collected s",
        "phases, s",
        "planned GiB",
        "1024 tokens.",
    ):
        assert text in page


@pytest.mark.slow
def test_the_operators_figures_are_on_the_page(gpu: Any, tmp_path: Path) -> None:
    here = setting(gpu, tmp_path)
    (part,) = (part for part in gpu.plan.parts() if part.name == "ghost_solve")
    assert gpu.running.run_part(part, here)["status"] == "done"
    found = gpu.page.write_page([part], here)
    assert found["parts"]["ghost_solve"]["result"]["cases"]
    assert "| torch LU |" in (tmp_path / gpu.page.PAGE_FILE).read_text()
