"""Tables, lines below them, CSV and the picture."""

from __future__ import annotations

import csv
import dataclasses
import io
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator

import pytest
import torch
from bench_ops.simulated import Machine, machine

from ghosted_fast.bench_ops import report
from ghosted_fast.bench_ops.cases import OURS
from ghosted_fast.bench_ops.plot import check_plot, roofline_svg
from ghosted_fast.bench_ops.rows import Run
from ghosted_fast.errors import MissingExtraError
from ghosted_fast.timing.conditions import Conditions
from ghosted_fast.timing.estimates import Estimate


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Machine(machine(), 0.02).full_run(monkeypatch)
    torch.set_num_threads(before)


def with_rows(run: Run, **changes: object) -> Run:
    case = run.cases[0]
    rows = [dataclasses.replace(row, **changes) for row in case.rows]  # type: ignore[arg-type]
    run.cases[0] = dataclasses.replace(case, rows=rows)
    return run


def test_a_table_for_each_operator(run: Run) -> None:
    ((title, columns, lines),) = report.tables(run)
    assert title == "ghost_apply, 1 thread"
    assert columns == report.COLUMNS
    assert [line[:4] for line in lines] == [
        ["d=8 rows=1", "float32", OURS, "native"],
        ["", "", f"{OURS} int8", "native"],
        ["", "", "torch", "torch"],
        ["", "", "other", "torch"],
    ]
    ms, _, _, share, ratio = lines[0][4:]
    assert ms.startswith(("5.", "4.9"))
    assert " ± " in ms and " ± " in share and "x ± " in ratio
    assert lines[2][-1] == "-"


def test_each_dtype_is_named_once(run: Run) -> None:
    (case,) = run.cases
    rows = [dataclasses.replace(row, dtype="bfloat16") for row in case.rows]
    run.cases.append(dataclasses.replace(case, rows=rows))
    ((_, _, lines),) = report.tables(run)
    named = [(index, line[:2]) for index, line in enumerate(lines) if line[0]]
    assert named == [(0, ["d=8 rows=1", "float32"]), (4, ["d=8 rows=1", "bfloat16"])]


def test_with_more_threads_there_is_a_column(run: Run) -> None:
    found = with_rows(run, threads=2, one_thread=Estimate(1.9, 1.88, 1.91, 20))
    ((title, columns, lines),) = report.tables(found)
    assert title == "ghost_apply, 2 threads" and columns[-1] == report.ONE_THREAD
    assert all(len(line) == len(columns) for line in lines)
    assert lines[0][-1] == "1.90x ± 0.02"


@pytest.mark.parametrize(
    ("ratio", "written"),
    [
        (Estimate(2.0, 1.98, 2.02, 20), "2.00x ± 0.02"),
        (Estimate(1.0, 0.98, 1.02, 20), "not told apart (± 0.02)"),
        (Estimate(2.0, 1.2, 4.0, 3), "1.2 to 4 x"),
        (Estimate(2.0, 0.1, 4.0, 3), "not told apart"),
        (Estimate(900.0, 2.0, 4e6, 2), "not known"),
    ],
)
def test_wide_intervals_are_shown_by_their_ends(run: Run, ratio: Estimate, written: str) -> None:
    rows = with_rows(run, ratios={"torch": ratio}, best_rival="torch", variant=OURS)
    ((_, _, lines),) = report.tables(rows)
    assert lines[0][-1] == written


def test_lines_below(run: Run) -> None:
    lines = report.notes(run)
    assert lines[0].startswith("roofs (simulated): memory 2 GB/s, fp32 25 GF/s")
    busy = Conditions(1.0, 0.2, 0.3, None, None, None)
    run.conditions, run.complete = busy, False
    run.cases[0] = dataclasses.replace(run.cases[0], left_out={"rival": "absent"}, settled=False)
    lines = report.notes(with_rows(run, note="no CUDA graph: it waits"))
    assert "1 of 1 cases ended by the time before each ratio was known to ± 0.01" in lines
    assert f"* {OURS}, {OURS} int8, torch, other: no CUDA graph: it waits" in lines
    assert "left out: rival, absent" in lines
    assert "interrupted: 1 cases were measured by then" in lines
    assert "warning: other processes took 30% of the processors" in lines
    ((_, _, cells),) = report.tables(run)
    assert cells[0][2] == f"{OURS} *"


def test_nothing_was_measured(run: Run) -> None:
    run.cases, run.complete = [], False
    assert list(report.tables(run)) == []
    assert report.notes(run) == ["interrupted: 0 cases were measured by then"]


def test_csv_has_a_line_for_each_row_with_the_ends_of_intervals(run: Run) -> None:
    lines = list(csv.DictReader(io.StringIO(report.csv_text(run))))
    assert [line["variant"] for line in lines] == [row.variant for row in run.rows]
    for line, row in zip(lines, run.rows, strict=True):
        assert line["operator"] == "ghost_apply" and line["device"] == "cpu"
        assert line["backend"] == ("native" if row.is_ours else "torch")
        assert float(line["ms"]) == row.ms.value
        assert float(line["ms_low"]) == row.ms.low and float(line["ms_high"]) == row.ms.high
        assert float(line["roof_share_low"]) == row.roof_share.low
        assert float(line["flops"]) == 2e6 and line["one_thread"] == ""
        expected = "" if row.variant == "torch" else str(row.to_best_rival.low)  # type: ignore[union-attr]
        assert line["to_best_rival_low"] == expected


def test_json_has_figures_with_both_ends(run: Run) -> None:
    data = run.to_dict()
    (case,) = data["cases"]
    row = case["rows"][0]
    assert set(row["ms"]) == set(row["ratios"]["torch"]) == {"value", "low", "high", "samples"}
    assert row["gbps"]["low"] <= row["gbps"]["value"] <= row["gbps"]["high"]
    assert case["roofs"]["memory"]["value"] == pytest.approx(2.0, rel=0.05)
    assert data["complete"] and data["roof_source"] == "simulated" and data["format"] == 1


def test_the_picture_is_svg_and_the_same_each_time(run: Run) -> None:
    pytest.importorskip("matplotlib")
    svg = roofline_svg(run)
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert svg == roofline_svg(run)


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'ghosted_fast\[report\]'"):
        check_plot()
