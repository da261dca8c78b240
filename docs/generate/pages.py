"""Which block stands on which page, and how all of it is written or compared."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from docs.generate import (
    behaviour,
    engines,
    explorer,
    healing,
    memory,
    operators,
    program,
    quick_start,
    recovery,
    speed,
    sweep,
)
from docs.generate.markers import block_names, replace_blocks
from docs.generate.plots import pictures
from docs.generate.results import ROOT
from ghosted_fast._atomic_files import write_atomically

BLOCKS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {
        "headline": recovery.headline,
        "quick-start": quick_start.quick_start,
        "quick-start-output": quick_start.quick_start_output,
        "where-it-runs": speed.where_it_runs,
        "families": sweep.swept_count,
    },
    "docs/results.md": {
        "smollm2": recovery.smollm2_table,
        "gemma3": recovery.gemma3_table,
        "lead": recovery.lead,
        "accuracy": behaviour.accuracy,
        "generation": behaviour.generation,
        "first-token-gaps": recovery.first_token_gaps,
        "calibration-texts": recovery.calibration_texts,
    },
    "docs/healing.md": {"curve": healing.curve, "rivals": healing.rivals},
    "docs/performance.md": {
        "models": speed.models,
        "deployment": speed.deployment,
        "engines": speed.engines,
        "calibration": speed.calibration,
        "fit": speed.fit,
        "same-model": speed.same_model,
        "gram-update": partial(operators.operator_table, "gram_update"),
        "ghost-apply": partial(operators.operator_table, "ghost_apply"),
        "divergence": operators.divergence_table,
        "ghost-solve": partial(operators.operator_table, "ghost_solve"),
    },
    "docs/transformers.md": {"engine": partial(speed.one_engine, "transformers")},
    "docs/vllm.md": {
        "families": engines.served_by_vllm,
        "engine": partial(speed.one_engine, "vllm"),
    },
    "docs/gguf.md": {
        "families": engines.served_by_llamacpp,
        "engine": partial(speed.one_engine, "llama.cpp"),
    },
    "docs/ort-genai.md": {
        "families": engines.served_by_ort_genai,
        "engine": partial(speed.one_engine, "ort-genai"),
    },
    "docs/import.md": {"against-hooks": operators.against_hooks},
    "docs/cli.md": {"verbs": program.verbs},
    "docs/memory.md": {"shapes": memory.shapes, "measured": memory.measured},
    "docs/families.md": {"families": program.families, "swept": sweep.swept},
}
GPU_PAGE, GPU_PROGRAM = "docs/gpu-roofline.md", "benchmarks/gpu_roofline.py"
IMAGES = "docs/images"


def page(name: str) -> str:
    """Return a page as the program writes it, from the page that is there.

    Raises:
        ValueError: The page lacks a block, or has one that the program does not know.
    """
    there = (ROOT / name).read_text(encoding="utf-8")
    known = BLOCKS[name]
    if sorted(block_names(there)) != sorted(known):
        raise ValueError(f"expected the blocks {sorted(known)} in {name}, got {block_names(there)}")
    return replace_blocks(there, {block: make() for block, make in known.items()})


def gpu_page() -> str:
    """Return the page of computed bounds of the GPU kernels."""
    command = [sys.executable, str(ROOT / GPU_PROGRAM)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def files() -> dict[str, str]:
    """Return the text of every file that the program writes, by its path in the repository."""
    images = {f"{IMAGES}/{name}": content.decode() for name, content in pictures().items()}
    pages = {GPU_PAGE: gpu_page(), explorer.PAGE: explorer.explore_page()}
    return {**{name: page(name) for name in BLOCKS}, **pages, **images}


def outdated() -> list[str]:
    """Return the files that differ from what the program writes."""
    return [name for name, text in files().items() if _there(ROOT / name) != text]


def write() -> list[str]:
    """Write what differs, and return the names of the files."""
    changed = []
    for name, text in files().items():
        if _there(ROOT / name) != text:
            write_atomically(ROOT / name, text)
            changed.append(name)
    return changed


def _there(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None
