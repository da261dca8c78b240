"""The notebooks in `examples` run from top to bottom, and hold no outputs."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
from support.tiny_text import TEXT, save_tiny_model

import ghosted_fast as gf
from ghosted_fast.assets import downloads

NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples").glob("*.ipynb"))
QUICK_START = next(path for path in NOTEBOOKS if path.stem == "quick_start")


def cells(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return found


def run_cells(path: Path) -> dict[str, Any]:
    """Run the cells of a notebook, and return what each shows: the value of its last line."""
    names: dict[str, Any] = {"__name__": "__main__"}
    shown: dict[str, Any] = {}
    for cell in cells(path):
        if cell["cell_type"] != "code":
            continue
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, cell["id"], "exec"), names)
        if isinstance(last, ast.Expr):
            shown[cell["id"]] = eval(compile(ast.Expression(last.value), cell["id"], "eval"), names)
    return shown


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_no_outputs_are_stored(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    names = [cell["id"] for cell in notebook["cells"]]
    assert len(set(names)) == len(names)
    for cell in notebook["cells"]:
        assert cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


@pytest.mark.slow
def test_quick_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": TEXT}) + "\n" for _ in range(1000)))
    model = save_tiny_model(tmp_path / "tiny", num_layers=8)
    assets = downloads.DemoAssets(model, texts, texts)
    monkeypatch.setattr(gf, "fetch_demo_assets", lambda: assets)
    monkeypatch.chdir(tmp_path)
    shown = run_cells(QUICK_START)
    assert "5 of 8 layers removed" in shown["fit"]._repr_html_()
    measured = [shown[name] for name in ("dense", "pruned", "ghosted")]
    assert len({found.value for found in measured}) == 3
    assert all("Perplexity" in found._repr_html_() for found in measured)
    assert isinstance(shown["save"], str)
    assert (tmp_path / "smaller" / "model.safetensors").is_file()


def test_the_notebook_is_the_program_of_the_readme() -> None:
    program = (QUICK_START.parent / "fit.py").read_text(encoding="utf-8")
    code = "".join("".join(cell["source"]) + "\n" for cell in cells(QUICK_START))
    begins = ("demo", "model,", "calibration", "evaluation", "smaller,", "gf.save")
    lines = [line for line in program.splitlines() if line.startswith(begins)]
    assert len(lines) == len(begins)
    for line in lines:
        assert line.partition("  #")[0] in code, line
