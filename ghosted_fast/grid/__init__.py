"""Criteria x recoveries x numbers of layers on one model: see `run_grid`."""

from ghosted_fast.grid.plan import After, GridPlan, Variant
from ghosted_fast.grid.run import run_grid
from ghosted_fast.grid.table import Grid
from ghosted_fast.grid.variants import corrected, healed

__all__ = ["After", "Grid", "GridPlan", "Variant", "corrected", "healed", "run_grid"]
