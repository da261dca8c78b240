"""A model that is swept through: its layers read from files while the device computes others."""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from bench_sweep import check, make_checkpoint

from ghosted_fast.measure.system import peak_memory, reset_peak_memory
from ghosted_fast.models.unloaded.opening import open_unloaded
from ghosted_fast.options import GhostOptions, Layers, RunOptions
from ghosted_fast.swept.asked import Asked
from ghosted_fast.swept.run import ghost_unloaded
from ghosted_fast.text.batches import iterate_batches
from ghosted_fast.timing.stopwatch import warm_sample

if TYPE_CHECKING:
    from gpu.models import Shape


def measure_sweep(shape: Shape, device: torch.device) -> dict[str, Any]:
    """Return where the time of a sweep goes, without corrections and with one, and its memory.

    Gate first: on a small model a sweep of the device gives what the way in memory gives.
    """
    check(str(device))
    text, found = shape.text(), {}
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder), shape.sizes)
        unloaded = open_unloaded(folder)
        for corrections in (0, 1):
            run = RunOptions(corrections=corrections, device=str(device))
            layers = Layers(tuple(shape.removed))
            asked = Asked(layers, "ghost", "ghost", GhostOptions(), run)
            plan = asked.plan(unloaded, list(iterate_batches(text)))
            gc.collect()
            reset_peak_memory(device)
            reports: list[Any] = []

            def sweep(asked: Asked = asked, reports: list[Any] = reports) -> None:
                reports.append(ghost_unloaded(unloaded, text, asked)[1])

            seconds = warm_sample(sweep, device, 1, warm_up=False)
            found[f"{corrections} corrections"] = {
                "seconds": seconds,
                "phases": reports[0].seconds,
                "peak_bytes": peak_memory(device),
                "planned_bytes": plan.device_bytes or plan.memory_bytes,
                "read_bytes": plan.read_bytes,
            }
    return {"tokens": sum(batch.numel() for batch in text), "sweeps": found}
