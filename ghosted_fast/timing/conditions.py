"""What else the machine did during a measurement, where the system tells (Linux).

Source: proc(5) for /proc/stat; the kernel's documentation of cgroup v2 for `cpu.stat` and of
`thermal_throttle`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ghosted_fast.timing.energy import joules

# From which share on other work is said to matter.
_MATTERS = 0.02


@dataclass(frozen=True)
class Conditions:
    """What happened between two moments; None where the system does not tell.

    Attributes:
        seconds: How long it was.
        stolen: Share of all processors' time that the machine's host gave to others.
        others: Share of it that other processes of this system worked.
        limited: Share of the time in which the container's limit held this system back, at most 1.
        throttled: How often the processor slowed down since it was too hot.
        joules: Energy of the processors' packages.
    """

    seconds: float
    stolen: float | None
    others: float | None
    limited: float | None
    throttled: int | None
    joules: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        return asdict(self)

    def warnings(self) -> list[str]:
        """Return what could have changed the figures, in words; mostly nothing."""
        said = [
            (self.stolen, "the machine's host gave {:.0%} of the processors to others"),
            (self.others, "other processes took {:.0%} of the processors"),
            (self.limited, "the container's limit stopped the work for {:.0%} of the time"),
        ]
        lines = [text.format(share) for share, text in said if share and share >= _MATTERS]
        if self.throttled:
            lines.append(f"the processor was too hot {self.throttled} times and slowed down")
        return lines


class Watch:
    """Watches the machine from when it is made."""

    def __init__(self) -> None:
        self._before = _counters()

    def conditions(self) -> Conditions:
        """Return what happened since."""
        before, after = self._before, _counters()
        spent = {
            name: after[name] - before[name]
            for name in after
            if name in before and after[name] >= before[name]
        }
        ticks, seconds = spent.get("ticks"), spent["seconds"]
        stolen = others = limited = None
        if ticks and "steal" in spent:
            stolen = spent["steal"] / ticks
        if ticks and "busy" in spent:
            others = max(spent["busy"] - spent["own"], 0.0) / ticks
        if "limited" in spent:
            # Linux adds up the time that each processor waited.
            limited = min(spent["limited"] / max(seconds, 1e-9), 1.0)
        throttled = spent.get("throttled")
        return Conditions(
            seconds=seconds,
            stolen=stolen,
            others=others,
            limited=limited,
            throttled=None if throttled is None else int(throttled),
            joules=spent.get("joules"),
        )


def _counters() -> Mapping[str, float]:
    found = {"seconds": time.perf_counter()}
    ticks_per_s = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
    first, _, _ = _text("/proc/stat").partition("\n")
    if first.startswith("cpu "):
        # user nice system idle iowait irq softirq steal; the guest's time is in user's.
        ticks = [int(word) for word in first.split()[1:9]]
        own = os.times()
        found["ticks"], found["steal"] = sum(ticks), ticks[7]
        found["busy"] = sum(ticks) - ticks[3] - ticks[4] - ticks[7]
        found["own"] = ticks_per_s * (
            own.user + own.system + own.children_user + own.children_system
        )
    for line in _text("/sys/fs/cgroup/cpu.stat").splitlines():
        name, _, value = line.partition(" ")
        if name == "throttled_usec":
            found["limited"] = int(value) / 1e6
    counts = _numbers("/sys/devices/system/cpu", "cpu*/thermal_throttle/package_throttle_count")
    if counts:
        found["throttled"] = max(counts)  # each processor of a package counts the same events
    energy = joules(torch.device("cpu"))
    if energy is not None:
        found["joules"] = energy
    return found


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return ""


def _numbers(folder: str, pattern: str) -> list[int]:
    """Return the numbers in files, as far as they can be read."""
    texts = [_text(str(path)).strip() for path in Path(folder).glob(pattern)]
    return [int(text) for text in texts if text.isdecimal()]
