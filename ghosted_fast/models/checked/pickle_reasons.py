"""Why torch does not read a pickle of tensors, in one line and without advice to trust it."""

from __future__ import annotations

import pickle
import re

from ghosted_fast.text.files import first_line

# Torch names what a pickle asks for: "GLOBAL os.system was not an allowed global by default".
_ASKED = re.compile(r"\bGLOBAL (\S+)")


def said_of_pickle(error: Exception) -> str:
    """Return what a file holds in the place of tensors, for "expected ..., got ...".

    Args:
        error: What `torch.load` raised for it.
    """
    if not isinstance(error, pickle.UnpicklingError):
        return f"one that cannot be read ({type(error).__name__}: {first_line(error)})"
    asked = _ASKED.search(str(error))
    if asked is None:
        return "one whose pickle holds something else"
    return f"one whose pickle asks for {asked[1]}: such code is never run"
