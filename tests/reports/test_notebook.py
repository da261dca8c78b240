"""What a notebook shows of the library's records: small tables, escaped."""

from __future__ import annotations

import re
from typing import Any

import pytest
from support.html_balance import Balance

import ghosted_fast as gf
from ghosted_fast.facts import (
    CorrectionFacts,
    HealingPoint,
    IntervalScore,
    notebook_table,
)
from ghosted_fast.measure.models_table import ModelRow
from ghosted_fast.measure.throughput import SpeedSettings
from ghosted_fast.reports.ghost_report import GhostFacts
from ghosted_fast.timing.estimates import Estimate

BAD = "<script>alert('x')</script> & more"
GHOST = GhostFacts(14, 19, "normed", False, False, 0.3, 0.3125, 10.0, 1e-3, 4096)
HEALING = gf.HealingFacts(
    0.5, 0.25, 3000, 2000, 32, 28, 1, 9999, [HealingPoint(0, 0.5)], "tokens", 12.0
)
PERPLEXITY = gf.Perplexity(29.08, 27.5, 31.0, 5000, (3.3,), (5000,), 0.95)
SPEED = gf.Throughput(
    prefill_tokens_per_s=Estimate(2000.0, 1990.0, 2010.0, 20),
    decode_tokens_per_s=Estimate(100.0, 99.0, 101.0, 20),
    first_token_ms=Estimate(50.0, 49.0, 51.0, 20),
    token_ms=None,
    relative={BAD: {"decode": Estimate(1.25, 1.24, 1.26, 20)}},
    weight_bytes=None,
    cache_bytes=None,
    joules_per_token=None,
    settings=SpeedSettings(),
    ended="precise",
    conditions=None,
)
REPORT = gf.GhostReport(
    model=BAD,
    family="llama",
    num_layers=30,
    removed=[14, 15, 16, 17, 18],
    criterion="ghost",
    recovery="ghost",
    scores=[],
    seconds={"select": 100.0, "calibrate": 20.4},
    ghosts=[GHOST],
    num_tokens=49152,
    corrections=[CorrectionFacts(0.5, 0.4, True, 0.1, 1.0), CorrectionFacts(0.4, 0.4, False, 0, 1)],
    healing=HEALING,
)
GRID = gf.Grid(
    about={},
    dense={"perplexity": {BAD: {"value": 20.0}}},
    rows=[
        {
            "removed": [3, 4],
            "criterion": "ghost",
            "recovery": recovery,
            "marks": ["default"],
            "perplexity": None if recovery == "none" else {BAD: {"value": 25.0}},
            "excess": None if recovery == "none" else {BAD: 0.25},
        }
        for recovery in ("ghost", "none")
    ],
    selections=[],
)
SHOWN: dict[str, tuple[Any, list[str]]] = {
    "report": (
        REPORT,
        ["5 of 30 layers removed, 14-18", "chosen by ghost", "held-out error 0.3125", "49,152",
         "1, held-out divergence 0.5000 to 0.4000", "0.5000 to 0.2500 nats", "120 s"],
    ),
    "given layers": (
        gf.GhostReport("m", "llama", 6, [3], None, "none", [], {}),
        ["1 of 6 layers removed, 3", "given", "none"],
    ),
    "healing": (HEALING, ["0.5000 to 0.2500", "3,000 tokens", "rank 32 of 28", "after 12 s"]),
    "perplexity": (PERPLEXITY, ["29.08", "27.50 to 31.00 (95%)", "5,000"]),
    "score": (gf.TaskScore(BAD, "acc", 0.5, 0.02, 200), ["50.0%", "2.0%", "200"]),
    "score without error": (gf.TaskScore("t", "acc", 0.5, None, 200), ["<td>-</td>"]),
    "speed": (SPEED, ["2,000 tokens/s", "100 tokens/s", "50 ms", "1.25x"]),
    "row": (
        ModelRow(BAD, "bfloat16", 25, 120_000_000, PERPLEXITY, SPEED),
        ["bfloat16", "120.0 M", "29.08 (27.50 to 31.00)", "100 tokens/s"],
    ),
    "row without figures": (ModelRow("m", "float32", 25, 1_000_000), ["1.0 M"]),
    "selection": (
        gf.Selection([3, 4], [IntervalScore(2, 4, 1.5), IntervalScore(3, 5, 0.5)], BAD),
        ["3-4</td><td>0.50000", "2-3</td><td>1.50000"],
    ),
    "grid": (GRID, ["3-4", "25.00", "1.25x", "refused", "default", "dense 20.00"]),
    "import": (
        gf.ImportReport([3, 4], [["a"], [BAD]], "delta", "out-in", {"W": 0.5}),
        ["3-4", "a; ", "delta", "0.5"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHOWN)
def test_a_record_shows_itself(name: str) -> None:
    record, expected = SHOWN[name]
    shown = record._repr_html_()
    page = Balance()
    page.feed(shown)
    assert not page.open
    assert not [text for text in expected if text not in shown], shown
    assert "<script" not in shown and len(shown) < 4000
    assert set(re.findall(r"<(\w+)", shown)) <= {"table", "caption", "tr", "td", "th"}
    if BAD in repr(record):
        assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; &amp; more" in shown


def test_the_best_candidate_stands_first() -> None:
    shown = SHOWN["selection"][0]._repr_html_()
    assert shown.index("0.50000") < shown.index("1.50000")


def test_a_long_table_is_cut() -> None:
    shown = notebook_table("t", [(str(index),) for index in range(1000)])
    assert shown.count("<tr>") == 25 and "and 976 more" in shown
    assert "more" not in notebook_table("t", [("a",)] * 24)
