"""Criteria x recoveries x numbers of layers on one model: see `compare_grid`."""

from ghosted_fast.grid.grid import compare_grid
from ghosted_fast.grid.plan import Variant
from ghosted_fast.grid.table import Grid
from ghosted_fast.grid.variants import corrected, refined

__all__ = ["Grid", "Variant", "compare_grid", "corrected", "refined"]
