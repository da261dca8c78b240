"""Where results lie: a folder for each kind of processor, a file of rows for each benchmark."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ghosted_fast.measure.system import processor_name

RESULTS = Path(__file__).parent / "results"


def machine_folder() -> Path:
    """Return the folder of this machine's results: `results/intel-xeon-emerald-rapids`."""
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", processor_name().lower()).strip("-")


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Append rows to a JSONL file, which is made if it is not there, and return their number."""
    lines = [json.dumps(row) + "\n" for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(lines)
    return len(lines)
