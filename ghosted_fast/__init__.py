"""Ghosts for layer-pruned language models: closed-form recovery, fused operators, healing.

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
import logging
from types import FunctionType
from typing import TYPE_CHECKING, Any

from ghosted_fast.checkpoint._import_hook import install_hook
from ghosted_fast.errors import raising_ours

if TYPE_CHECKING:
    from ghosted_fast.assets.downloads import fetch_demo_assets as fetch_demo_assets
    from ghosted_fast.checkpoint.save import save_model as save_model
    from ghosted_fast.facts import HealingFacts as HealingFacts
    from ghosted_fast.grid import Grid as Grid
    from ghosted_fast.grid import GridPlan as GridPlan
    from ghosted_fast.grid import Variant as Variant
    from ghosted_fast.grid import run_grid as run_grid
    from ghosted_fast.improve.correction import correct_ghosts as correct_ghosts
    from ghosted_fast.improve.healing import heal as heal
    from ghosted_fast.measure.perplexity import Perplexity as Perplexity
    from ghosted_fast.measure.perplexity import perplexity as perplexity
    from ghosted_fast.measure.speed import throughput as throughput
    from ghosted_fast.measure.tasks import TaskScore as TaskScore
    from ghosted_fast.measure.tasks import accuracy as accuracy
    from ghosted_fast.measure.tasks import evaluate_tasks as evaluate_tasks
    from ghosted_fast.measure.throughput import Throughput as Throughput
    from ghosted_fast.models.ghost_linear import GhostLinear as GhostLinear
    from ghosted_fast.models.loading import load_model as load_model
    from ghosted_fast.models.loading import load_processor as load_processor
    from ghosted_fast.models.quantized.loading import load_quantized as load_quantized
    from ghosted_fast.models.unloaded.sharded import unshard_weights as unshard_weights
    from ghosted_fast.ops import ghost_apply as ghost_apply
    from ghosted_fast.options import GhostOptions as GhostOptions
    from ghosted_fast.options import HealOptions as HealOptions
    from ghosted_fast.options import PerplexityBound as PerplexityBound
    from ghosted_fast.options import RunOptions as RunOptions
    from ghosted_fast.options import SpeedBound as SpeedBound
    from ghosted_fast.pipeline import ghost_model as ghost_model
    from ghosted_fast.reports.ghost_report import GhostReport as GhostReport
    from ghosted_fast.selection.criteria.request import Selection as Selection
    from ghosted_fast.selection.select import select_layers as select_layers
    from ghosted_fast.statistics.gram import GramAccumulator as GramAccumulator
    from ghosted_fast.statistics.solve import GhostSolution as GhostSolution
    from ghosted_fast.statistics.solve import solve_ghost as solve_ghost
    from ghosted_fast.surgery.adopt.from_operators import ImportReport as ImportReport
    from ghosted_fast.surgery.adopt.from_operators import import_ghosts as import_ghosts
    from ghosted_fast.surgery.adopt.swap import swap_ghosts as swap_ghosts
    from ghosted_fast.surgery.cut import prune_model as prune_model
    from ghosted_fast.surgery.folder import FolderCut as FolderCut
    from ghosted_fast.surgery.folder import cut_folder as cut_folder
    from ghosted_fast.surgery.folder import prune_folder as prune_folder
    from ghosted_fast.surgery.removable import check_removable as check_removable
    from ghosted_fast.surgery.transfer import TakenGhosts as TakenGhosts
    from ghosted_fast.surgery.transfer import put_ghosts as put_ghosts
    from ghosted_fast.surgery.transfer import take_ghosts as take_ghosts
    from ghosted_fast.text.calibration_text import CalibrationText as CalibrationText
    from ghosted_fast.text.loading import load_texts as load_texts
    from ghosted_fast.text.loading import token_batches as token_batches
    from ghosted_fast.text.mixture import mix_texts as mix_texts

_HOMES = {
    "CalibrationText": "text.calibration_text",
    "FolderCut": "surgery.folder",
    "GhostLinear": "models.ghost_linear",
    "GhostOptions": "options",
    "GhostReport": "reports.ghost_report",
    "GhostSolution": "statistics.solve",
    "GramAccumulator": "statistics.gram",
    "Grid": "grid",
    "GridPlan": "grid",
    "HealOptions": "options",
    "HealingFacts": "facts",
    "ImportReport": "surgery.adopt.from_operators",
    "Perplexity": "measure.perplexity",
    "PerplexityBound": "options",
    "RunOptions": "options",
    "Selection": "selection.criteria.request",
    "SpeedBound": "options",
    "TakenGhosts": "surgery.transfer",
    "TaskScore": "measure.tasks",
    "Throughput": "measure.throughput",
    "Variant": "grid",
    "accuracy": "measure.tasks",
    "check_removable": "surgery.removable",
    "correct_ghosts": "improve.correction",
    "cut_folder": "surgery.folder",
    "evaluate_tasks": "measure.tasks",
    "fetch_demo_assets": "assets.downloads",
    "ghost_apply": "ops",
    "ghost_model": "pipeline",
    "heal": "improve.healing",
    "import_ghosts": "surgery.adopt.from_operators",
    "load_model": "models.loading",
    "load_processor": "models.loading",
    "load_quantized": "models.quantized.loading",
    "load_texts": "text.loading",
    "mix_texts": "text.mixture",
    "perplexity": "measure.perplexity",
    "prune_folder": "surgery.folder",
    "prune_model": "surgery.cut",
    "put_ghosts": "surgery.transfer",
    "run_grid": "grid",
    "save_model": "checkpoint.save",
    "select_layers": "selection.select",
    "solve_ghost": "statistics.solve",
    "swap_ghosts": "surgery.adopt.swap",
    "take_ghosts": "surgery.transfer",
    "throughput": "measure.speed",
    "token_batches": "text.loading",
    "unshard_weights": "models.unloaded.sharded",
}
_RENAMED = {
    "compare_grid": "run_grid",
    "refine_ghosts": "heal",
    "RefinementOptions": "HealOptions",
}
__all__ = ["__version__", *_HOMES]  # noqa: PLE0604 - they are names


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version(__name__)
    if name in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no {name!r}: it is {_RENAMED[name]!r} now")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    if isinstance(value, FunctionType) and _HOMES[name] != "ops":
        value = raising_ours(value)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# What the library has to say goes where the program that uses it sends it, and nowhere else.
logging.getLogger(__name__).addHandler(logging.NullHandler())
install_hook()
