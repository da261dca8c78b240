"""The shape of the package: imports point down, and importing it loads nothing heavy."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "ghosted_fast"

# Each module may import from the floors below its own.
FLOORS: list[set[str]] = [
    {"errors", "_env", "derived", "first_token", "figures", "files"},
    {
        "_native",
        "alignment",
        "batches",
        "readers",
        "kernels",
        "hadamard",
        "questions",
        "modeling_ghosted",
    },
    {"ops", "remote_code", "model_card", "versions", "operator_files", "hook_contents", "digests"},
    {"gram", "families", "testing", "machine", "ranks"},
    {"solve", "modules", "boundaries"},
    {"gaps", "affine"},
    {"calibration", "ghosted_layers", "hooked"},
    {"fitting", "registry", "evaluation", "speed", "sources", "assets", "checkpoint", "held_out"},
    {"surgery", "comparison", "memory", "scoring", "harness", "generation", "divergence"},
    {"criteria", "recovery", "correction", "refinement", "swapping", "importing"},
    {"selection"},
    {"budgets"},
    {"report"},
    {"pipeline", "grid", "export", "serving"},
    {"demo"},
    {"cli"},
    {"__main__"},
]
WITHOUT_TRANSFORMERS = {"ops", "gram", "solve", "batches", "_native", "derived", "first_token"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    """Return the first part of the module's name below the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def floor_of(name: str) -> int:
    for height, names in enumerate(FLOORS):
        if name in names:
            return height
    raise AssertionError(f"{name} has no floor in tests/test_layering.py: decide where it belongs")


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{path.name}: relative import"
            found.add(node.module)
            if node.module == "ghosted_fast":
                found |= {f"ghosted_fast.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    name = room(path)
    if name in ("__init__", "_hook"):
        return
    for imported in imports(path):
        if imported.startswith("ghosted_fast."):
            other = imported.split(".")[1]
            if other == name or other in ("_hook", "__version__"):
                continue
            assert floor_of(other) < floor_of(name), f"{name} imports {other}, which is not below"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_core_does_not_know_transformers(path: Path) -> None:
    if room(path) in WITHOUT_TRANSFORMERS:
        assert not any(name.split(".")[0] == "transformers" for name in imports(path))


def test_environment_is_read_in_one_place() -> None:
    for path in modules():
        if path.name != "_env.py":
            assert "os.environ" not in path.read_text(), path
            assert "getenv" not in path.read_text(), path


def test_import_is_light() -> None:
    script = (
        "import sys, ghosted_fast; "
        "heavy = [m for m in ('transformers', 'triton', 'ghosted_fast._C', 'torch') "
        "if m in sys.modules]; print(heavy)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_public_names_exist() -> None:
    import ghosted_fast

    for name in ghosted_fast.__all__:
        assert getattr(ghosted_fast, name) is not None


def test_kernels_folder_is_no_package() -> None:
    assert not (PACKAGE.parent / "kernels" / "__init__.py").exists()


def test_kernels_know_themselves_alone_and_only_operators_know_them() -> None:
    for path in (PACKAGE.parent / "kernels").rglob("*.py"):
        ours = {name for name in imports(path) if name.split(".")[0] == "ghosted_fast"}
        assert all(name.startswith("ghosted_fast.kernels") for name in ours), path
    for path in modules():
        kernels = {name for name in imports(path) if name.startswith("ghosted_fast.kernels")}
        assert not kernels or room(path) == "ops", path
        at_import = imports(path, top_level_only=True)
        assert not any(name.startswith(("ghosted_fast.kernels", "triton")) for name in at_import)


def test_operators_load_without_triton() -> None:
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from ghosted_fast.ops import ghost_apply\n"
        "print(ghost_apply(torch.ones(1, 4), torch.eye(4)).sum().item(), "
        "'ghosted_fast.kernels' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "8.0 False"


def test_no_file_is_two_rooms() -> None:
    root = PACKAGE.parent
    files = [
        *root.glob("ghosted_fast/**/*.py"),
        *root.glob("csrc/**/*.*"),
        *root.glob("kernels/**/*.py"),
        *root.glob("tests/**/*.py"),
    ]
    long = {
        str(p.relative_to(root)): n for p in files if (n := len(p.read_text().splitlines())) > 400
    }
    assert not long


def test_every_package_is_built() -> None:
    text = (PACKAGE.parent / "pyproject.toml").read_text()
    listed = set(re.search(r"^packages = \[(.*?)\]", text, re.M | re.S)[1].split('"')[1::2])  # type: ignore[index]
    found = {
        ".".join(path.parent.relative_to(PACKAGE.parent).parts)
        for path in PACKAGE.rglob("__init__.py")
    }
    assert listed == {*found, "ghosted_fast.kernels", "ghosted_fast.reports.templates"}
