"""Tables for people, from records that the tests make."""

from __future__ import annotations

from dataclasses import replace

from ghosted_fast.cli._shared.tables import difference_table
from ghosted_fast.measure.paired import Difference
from ghosted_fast.measure.tasks import TaskScore


def test_differences_to_the_dense_model() -> None:
    dense = [TaskScore(name, "acc", 0.5, 0.02, 500) for name in ("quartz", "gsm")]
    found = Difference(-0.0312, -0.05, 0.004, 500, 0.95)
    ours = [replace(dense[0], difference=found), dense[1]]
    table = difference_table({"big": dense, "ours": ours, "other": dense})
    assert table is not None
    assert table.title == "Score less that of big, points, with 95 % intervals"
    assert table.columns == ["model", "quartz", "gsm"]
    assert table.rows == [["ours", "-3.1 (-5.0 to +0.4)", "-"], ["other", "-", "-"]]


def test_without_a_difference_there_is_no_table() -> None:
    score = TaskScore("quartz", "acc", 0.5, 0.02, 500)
    assert difference_table({"big": [score]}) is None
    assert difference_table({"big": [score], "ours": [score]}) is None
