"""`ghosted-fast doctor`: what is installed, and what runs here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ghosted_fast.cli._shared.results import Result, TextTable


def doctor() -> Result:
    """Show versions, backends, processor features and supported model families."""
    from ghosted_fast.measure.system import cpu_features, machine_facts, package_versions
    from ghosted_fast.models.families import known_families
    from ghosted_fast.ops import backend_status
    from ghosted_fast.ops.compiled import extension
    from ghosted_fast.ops.crossings import cells_here

    backends = [
        {"name": name, "available": available, "description": description}
        for name, available, description in backend_status()
    ]
    native = extension()
    build: dict[str, Any] = dict(native.build_info()) if native is not None else {}
    ghosts = cells_here()
    data = {
        "machine": machine_facts(),
        "cpu_features": cpu_features(),
        "versions": package_versions(),
        "backends": backends,
        "ghosts": [cell._asdict() for cell in ghosts],
        "build": build,
        "families": list(known_families()),
    }
    facts = {
        **machine_facts(),
        "processor features": " ".join(cpu_features()) or "none that matters",
        "families": ", ".join(known_families()),
    }
    status = [
        [name, "yes" if available else "no", description]
        for name, available, description in backend_status()
    ]
    shown: list[TextTable | str] = [
        _table(["machine", ""], facts),
        "",
        _table(["package", "version"], package_versions()),
        "",
        TextTable(["backend", "usable", "what it is, or why not"], status, numeric=False),
    ]
    if ghosts:
        columns = ["ghosts", "hidden size", "rows", "weight of a ghost", "a weight that lies, by"]
        shown += ["", TextTable(columns, ghosts, numeric=False)]
    if build:
        shown += ["", _table(["build", ""], build)]
    return Result(data, shown)


def _table(columns: Sequence[str], facts: Mapping[str, Any]) -> TextTable:
    rows = [[label, str(value)] for label, value in facts.items()]
    return TextTable(columns, rows, numeric=False)
