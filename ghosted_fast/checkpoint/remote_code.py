"""The file that lets transformers load a ghosted folder where `ghosted_fast` is not installed."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

from ghosted_fast.checkpoint import _server
from ghosted_fast.models import built_whole, first_token
from ghosted_fast.models.auto_classes import auto_classes
from ghosted_fast.models.runtime_classes import named_base_of

MODULE = "modeling_ghosted"
_PACKAGE = "ghosted_fast."
_SOURCE = Path(__file__).with_name(f"{MODULE}.py")
# What the file takes from the package, and is given when it is saved.
_INLINED = (_server, first_token, built_whole)


def remote_code() -> str:
    """Return `modeling_ghosted.py` with what it takes from the package written into it."""
    source = _SOURCE.read_text(encoding="utf-8")
    imports, body = _taken_apart(source)
    for module in _INLINED:
        lines, text = _taken_apart(inspect.getsource(module))
        imports |= lines
        body = f"{body}\n\n{text}"
    docstring = ast.get_docstring(ast.parse(source), clean=False)
    first = "from __future__ import annotations"
    head = "\n".join([first, "", *sorted(imports - {first})])
    return f'"""{docstring}"""\n\n{head}\n\n{body}'


def _taken_apart(source: str) -> tuple[set[str], str]:
    """Return the imports at the top of a file, but those from this package, and what follows."""
    imports, lines = set(), source.splitlines()
    end = 0
    for node in ast.parse(source).body:
        is_docstring = isinstance(node, ast.Expr) and end == 0
        if not is_docstring and not isinstance(node, ast.Import | ast.ImportFrom):
            break
        end = node.end_lineno or end
        if not is_docstring and not (getattr(node, "module", None) or "").startswith(_PACKAGE):
            imports.add(ast.unparse(node))
    return imports, "\n".join(lines[end:]).strip("\n") + "\n"


def auto_map_of(model: Any) -> dict[str, str] | None:
    """Return which classes of the file transformers loads a ghosted model with.

    Args:
        model: A ghosted model.

    Returns:
        The configuration's `auto_map`; None where the dense classes are not transformers' own, so
        that the file could not find them.
    """
    dense: Any = named_base_of(type(model.config))
    classes = {auto.__name__: item for auto, item in auto_classes(dense).items()}
    if not all(item.__module__.startswith("transformers.") for item in [dense, *classes.values()]):
        return None
    names = {"AutoConfig": dense.__name__}
    for auto, item in classes.items():
        shared = item.config_class is not dense  # a class of another family's
        names[auto] = f"{item.__name__}__{dense.__name__}" if shared else item.__name__
    return {auto: f"{MODULE}.Ghosted{name}" for auto, name in names.items()}
