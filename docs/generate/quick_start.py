"""The README's quick start: the program `examples/fit.py`, and what it printed."""

from __future__ import annotations

import ast

from docs.generate.results import RESULTS, ROOT

_EXAMPLE = ROOT / "examples" / "fit.py"
_PRINTED = RESULTS / "quick_start.txt"


def quick_start() -> str:
    """Return the example without its docstring."""
    source = _EXAMPLE.read_text(encoding="utf-8")
    docstring = ast.parse(source).body[0]
    assert docstring.end_lineno is not None
    code = "".join(source.splitlines(keepends=True)[docstring.end_lineno :])
    return f"```python\n{code.strip()}\n```"


def quick_start_output() -> str:
    """Return what the example printed when it was last run."""
    if not _PRINTED.is_file():
        name = _PRINTED.relative_to(ROOT)
        return f"```\n(not recorded yet: python examples/fit.py > {name})\n```"
    return f"```\n{_PRINTED.read_text(encoding='utf-8').strip()}\n```"
