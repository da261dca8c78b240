"""What import-linter cannot tell of the package (`make lint` holds the order of its layers)."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ghosted_fast"


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    """Return the first part of the module's name below the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


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


@pytest.mark.slow
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
    listed = set(
        re.search(r"^packages = \[(.*?)\]", text, re.MULTILINE | re.DOTALL)[1].split('"')[1::2]
    )  # type: ignore[index]
    found = {
        ".".join(path.parent.relative_to(PACKAGE.parent).parts)
        for path in PACKAGE.rglob("__init__.py")
    }
    assert listed == {*found, "ghosted_fast.kernels", "ghosted_fast.reports.templates"}


def test_few_doors_in_each_room() -> None:
    root = len([path for path in PACKAGE.iterdir() if path.is_file() and path.suffix != ".so"])
    assert root <= 12
    for folder in PACKAGE.rglob("__init__.py"):
        rooms = [path for path in folder.parent.glob("*.py") if path.name != "__init__.py"]
        assert len(rooms) <= 16, folder.parent
