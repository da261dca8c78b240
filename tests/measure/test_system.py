"""What a processor is called: as it calls itself, with its cores."""

from __future__ import annotations

import pytest

from ghosted_fast.measure import system


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("Intel(R) Xeon(R) Processor", "GenuineIntel", 6, 207), "Intel Xeon (Emerald Rapids)"),
        (("Intel(R) Xeon(R) Platinum 8488C", "GenuineIntel", 6, 143),
         "Intel Xeon Platinum 8488C (Sapphire Rapids)"),
        (("AMD EPYC", "AuthenticAMD", 26, 2), "AMD EPYC (Zen 5)"),
        (("AMD EPYC", "AuthenticAMD", 25, 17), "AMD EPYC (Zen 4)"),
        (("AMD EPYC 7763 Processor", "AuthenticAMD", 25, 1), "AMD EPYC 7763 (Zen 3)"),
        (("Intel(R) Core(TM) i7-9 CPU", "GenuineIntel", 6, 1),
         "Intel Core i7-9 (family 6, model 1)"),
        (("Another", "Nobody", 5, 6), "Another (family 5, model 6)"),
    ],
)  # fmt: skip
def test_processors_are_named_with_their_cores(
    monkeypatch: pytest.MonkeyPatch, given: tuple[str, str, int, int], said: str
) -> None:
    keys = ("model name", "vendor_id", "cpu family", "model")
    known = dict(zip(keys, map(str, given), strict=True))
    monkeypatch.setattr(system, "_cpuinfo", known.get)
    assert system.processor_name() == said


def test_a_processor_without_a_family_has_its_name_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "_cpuinfo", {"model name": "Neoverse-V2"}.get)
    assert system.processor_name() == "Neoverse-V2"
    monkeypatch.setattr(system, "_cpuinfo", lambda key: None)
    monkeypatch.setattr(system.platform, "processor", lambda: "")
    monkeypatch.setattr(system.platform, "machine", lambda: "arm64")
    assert system.processor_name() == "arm64"
