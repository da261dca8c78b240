"""Sphinx: these pages, and a reference of the public names out of their docstrings."""

from __future__ import annotations

import inspect
import re
import shutil
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import ghosted_fast

project = "ghosted_fast"
author = "the ghosted_fast authors"
version = release = version_of("ghosted_fast")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["generate"]
html_theme = "furo"
html_title = f"ghosted_fast {release}"
html_show_sourcelink = False

myst_heading_anchors = 4
# Links from these pages to files outside of this folder are held by tests/test_docs.py.
suppress_warnings = ["myst.xref_missing"]

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Source", "notes")]

default_role = "code"  # `x` in a docstring is code, as in Markdown

_FIRST = ("method", "results", "performance", "cli", "library", "families", "limits", "numerics")


class PublicNames(SphinxDirective):
    """The reference of every name in `ghosted_fast.__all__`; module paths do not matter."""

    def run(self) -> list[nodes.Node]:
        """Return the reference, functions first."""
        found = {name: getattr(ghosted_fast, name) for name in ghosted_fast.__all__}
        lines = []
        for name, value in sorted(found.items(), key=lambda item: inspect.isclass(item[1])):
            if inspect.isclass(value):
                lines += [f".. autoclass:: ghosted_fast.{name}", "   :members:", ""]
            elif callable(value):
                lines += [f".. autofunction:: ghosted_fast.{name}", ""]
        return self.parse_text_to_nodes("\n".join(lines))


def _add_table_of_contents(app: Sphinx, name: str, source: list[str]) -> None:
    """Give the index its list of pages, which would be noise where the file is read as it is."""
    if name == "index":
        folder = Path(str(app.srcdir))
        others = sorted({page.stem for page in folder.glob("*.md")} - {"index", "api", *_FIRST})
        pages = "\n".join([*_FIRST, *others, "api"])
        source[0] += f"\n```{{toctree}}\n:hidden:\n\n{pages}\n```\n"


def _adapt(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Let `|x|` in a docstring be a norm, and a colon in a property's not end its type."""
    if what in ("attribute", "property") and lines:
        lines[0] = lines[0].replace(": ", " \N{EN DASH} ", 1)
    lines[:] = [
        "".join(
            part if part.startswith("`") else part.replace("|", "\\|")
            for part in re.split(r"(`[^`]*`)", line)
        )
        for line in lines
    ]


def _copy_files(app: Sphinx, error: Exception | None) -> None:
    """Copy the pictures and the page of all results, which pages name in HTML, unseen by Sphinx."""
    if error is None:
        source, target = Path(str(app.srcdir)), Path(str(app.outdir))
        shutil.copytree(source / "images", target / "images", dirs_exist_ok=True)
        shutil.copy(source / "explore.html", target)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive and the table of contents."""
    app.add_directive("public-names", PublicNames)
    app.connect("autodoc-process-docstring", _adapt, priority=400)
    app.connect("build-finished", _copy_files)
    app.connect("source-read", _add_table_of_contents)
    return {"parallel_read_safe": True}
