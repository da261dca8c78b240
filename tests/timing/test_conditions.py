"""What else ran: from the counters of a machine that the tests write."""

from __future__ import annotations

from pathlib import Path

import pytest

from ghosted_fast.timing import conditions, energy
from ghosted_fast.timing.conditions import Watch


@pytest.fixture
def counters(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """The counters, for tests to change."""
    values = {"seconds": 100.0, "ticks": 1000.0, "steal": 10.0, "busy": 500.0, "own": 400.0}
    monkeypatch.setattr(conditions, "_counters", lambda: dict(values))
    return values


def test_shares_of_what_others_took(counters: dict[str, float]) -> None:
    counters |= {"limited": 1.0, "throttled": 5, "joules": 7.0}
    watch = Watch()
    counters |= {"seconds": 110.0, "ticks": 2000.0, "steal": 60.0, "busy": 1100.0, "own": 700.0}
    counters |= {"limited": 2.0, "throttled": 8, "joules": 57.0}
    found = watch.conditions()
    assert found.seconds == pytest.approx(10.0)
    assert found.stolen == pytest.approx(0.05)
    assert found.others == pytest.approx(0.3)
    assert found.limited == pytest.approx(0.1)
    assert (found.throttled, found.joules) == (3, 50.0)
    assert found.warnings() == [
        "the machine's host gave 5% of the processors to others",
        "other processes took 30% of the processors",
        "the container's limit stopped the work for 10% of the time",
        "the processor was too hot 3 times and slowed down",
    ]
    assert found.to_dict()["joules"] == 50.0


def test_a_quiet_machine_has_no_warnings(counters: dict[str, float]) -> None:
    watch = Watch()
    counters |= {"seconds": 110.0, "ticks": 2000.0, "busy": 1000.0, "own": 900.0}
    found = watch.conditions()
    assert (found.stolen, found.others, found.limited, found.joules) == (0.0, 0.0, None, None)
    assert found.warnings() == []


def test_what_the_system_does_not_tell_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditions, "_text", lambda path: "")
    found = Watch().conditions()
    assert found.seconds >= 0
    assert found.stolen is found.others is found.limited is found.throttled is found.joules is None


def test_a_counter_that_began_anew_is_unknown(counters: dict[str, float]) -> None:
    counters["joules"] = 100.0
    watch = Watch()
    counters |= {"seconds": 110.0, "ticks": 2000.0, "joules": 3.0, "steal": 9.0}
    found = watch.conditions()
    assert found.joules is found.stolen is None  # the host's own may go back a little
    assert found.others == 0.0
    counters["busy"] = 499.0
    assert watch.conditions().others is None


def test_what_several_processors_waited_is_no_more_than_all(counters: dict[str, float]) -> None:
    counters["limited"] = 0.0
    watch = Watch()
    counters |= {"seconds": 110.0, "limited": 45.0}
    assert watch.conditions().limited == 1.0


def test_the_files_of_linux(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    zones = [("0", "package-0", 2500000), ("0:0", "core", 9), ("1", "psys", 7000000)]
    for place, name, count in [*zones, ("12", "package-1", 500000)]:
        zone = tmp_path / f"intel-rapl:{place}"
        zone.mkdir()
        (zone / "name").write_text(f"{name}\n")
        (zone / "energy_uj").write_text(f"{count}\n")
    for core in (0, 1):
        folder = tmp_path / f"cpu{core}" / "thermal_throttle"
        folder.mkdir(parents=True)
        (folder / "package_throttle_count").write_text("4\n")
    texts = {
        "/proc/stat": "cpu  10 20 30 400 5 6 7 8 9 0\ncpu0 1 2 3 4 5 6 7 8 9 0\n",
        "/sys/fs/cgroup/cpu.stat": "usage_usec 12\nthrottled_usec 1500000\n",
    }
    read = conditions._text
    monkeypatch.setattr(conditions, "_text", lambda path: texts.get(path) or read(path))
    numbers = conditions._numbers
    monkeypatch.setattr(conditions, "_numbers", lambda _, pattern: numbers(str(tmp_path), pattern))
    monkeypatch.setattr(energy, "_ZONES", tmp_path)
    found = conditions._counters()
    assert (found["ticks"], found["steal"], found["busy"]) == (486, 8, 73)
    assert found["limited"] == pytest.approx(1.5)
    assert found["joules"] == pytest.approx(3.0)
    assert found["throttled"] == 4
