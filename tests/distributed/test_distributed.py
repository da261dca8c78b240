"""Processes that share a fit: the same result as one, the same bits on all, and no hang."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import rank_programs
from support.healed_models import visible
from support.spoken_text import spoken_with_gaps
from support.started_ranks import WAIT_S, run_ranks, start
from support.tiny_text import TEXT, save_tiny_model

from ghosted_fast.cli.app import app
from ghosted_fast.errors import CalibrationError
from ghosted_fast.options import PerplexityBound
from ghosted_fast.testing import relative_rms, tiny_model

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("size", "batches", "first_state"), [(2, 7, "auto"), (4, 6, "on"), (4, 4, "off")]
)
def test_statistics_are_those_of_one_process(
    tmp_path: Path, size: int, batches: int, first_state: str
) -> None:
    """Of 4 batches one holds no token, so that a rank has none."""
    expected = rank_programs.statistics(batches, first_state)
    for found in run_ranks(rank_programs.statistics, size, tmp_path, batches, first_state):
        for mine, one in zip(found, expected, strict=True):
            assert mine.dtype == one.dtype
            assert relative_rms(mine, one) <= 1e-12


@pytest.mark.parametrize(("size", "kept"), [(2, True), (4, False)])
def test_a_sweep_chooses_and_fits_as_that_of_one_process(
    tmp_path: Path, size: int, kept: bool
) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    states = tmp_path / "states" if kept else None
    removed, scores, ghosts = rank_programs.swept(tmp_path / "dense", None)
    results = run_ranks(rank_programs.swept, size, tmp_path, tmp_path / "dense", states)
    for found in results:
        assert found[0] == removed
        assert found[1] == pytest.approx(scores, rel=1e-6)
        for mine, first, one in zip(found[2], results[0][2], ghosts, strict=True):
            assert torch.equal(mine, first), "all ranks hold the same bits"
            assert relative_rms(mine, one) <= 1e-6


@pytest.mark.parametrize(
    ("size", "criterion", "bound"), [(2, "ghost", 1.1), (3, "lorp", 2.5), (4, "lorp", 2.5)]
)
def test_a_sweep_keeps_a_bound_as_that_of_one_process(
    tmp_path: Path, size: int, criterion: str, bound: float
) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "dense")
    asked = tmp_path / "dense", spoken_with_gaps(model)
    removed, tried_alone, ghosts = rank_programs.bounded(*asked, None, bound, criterion)
    assert [count for count, _ in tried_alone] == [1, 2, 3, 4]
    given = (*asked, tmp_path / "states", bound, criterion)
    results = run_ranks(rank_programs.bounded, size, tmp_path, *given)
    for found in results:
        assert found[0] == removed
        assert [count for count, _ in found[1]] == [count for count, _ in tried_alone]
        values = [value for _, value in tried_alone]
        assert [value for _, value in found[1]] == pytest.approx(values, rel=1e-5, abs=1e-6)
        for mine, first, one in zip(found[2], results[0][2], ghosts, strict=True):
            assert torch.equal(mine, first), "all ranks hold the same bits"
            assert relative_rms(mine, one) <= 1e-6


@pytest.mark.parametrize(
    ("remove", "stops"), [(2, [1, 3, 5, 6, 8, 11]), (PerplexityBound(1e9), [7, 9, 13, 16, 19, 25])]
)
def test_ranks_that_were_stopped_apart_go_on_together(
    tmp_path: Path, remove: int | PerplexityBound, stops: list[int]
) -> None:
    """One has kept what another has not, so that other candidates ride there."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "dense")
    texts = spoken_with_gaps(model)
    asked = tmp_path / "dense", texts, tmp_path / "states", remove, stops
    plain = rank_programs.swept_ghosts(*asked[:2], remove)
    for rank in run_ranks(rank_programs.stopped_apart, 2, tmp_path, *asked):
        assert len(rank) == len(stops)
        for removed, ghosts in rank:
            assert removed == plain[0]
            for mine, one in zip(ghosts, plain[1], strict=True):
                assert relative_rms(mine, one) <= 1e-6


@pytest.mark.parametrize("size", [2, 3])
def test_a_sweep_corrects_as_that_of_one_process(tmp_path: Path, size: int) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    _, _, (before,) = rank_programs.swept(tmp_path / "dense", None)
    _, _, (alone,) = rank_programs.swept(tmp_path / "dense", None, 2)
    results = run_ranks(rank_programs.swept, size, tmp_path, tmp_path / "dense", tmp_path / "s", 2)
    assert relative_rms(before, alone) > 1e-3
    for _, _, (mine,) in results:
        assert torch.equal(mine, results[0][2][0]), "all ranks hold the same bits"
        assert relative_rms(mine, alone) <= 1e-6, "in passes of the same rows"


@pytest.mark.parametrize("size", [2, 4])
def test_every_criterion_chooses_as_one_process_does(tmp_path: Path, size: int) -> None:
    expected = rank_programs.choices()
    first, *others = run_ranks(rank_programs.choices, size, tmp_path)
    assert all(other == first for other in others)
    for criterion, (removed, scores) in expected.items():
        assert first[criterion][0] == removed
        assert first[criterion][1] == pytest.approx(scores, rel=1e-6), criterion


@pytest.mark.parametrize("size", [2, 4])
def test_checkpoints_are_the_same_on_all_ranks(tmp_path: Path, size: int) -> None:
    single, shared = tmp_path / "single", tmp_path / "shared"
    rank_programs.checkpoints(single)
    shared.mkdir()
    assert run_ranks(rank_programs.checkpoints, size, shared, shared) == [None] * size
    for name in ("ghosted", "patched"):
        for file in (single / f"{name}0").iterdir():
            contents = [(shared / f"{name}{rank}" / file.name).read_bytes() for rank in range(size)]
            assert all(content == contents[0] for content in contents), (name, file.name)
        check_weights(shared / f"{name}0", single / f"{name}0")
    check_weights(shared / "ghosted", single / "ghosted")


@pytest.mark.parametrize("size", [2, 3])
def test_healing_is_that_of_one_process(tmp_path: Path, size: int) -> None:
    expected, curve, unchanged = rank_programs.healing(tmp_path / "single")
    before = tiny_model("llama").state_dict()
    (tmp_path / "shared").mkdir()
    first, *others = run_ranks(rank_programs.healing, size, tmp_path / "shared", tmp_path / "ranks")
    assert unchanged and first[2] and all(other[2] for other in others)
    assert first[1] == pytest.approx(curve, rel=1e-4) and curve[-1] < curve[0]
    for other in others:
        assert other[1] == first[1]
        assert all(torch.equal(other[0][name], value) for name, value in first[0].items())
    name = "model.layers.1.mlp.up_proj.weight"
    change, wanted = (found[name] - before[name] for found in (first[0], expected))
    assert wanted.abs().max() > 1e-3 and relative_rms(change, wanted) < 1e-2
    assert sorted(item.name for item in (tmp_path / "ranks").iterdir()) == ["state0"]


@pytest.mark.parametrize(
    ("size", "family", "layer"),
    [
        (3, "llama", "model.layers.1.mlp.up_proj.weight"),
        (4, "mixtral", "model.layers.1.self_attn.q_proj.weight"),
        (2, "gpt2", "transformer.h.1.mlp.c_fc.weight"),
    ],
)
def test_healing_of_sharded_weights_is_that_of_whole_ones(
    tmp_path: Path, size: int, family: str, layer: str
) -> None:
    """To the bit that of as many ranks, and that of one process as near as theirs."""
    for name in ("sharded", "whole", "single"):
        (tmp_path / name).mkdir()
    program, folder = rank_programs.sharded_healing, tmp_path / "sharded"
    expected, curve, _ = program(family, tmp_path / "single", True)  # one rank shares nothing
    whole, *_ = run_ranks(program, size, tmp_path / "whole", family, tmp_path / "whole", False)
    for found in run_ranks(program, size, folder, family, folder, True):
        assert found[1] == whole[1] == pytest.approx(curve, rel=1e-4) and curve[-1] < curve[0]
        assert all(torch.equal(found[0][name], value) for name, value in whole[0].items())
        held = found[2]
        assert held["all"] / size <= held["kept"] <= 1.01 * held["all"] / size
        assert 0 < held["most"] <= 1.01 * held["layer"] < 0.2 * held["all"]
    assert whole[2]["kept"] == whole[2]["all"] == held["all"]
    before = visible(tiny_model(family)).state_dict()[layer]
    change, wanted = (weights[layer] - before for weights in (whole[0], expected))
    assert wanted.abs().max() > 1e-3 and relative_rms(change, wanted) < 1e-2
    saved = load_file(folder / "saved" / "model.safetensors")
    one = load_file(tmp_path / "whole" / "saved" / "model.safetensors")
    assert saved.keys() == one.keys()
    assert all(torch.equal(saved[name], value) for name, value in one.items())


def test_an_error_in_a_pass_of_sharded_weights_is_an_error_of_all(tmp_path: Path) -> None:
    first, second, third = run_ranks(rank_programs.sharded_poisoned, 3, tmp_path)
    assert second == ("ValueError", "this layer is broken")
    assert first == third == ("RankError", "rank 1 failed: ValueError: this layer is broken")


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        ("fsdp", "UnsupportedModelError", "whole weights on every rank, got a DTensor in "),
        ("healed", "ArgumentError", "first (ghosted_fast.unshard_weights)"),
    ],
)
def test_weights_that_are_spread_already_are_refused(
    tmp_path: Path, what: str, error: str, message: str
) -> None:
    for name, text in run_ranks(rank_programs.healed_as_it_is, 2, tmp_path, what):
        assert name == error and message in text


def check_weights(folder: Path, expected_folder: Path) -> None:
    found, expected = (load_file(item / "model.safetensors") for item in (folder, expected_folder))
    assert found.keys() == expected.keys()
    for key, weight in expected.items():
        assert relative_rms(found[key], weight) <= 1e-6, key


def test_an_error_of_one_rank_is_an_error_of_all(tmp_path: Path) -> None:
    first, second, third = run_ranks(rank_programs.poisoned, 3, tmp_path)
    assert second[0] == "NonFiniteError" and "boundaries 2 and 4" in second[1]
    for other in (first, third):
        assert other == ("RankError", f"rank 1 failed: NonFiniteError: {second[1]}")


def test_an_error_of_all_ranks_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError) as raised:
        rank_programs.too_little_text()
    found = run_ranks(rank_programs.too_little_text, 2, tmp_path)
    assert found == [("CalibrationError", str(raised.value))] * 2


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("text", "expected the same batches on every rank, got others on rank 1 than on rank 0"),
        ("removed", "same removed on every rank, got [2, 3] on rank 0 and [2] on rank 1"),
        ("function", "same removed on every rank, got [2, 3] on rank 0 and None on rank 1"),
        ("model", "expected the same weights of the model on every rank"),
    ],
)
def test_ranks_that_were_called_differently(tmp_path: Path, what: str, message: str) -> None:
    for name, text in run_ranks(rank_programs.called_differently, 2, tmp_path, what):
        assert name == "ArgumentError" and message in text


@pytest.mark.parametrize("batches", [0, 2])
def test_a_rank_that_dies_ends_the_others(tmp_path: Path, batches: int) -> None:
    """In its first batch, where the others wait for a floor, or later."""
    first, second, third = run_ranks(rank_programs.dies, 3, tmp_path, batches)
    assert second is None
    for name, message in (first, third):
        assert name == "RanksLostError" and "a process ended, or did not answer" in message


def test_nobody_is_waited_for_longer_than_the_time_out(tmp_path: Path) -> None:
    run_ranks(rank_programs.falls_silent, 2, tmp_path, 200.0, timeout_s=5.0, impatient=True)
    (name, _), seconds = torch.load(tmp_path / "result0")
    assert name == "RanksLostError" and seconds < 200.0


def test_one_rank_may_work_alone(tmp_path: Path) -> None:
    (name, message), removed = run_ranks(rank_programs.one_alone, 2, tmp_path, tmp_path)
    assert name == "ArgumentError" and "ghosted_fast.distributed.ignoring_group()" in message
    assert removed == [2, 3]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    text = folder / "texts.txt"
    text.write_text("\n\n".join([TEXT] * 120))
    return save_tiny_model(folder / "tiny"), text


def fit_command(inputs: tuple[Path, Path], output: Path, removed: str = "2-3") -> list[str]:
    model, text = map(str, inputs)
    command = ["fit", "--model", model, "--calibration", text, "--removed", removed]
    command += ["--output", str(output), "--tokens", "1024", "--sequence-length", "32", "--json"]
    return [*command, "--corrections", "1", "--evaluation", text, "--evaluation-tokens", "256"]


def test_torchrun_gives_the_checkpoint_of_one_process(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    """Started as a user does: one result on stdout, nothing but the checkpoint on the disk."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = fit_command(inputs, tmp_path / "shared")
    finished = subprocess.run([*launch, "-m", "ghosted_fast", *command], capture_output=True,
                              text=True, timeout=WAIT_S)  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr.count("Loading weights: 100%") <= 1
    assert json.loads(finished.stdout)["models"][2]["name"] == "ghosted"
    app(fit_command(inputs, tmp_path / "single"), standalone_mode=False)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["shared", "single"]
    check_weights(tmp_path / "shared", tmp_path / "single")


def run_command(command: list[str], folder: Path, dies_in: int | None = None) -> list[Any]:
    """Return (status, stdout, stderr) of each of two processes of the command line."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    calls = [(rank, 2, port, command, dies_in, folder) for rank in range(2)]
    start(rank_programs.command_line, calls, impatient=False)
    files = [folder / f"result{rank}" for rank in range(2)]
    return [torch.load(file) if file.exists() else None for file in files]


def test_command_line_ends_when_a_process_dies(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "outputs" / "ghosted"
    output.parent.mkdir()
    (status, out, err), killed = run_command(fit_command(inputs, output), tmp_path, dies_in=1)
    assert (status, out, killed) == (1, "", None)
    assert "error (rank 0): rank 0 has lost the others" in err
    assert not list(output.parent.iterdir())


@pytest.mark.parametrize("shared", [[], ["--shard"]])
def test_torchrun_heals_as_one_process_does(
    inputs: tuple[Path, Path], tmp_path: Path, shared: list[str]
) -> None:
    ghosted = tmp_path / "ghosted"
    app(fit_command(inputs, ghosted), standalone_mode=False)
    command = ["heal", str(ghosted), "--dense", str(inputs[0]), "--calibration", str(inputs[1])]
    command += ["--tokens", "2k", "--sequence-length", "32", "--json", "--output"]
    first, second = run_command([*command, str(tmp_path / "shared"), *shared], tmp_path)
    assert first[0] == 0, first[2]
    assert json.loads(first[1])["healing"]["best_tokens"] > 0 and second[:2] == (0, "")
    app([*command, str(tmp_path / "single")], standalone_mode=False)
    assert not list(tmp_path.glob("*.heal"))
    names = ("shared", "single", "ghosted")
    found, expected, before = (load_file(tmp_path / n / "model.safetensors") for n in names)
    assert any(not torch.equal(expected[key], before[key]) for key in expected)
    for key, weight in expected.items():
        assert relative_rms(found[key], weight) <= 1e-4, key


def test_command_line_says_once_what_failed(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    first, second = run_command(fit_command(inputs, taken), tmp_path)
    assert first[:2] == (1, "") and "exists: name another" in first[2]
    assert second[:2] == (1, "") and "error" not in second[2]


def test_other_verbs_are_refused(tmp_path: Path) -> None:
    for status, _, err in run_command(["doctor"], tmp_path):
        assert status == 2
        assert "only fit, heal and select share their work" in " ".join(
            err.replace("│", " ").split()
        )
