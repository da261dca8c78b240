"""The roofs: what is compiled, what stands in for it, and the least time that follows."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

import ghosted_fast
from ghosted_fast.bench_ops import roofs
from ghosted_fast.bench_ops.roofs import KINDS, MEMORY, Roof, Roofs, measure_roofs, roofs_of

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofs, "_STREAM_BYTES", 1 << 16)
    monkeypatch.setattr(roofs, "_STEPS", 100)
    monkeypatch.setattr(roofs, "_MATRIX_SIZE", 8)


def test_work_of_the_compiled_roofs() -> None:
    if roofs._library() is None:
        pytest.skip("no compiler")
    found = roofs_of(CPU)
    assert "compiled" in found.source and set(found.limits) == {MEMORY, *KINDS}
    threads = torch.get_num_threads()
    assert found.limits[MEMORY].work == (1 << 16) // threads // 64 * 64 * threads
    # 12 registers of 16, 32 or 64 bytes, two flops for each number, 100 steps, on each thread.
    assert found.limits["fp32"].work / (100 * threads * 12 * 2) in (4, 8, 16)
    assert found.limits["fp32"].work == 2 * found.limits["fp64"].work
    for roof in found.limits.values():
        roof.run()


def test_the_source_is_in_the_package() -> None:
    folder = Path(ghosted_fast.__file__).parent
    assert (folder / "bench_ops" / "roof.cpp").is_file()
    text = (folder.parent / "pyproject.toml").read_text()
    assert '"ghosted_fast.bench_ops" = ["*.cpp"]' in text


@pytest.mark.parametrize("error", [OSError("no such file"), subprocess.CalledProcessError(1, "c")])
def test_torch_stands_in_without_a_compiler(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(roofs.subprocess, "run", no_compiler)
    monkeypatch.setattr(roofs, "_library", roofs._library.__wrapped__)
    found = roofs_of(CPU)
    assert found.source == "torch's sum and products"
    assert found.limits[MEMORY].work == 1 << 16
    assert {found.limits[kind].work for kind in KINDS} == {2.0 * 8**3}
    for roof in found.limits.values():
        roof.run()


def test_the_named_compiler_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def noted(command: list[str], **_: object) -> None:
        commands.append(command)
        raise OSError

    monkeypatch.setattr(roofs.subprocess, "run", noted)
    monkeypatch.setattr(roofs, "compiler", lambda: "ccache my-g++")
    assert roofs._library.__wrapped__() is None
    assert commands[0][:2] == ["ccache", "my-g++"]


def test_other_devices_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofs, "_DEVICE_STREAM_BYTES", 1 << 10)
    found = roofs_of(torch.device("meta"))
    assert found.source == "torch's copy and products"
    assert found.limits[MEMORY].work == 2 << 10, "read and written"
    assert found.limits["bf16"].work == 2.0 * 8192**3


def test_a_slower_bf16_is_taken_for_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, slow = Roof(lambda: None, 10.0), Roof(lambda: None, 1.0)
    monkeypatch.setattr(roofs, "warm_sample", lambda run, device, calls: 1.0)
    assert roofs._with_bf16({"fp32": fast, "bf16": slow})["bf16"] is fast
    assert roofs._with_bf16({"fp32": slow, "bf16": fast})["bf16"] is fast
    assert roofs._with_bf16({"fp32": fast})["bf16"] is fast


def test_least_seconds() -> None:
    limits = {name: Roof(lambda: None, 10.0) for name in (MEMORY, "bf16", "fp32")}
    samples = {MEMORY: [1.0, 2.0], "bf16": [3.0, 1.0], "fp32": [1.0, 1.0]}.__getitem__
    found = Roofs("", limits)
    assert found.least_seconds(20.0, {"fp32": 5.0}, samples) == ([2.0, 4.0], MEMORY)
    # Round by round the larger of the two: bytes take 1 and 2, the products 4 and 2.
    least = found.least_seconds(10.0, {"bf16": 10.0, "fp32": 10.0}, samples)
    assert least == ([4.0, 2.0], "bf16+fp32")


def test_what_the_processor_gives() -> None:
    found = measure_roofs(seconds=0.01)
    assert set(found) == {MEMORY, *KINDS} and all(value > 0 for value in found.values())
