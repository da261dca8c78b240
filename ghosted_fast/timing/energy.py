"""Energy that the machine has used, where it counts it: joules since some moment.

Source: the counters in /sys/class/powercap (RAPL) of x86-64 processors; NVML's total energy of
a CUDA device.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

_ZONES = Path("/sys/class/powercap")
# A zone beside the packages, "psys", counts the whole machine, and them once more.
_ZONE, _PACKAGE = "intel-rapl:[0-9]*", "package"


def joules(device: torch.device) -> float | None:
    """Return a counter of joules of a device or of the processor's packages, or None.

    Two readings say what lies between them; a counter that began anew is the smaller one.
    """
    if device.type == "cuda":
        return _of_cuda(device)
    if device.type != "cpu":
        return None
    readings = []
    for zone in sorted(_ZONES.glob(_ZONE)):
        with contextlib.suppress(OSError, ValueError):
            if (zone / "name").read_text(encoding="ascii").startswith(_PACKAGE):
                readings.append(int((zone / "energy_uj").read_text(encoding="ascii")) / 1e6)
    return sum(readings) if readings else None


def _of_cuda(device: torch.device) -> float | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3
    except Exception:  # absent, not allowed, or an older device: nothing is known
        return None
