"""Criteria x recoveries x numbers of layers on one model: see `run_grid`."""

from ghosted_fast.grid.plan import GridPlan, Variant
from ghosted_fast.grid.run import run_grid
from ghosted_fast.grid.table import Grid
from ghosted_fast.grid.variants import corrected, refined

__all__ = ["Grid", "GridPlan", "Variant", "corrected", "refined", "run_grid"]
