"""Ghosts for layer-pruned language models: closed-form recovery, fused operators, no training.

A ghost stands where decoder layers were removed and maps the hidden state that enters the gap to
the one that the dense model would have had: `y = x + M x`, with `M` the least-squares optimum over
calibration text. See `ghost_model` for the one way through.

Names are loaded when they are first used: importing this package loads neither torch's extension
modules of the library nor transformers. Loading a saved ghosted model with transformers works as
soon as this package has been imported.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from ghosted_fast.checkpoint._import_hook import install_hook

if TYPE_CHECKING:
    from ghosted_fast.checkpoint.save import save_model as save_model
    from ghosted_fast.grid import Grid as Grid
    from ghosted_fast.grid import Variant as Variant
    from ghosted_fast.grid import compare_grid as compare_grid
    from ghosted_fast.improve.correction import correct_ghosts as correct_ghosts
    from ghosted_fast.improve.refinement import refine_ghosts as refine_ghosts
    from ghosted_fast.measure.perplexity import Perplexity as Perplexity
    from ghosted_fast.measure.perplexity import perplexity as perplexity
    from ghosted_fast.measure.speed import Throughput as Throughput
    from ghosted_fast.measure.speed import throughput as throughput
    from ghosted_fast.measure.tasks import TaskScore as TaskScore
    from ghosted_fast.measure.tasks import accuracy as accuracy
    from ghosted_fast.measure.tasks import evaluate_tasks as evaluate_tasks
    from ghosted_fast.models.ghost_linear import GhostLinear as GhostLinear
    from ghosted_fast.ops import ghost_apply as ghost_apply
    from ghosted_fast.ops import ghost_apply_rms_norm as ghost_apply_rms_norm
    from ghosted_fast.pipeline import ghost_model as ghost_model
    from ghosted_fast.reports.ghost_report import GhostReport as GhostReport
    from ghosted_fast.selection.select import Selection as Selection
    from ghosted_fast.selection.select import select_layers as select_layers
    from ghosted_fast.statistics.gram import GramAccumulator as GramAccumulator
    from ghosted_fast.statistics.solve import GhostSolution as GhostSolution
    from ghosted_fast.statistics.solve import solve_ghost as solve_ghost
    from ghosted_fast.surgery.adopt.from_operators import ImportReport as ImportReport
    from ghosted_fast.surgery.adopt.from_operators import import_ghosts as import_ghosts
    from ghosted_fast.surgery.adopt.swap import swap_ghosts as swap_ghosts
    from ghosted_fast.surgery.cut import prune_model as prune_model

_HOMES = {
    "GhostLinear": "models.ghost_linear",
    "GhostReport": "reports.ghost_report",
    "GhostSolution": "statistics.solve",
    "GramAccumulator": "statistics.gram",
    "Grid": "grid",
    "ImportReport": "surgery.adopt.from_operators",
    "Perplexity": "measure.perplexity",
    "Selection": "selection.select",
    "TaskScore": "measure.tasks",
    "Throughput": "measure.speed",
    "Variant": "grid",
    "accuracy": "measure.tasks",
    "compare_grid": "grid",
    "correct_ghosts": "improve.correction",
    "evaluate_tasks": "measure.tasks",
    "ghost_apply": "ops",
    "ghost_apply_rms_norm": "ops",
    "ghost_model": "pipeline",
    "import_ghosts": "surgery.adopt.from_operators",
    "perplexity": "measure.perplexity",
    "prune_model": "surgery.cut",
    "refine_ghosts": "improve.refinement",
    "save_model": "checkpoint.save",
    "select_layers": "selection.select",
    "solve_ghost": "statistics.solve",
    "swap_ghosts": "surgery.adopt.swap",
    "throughput": "measure.speed",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version(__name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


install_hook()
