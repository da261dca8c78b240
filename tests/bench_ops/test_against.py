"""Two runs compared: a planted loss is found, noise is not, and other machines are refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_ops.simulated import Machine, machine

from ghosted_fast.bench_ops.against import (
    Change,
    Earlier,
    change_lines,
    change_table,
    changes,
    confirmed,
    read_earlier,
    suspects,
)
from ghosted_fast.bench_ops.cases import OURS
from ghosted_fast.bench_ops.rows import Row, Run
from ghosted_fast.errors import ArgumentError
from ghosted_fast.timing.estimates import Estimate

NOISE = 0.04
INT8 = f"{OURS} int8"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def saved(run: Run, folder: Path) -> Path:
    path = folder / "before.json"
    path.write_text(json.dumps(run.to_dict()))
    return path


def compared(
    monkeypatch: pytest.MonkeyPatch, folder: Path, seed: int, slower: float = 1.0, **now: float
) -> dict[str, Change]:
    before = Machine(machine(), NOISE, seed=3 * seed).full_run(monkeypatch)
    earlier, found = read_earlier(saved(before, folder)), list[Change]()
    for turn in (1, 2):
        after = Machine(machine(**now), NOISE, lambda _: slower, seed=3 * seed + turn)
        again = changes(earlier, after.full_run(monkeypatch))
        found = confirmed(found, again) if found else again
        if not any(item.verdict == "loss" for item in found):
            break
    return {item.variant: item for item in found}


def test_a_planted_loss_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for seed in range(10):
        found = compared(monkeypatch, tmp_path, seed, ghosted_fast=1.05)
        assert found[OURS].verdict == "loss" and found[OURS].is_loss
        assert found[OURS].of == "share of the roof"
        assert found[INT8].verdict == "no change seen"


def test_a_loss_that_does_not_come_again_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = Machine(machine()).full_run(monkeypatch)
    earlier = read_earlier(saved(before, tmp_path))
    once = changes(earlier, Machine(machine(ghosted_fast=1.2)).full_run(monkeypatch))
    assert suspects(once) == {("ghost_apply", "d=8 rows=1", "float32")}
    found = confirmed(once, changes(earlier, Machine(machine()).full_run(monkeypatch)))
    assert not any(item.is_loss for item in found)
    assert float(found[0].now) == pytest.approx(0.4)
    assert confirmed(once, once) == confirmed(once, []) == once


def test_a_planted_gain_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = compared(monkeypatch, tmp_path, 0, ghosted_fast=0.95)
    assert found[OURS].verdict == "gain" and not found[OURS].is_loss


def test_noise_is_no_loss(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nor is a slower machine: its roofs are slower too."""
    for seed in range(40):
        found = compared(monkeypatch, tmp_path, seed, slower=1.0 + 0.02 * seed)
        assert not [item for item in found.values() if item.verdict != "no change seen"]


def test_a_rival_that_became_slower_is_no_loss_of_ours(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = compared(monkeypatch, tmp_path, 0, torch=1.3)
    assert found["torch"].verdict == "loss" and not found["torch"].is_loss
    assert not suspects(found.values())
    columns, lines = change_table(list(found.values()))
    assert all(len(line) == len(columns) for line in lines)
    assert lines[2][3] == "torch" and lines[2][-1] == "loss (rival)"


def test_other_roofs_are_not_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Then times are, and a roof of twice the speed halves no share."""
    before = Machine(machine(), 0.01).full_run(monkeypatch)
    after = Machine(machine(memory=0.5), 0.01, seed=1).full_run(monkeypatch)
    earlier = read_earlier(saved(before, tmp_path))
    assert {item.verdict for item in changes(earlier, after) if item.is_ours} == {"loss"}
    after.roof_source = "another way"
    found = changes(earlier, after)
    assert {item.of for item in found} == {"speed"}
    assert {item.verdict for item in found} == {"no change seen"}
    assert float(found[0].now) == pytest.approx(200.0, rel=0.05)


def test_less_than_the_precision_is_no_loss(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = Machine(machine()).full_run(monkeypatch)
    after = Machine(machine(ghosted_fast=1.008)).full_run(monkeypatch)
    found = changes(read_earlier(saved(before, tmp_path)), after)
    assert found[0].now.high < found[0].before.low and found[0].verdict == "no change seen"
    after = Machine(machine(ghosted_fast=1.012)).full_run(monkeypatch)
    assert changes(read_earlier(saved(before, tmp_path)), after)[0].verdict == "loss"


@pytest.mark.parametrize("coarse", ["before", "after"])
def test_the_coarser_precision_of_the_two_holds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, coarse: str
) -> None:
    before = Machine(machine()).full_run(monkeypatch)
    after = Machine(machine(ghosted_fast=1.03)).full_run(monkeypatch)
    (before if coarse == "before" else after).settings = {"precision": 0.05}
    found = changes(read_earlier(saved(before, tmp_path)), after)
    assert found[0].now.high < found[0].before.low and found[0].verdict == "no change seen"


def test_intervals_that_overlap_are_no_loss(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The medians are a tenth apart, and each is known to a third."""
    run = Machine(machine()).full_run(monkeypatch)

    def known_to_a_third(share: float) -> Run:
        wide = Estimate(share, share / 1.3, share * 1.3, 9)
        rows = [dataclasses.replace(row, roof_share=wide) for row in run.rows]
        return dataclasses.replace(run, cases=[dataclasses.replace(run.cases[0], rows=rows)])

    earlier = read_earlier(saved(known_to_a_third(0.5), tmp_path))
    for share in (0.45, 0.55):
        found = changes(earlier, known_to_a_third(share))
        assert {item.verdict for item in found} == {"no change seen"}
    assert change_lines(found)[1].startswith("in half of the rows a loss below 41% could not be")
    found = changes(earlier, known_to_a_third(0.25))
    assert found[0].verdict == "loss"
    assert change_lines(found)[0] == "2 of 2 rows of ours lost speed beyond noise"
    exact = changes(read_earlier(saved(run, tmp_path)), run)
    assert change_lines(exact) == ["0 of 2 rows of ours lost speed beyond noise"]


def test_rows_come_back_as_they_were(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = Machine(machine(), NOISE).full_run(monkeypatch)
    earlier = read_earlier(saved(run, tmp_path))
    assert list(earlier.rows.values()) == list(run.rows)
    assert all(isinstance(row, Row) for row in earlier.rows.values())


@pytest.fixture
def earlier(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Earlier:
    return read_earlier(saved(Machine(machine()).full_run(monkeypatch), tmp_path))


@pytest.mark.parametrize("key", ["processor", "device", "threads", "torch", "accelerator"])
def test_another_machine_is_refused_with_what_differs(earlier: Earlier, key: str) -> None:
    plans = [Machine(machine()).plan()]
    earlier.check(earlier.machine, plans)
    earlier.check({**earlier.machine, "ghosted_fast": "9.9"}, plans)
    there = earlier.machine.get(key, "none")
    with pytest.raises(ArgumentError, match="measure the earlier build here too") as caught:
        earlier.check({**earlier.machine, key: "else"}, plans)
    assert f"got {key} {there} there and else here:" in str(caught.value)


def test_no_case_in_common_is_refused(earlier: Earlier) -> None:
    with pytest.raises(ArgumentError, match="got none: it has ghost_apply d=8 rows=1 float32"):
        earlier.check(earlier.machine, [Machine(machine()).plan("d=9 rows=1")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "FileNotFoundError"),
        ("{", "JSONDecodeError"),
        ("[1]", "got other JSON"),
        ('{"models": []}', "got other JSON"),
        ('{"cases": [], "format": 0}', "in format 1, got format 0"),
        ('{"cases": [], "format": 1}', "'machine'"),
        ('{"cases": [{"rows": [{"ms": 3}]}], "format": 1}', "incomplete"),
    ],
)
def test_what_is_no_earlier_run_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "file.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ArgumentError, match="expected a file that bench-ops wrote") as caught:
        read_earlier(path)
    assert message in str(caught.value)


def test_changes_as_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found: dict[str, Any] = compared(monkeypatch, tmp_path, 0)[OURS].to_dict()
    assert json.loads(json.dumps(found)) == found
    assert found["before"]["low"] <= found["before"]["value"] <= found["before"]["high"]
