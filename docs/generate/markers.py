"""Blocks of a page that the program writes: what stands between two markers."""

from __future__ import annotations

import re

_BLOCK = re.compile(
    r"(?P<begin><!-- begin: (?P<name>[\w-]+) -->\n)(?P<body>.*?)(?P<end><!-- end: (?P=name) -->)",
    re.DOTALL,
)


def block_names(page: str) -> list[str]:
    """Return the names of a page's blocks, from top to bottom.

    Raises:
        ValueError: A marker has no partner, or a block stands inside another.
    """
    names = [match["name"] for match in _BLOCK.finditer(page)]
    markers = re.findall(r"<!-- (?:begin|end): ([\w-]+) -->", page)
    if markers != [name for name in names for _ in range(2)]:
        raise ValueError(f"expected each block to begin and to end once, got the markers {markers}")
    return names


def replace_blocks(page: str, texts: dict[str, str]) -> str:
    """Return a page with new text in its blocks.

    Args:
        page: The page.
        texts: What each block is to hold, by name. A block that is not named is kept.
    """

    def renewed(match: re.Match[str]) -> str:
        if match["name"] not in texts:
            return match[0]
        return f"{match['begin']}{texts[match['name']].strip()}\n{match['end']}"

    return _BLOCK.sub(renewed, page)


def without_blocks(page: str) -> str:
    """Return what is written by hand."""
    return _BLOCK.sub("", page)
