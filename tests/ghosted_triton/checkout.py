"""The kernels of this checkout, also where another one is installed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def use_kernels_of_this_checkout() -> None:
    """Make `ghosted_fast.kernels` the folder of this checkout.

    An editable install maps that name to the checkout it was made from; a copy with a planted fault
    would test the kernels of the original.
    """
    folder = ROOT / "kernels" / "ghosted_triton"
    spec = importlib.util.spec_from_file_location(
        "ghosted_fast.kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ghosted_fast.kernels"] = module
    spec.loader.exec_module(module)
