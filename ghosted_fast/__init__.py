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
from typing import TYPE_CHECKING, Any

from ghosted_fast._hook import install_hook

if TYPE_CHECKING:
    from ghosted_fast.checkpoint import save_model as save_model
    from ghosted_fast.correction import correct_ghosts as correct_ghosts
    from ghosted_fast.evaluation import Perplexity as Perplexity
    from ghosted_fast.evaluation import perplexity as perplexity
    from ghosted_fast.gram import GramAccumulator as GramAccumulator
    from ghosted_fast.grid import Grid as Grid
    from ghosted_fast.grid import Variant as Variant
    from ghosted_fast.grid import compare_grid as compare_grid
    from ghosted_fast.harness import TaskScore as TaskScore
    from ghosted_fast.harness import accuracy as accuracy
    from ghosted_fast.harness import evaluate_tasks as evaluate_tasks
    from ghosted_fast.importing import ImportReport as ImportReport
    from ghosted_fast.importing import import_ghosts as import_ghosts
    from ghosted_fast.modules import GhostLinear as GhostLinear
    from ghosted_fast.ops import ghost_apply as ghost_apply
    from ghosted_fast.ops import ghost_apply_rms_norm as ghost_apply_rms_norm
    from ghosted_fast.pipeline import ghost_model as ghost_model
    from ghosted_fast.refinement import refine_ghosts as refine_ghosts
    from ghosted_fast.report import GhostReport as GhostReport
    from ghosted_fast.selection import Selection as Selection
    from ghosted_fast.selection import select_layers as select_layers
    from ghosted_fast.solve import GhostSolution as GhostSolution
    from ghosted_fast.solve import solve_ghost as solve_ghost
    from ghosted_fast.speed import Throughput as Throughput
    from ghosted_fast.speed import throughput as throughput
    from ghosted_fast.surgery import prune_model as prune_model
    from ghosted_fast.swapping import swap_ghosts as swap_ghosts

__version__ = "0.1.0"

_HOMES = {
    "GhostLinear": "modules",
    "GhostReport": "report",
    "GhostSolution": "solve",
    "GramAccumulator": "gram",
    "Grid": "grid",
    "ImportReport": "importing",
    "Perplexity": "evaluation",
    "Selection": "selection",
    "TaskScore": "harness",
    "Throughput": "speed",
    "Variant": "grid",
    "accuracy": "harness",
    "compare_grid": "grid",
    "evaluate_tasks": "harness",
    "ghost_apply": "ops",
    "ghost_apply_rms_norm": "ops",
    "correct_ghosts": "correction",
    "ghost_model": "pipeline",
    "import_ghosts": "importing",
    "refine_ghosts": "refinement",
    "perplexity": "evaluation",
    "prune_model": "surgery",
    "save_model": "checkpoint",
    "select_layers": "selection",
    "solve_ghost": "solve",
    "swap_ghosts": "swapping",
    "throughput": "speed",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


install_hook()
