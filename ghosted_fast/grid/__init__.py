"""Criteria x recoveries x numbers of layers on one model: see `compare_grid`."""

from ghosted_fast.grid.grid import compare_grid
from ghosted_fast.grid.plan import DEFAULT_RECOVERIES, VARIANTS, Variant
from ghosted_fast.grid.table import Grid

__all__ = ["DEFAULT_RECOVERIES", "VARIANTS", "Grid", "Variant", "compare_grid"]
