"""Which layers to remove: every criterion by its name."""

from __future__ import annotations

from collections.abc import Callable

from ghosted_fast.selection.criteria.angular import by_angular
from ghosted_fast.selection.criteria.ghost import by_ghost
from ghosted_fast.selection.criteria.request import Request, Selection
from ghosted_fast.selection.criteria.search import by_ghost_search
from ghosted_fast.selection.criteria.shortgpt import by_shortgpt
from ghosted_fast.selection.criteria.sleb import by_sleb
from ghosted_fast.selection.criteria.streamline import by_streamline
from ghosted_fast.selection.criteria.taylor import by_taylor

CRITERIA: dict[str, Callable[[Request], Selection]] = {
    "ghost": by_ghost,
    "ghost-search": by_ghost_search,
    "streamline": by_streamline,
    "shortgpt": by_shortgpt,
    "sleb": by_sleb,
    "taylor": by_taylor,
    "angular": by_angular,
}
