"""Progress bars on stderr: one look for all long work."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm

# Work that ends sooner shows none.
_SECONDS_BEFORE_SHOWN = 2.0
_SHARE = "{l_bar}{bar}| {elapsed}<{remaining}"


def progress_bar(
    title: str, shown: bool, *, of: Any = None, tokens: bool = False, share: bool = False
) -> tqdm:
    """Return a bar, which is a context manager.

    Args:
        title: What is being done.
        shown: Whether to show it at all.
        of: What there is to do: how many steps, or an iterable that is gone through; None where
            that is not known.
        tokens: Whether steps are tokens.
        share: Whether steps are mere parts of the whole, whose number says nothing.
    """
    unit = {"unit": "tok", "unit_scale": True} if tokens else {}
    look = {"bar_format": _SHARE} if share else {}
    what = {"total": of} if isinstance(of, int) else {"iterable": of}
    return tqdm(desc=title, delay=_SECONDS_BEFORE_SHOWN, disable=not shown, **what, **unit, **look)
