"""What is in the archive of the sources and in a wheel, and what building asks for."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
BUILDING = {"setuptools", "wheel", "pybind11", "ninja"}
# What pip does to a build in isolation; and an environment without torch.
HIDE = """
import os, sys, sysconfig
hidden = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
sys.path[:] = [name for name in sys.path if name not in hidden]
if os.environ.get("NO_TORCH"):
    real = sysconfig.get_path
    sysconfig.get_path = lambda name, *given, **named: (
        "/nowhere" if name == "platlib" else real(name, *given, **named)
    )
"""


def call(*command: object, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def sources(*names: str) -> set[str]:
    """Return the files of folders, by their paths in the repository."""
    found = (path for name in names for path in (ROOT / name).rglob("*") if path.is_file())
    ours = (path for path in found if path.suffix not in (".pyc", ".so"))
    return {path.relative_to(ROOT).as_posix() for path in ours}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive of the sources, made of a copy: setuptools adds what an older one listed."""
    copy, made = tmp_path_factory.mktemp("copy") / "tree", tmp_path_factory.mktemp("made")
    skipped = shutil.ignore_patterns(
        *(".git", ".venv*", ".*_cache", ".hypothesis", ".cache", "build", "dist", "demo"),
        *("recovery", "__pycache__", "*.so", "*.egg-info"),
    )
    shutil.copytree(ROOT, copy, ignore=lambda folder, names: (
        skipped(folder, names) if Path(folder) == ROOT
        else {name for name in names if name == "__pycache__" or name.endswith(".so")}
    ))  # fmt: skip
    script = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    call(sys.executable, "-c", script, made, cwd=copy, GHOSTED_FAST_BUILD="none")
    (found,) = made.iterdir()
    return found


@pytest.mark.slow
def test_the_archive_holds_all_that_building_and_testing_needs(archive: Path) -> None:
    with tarfile.open(archive) as file:
        held = {name.partition("/")[2] for name in file.getnames()}
    wanted = sources("csrc", "kernels", "ghosted_fast", "docs", "examples", "tests", "benchmarks")
    wanted |= sources("docker") | {"LICENSE", "Makefile", ".dockerignore", "constraints.txt"}
    wanted |= {
        path.name for path in ROOT.iterdir() if path.suffix in (".md", ".py", ".toml", ".in")
    }
    assert not wanted - held
    assert not [name for name in held if name.endswith((".so", ".pyc"))]


def quick_compiler(path: Path) -> str:
    """Write a compiler that optimises less, and so takes less time."""
    real = shutil.which("g++") or shutil.which("clang++")
    path.write_text(
        "#!/bin/sh\n"
        'for word; do shift; [ "$word" = -O3 ] && word=-O1; set -- "$@" "$word"; done\n'
        f'exec {real} "$@"\n'
    )
    path.chmod(0o755)
    return str(path)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_the_archive_builds_offline_and_the_wheel_works(archive: Path, tmp_path: Path) -> None:
    pip = (sys.executable, "-m", "pip")
    quick = quick_compiler(tmp_path / "quick")
    offline = {"PIP_NO_INDEX": "1", "GHOSTED_FAST_BUILD": "cpu", "PYTHONPATH": "", "CXX": quick}
    alone = ("--no-deps", "--no-build-isolation", "--quiet")
    call(*pip, "wheel", *alone, "-w", tmp_path, archive, cwd=tmp_path, **offline)
    (wheel,) = tmp_path.glob("ghosted_fast-*.whl")
    with zipfile.ZipFile(wheel) as file:
        held = set(file.namelist())
    assert "ghosted_fast/py.typed" in held
    package = {name for name in sources("ghosted_fast") if not name.endswith("/py.typed")}
    kernels = {f"ghosted_fast/kernels/{Path(name).name}" for name in sources("kernels")}
    assert not (package | kernels) - held
    assert not [name for name in held if name.startswith(("tests", "docs", "csrc", "benchmarks"))]
    call(*pip, "install", "--quiet", "--no-deps", "--target", tmp_path / "site", wheel,
         cwd=tmp_path, **offline)  # fmt: skip
    script = (
        "import ghosted_fast; from ghosted_fast.ops.compiled import extension; "
        "print(ghosted_fast.__file__, extension().__file__, extension().build_info()['paths'])"
    )
    used = {"PYTHONPATH": str(tmp_path / "site"), "GHOSTED_FAST_NATIVE": "1"}
    package_file, library, paths = call(
        sys.executable, "-c", script, cwd=tmp_path, **used
    ).split(maxsplit=2)  # fmt: skip
    assert Path(package_file).is_relative_to(tmp_path) and Path(library).is_relative_to(tmp_path)
    compiled = {path.stem for path in (ROOT / "csrc/cpu/kernels").glob("path_*.cpp")}
    if os.uname().machine == "x86_64":
        of_arm = {"path_neon", "path_neonbf16"}
        assert {f"path_{name}" for name in paths.split()} == compiled - of_arm
    assert "native" in call(sys.executable, "-m", "ghosted_fast", "doctor", cwd=tmp_path, **used)


@pytest.fixture
def isolated(tmp_path: Path) -> dict[str, str]:
    """Variables for a Python that sees what a build needs, and nothing else that is installed."""
    overlay = tmp_path / "overlay"
    overlay.mkdir()
    for name in (*BUILDING, "_distutils_hack"):
        spec = find_spec(name)
        if spec is not None and spec.origin is not None:
            package = Path(spec.origin).parent
            for found in (package, *package.parent.glob(f"{name}-*.dist-info")):
                (overlay / found.name).symlink_to(found)
    (overlay / "sitecustomize.py").write_text(HIDE)
    return {"PYTHONPATH": str(overlay), "GHOSTED_FAST_BUILD": "cpu"}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What is built, to be built anew."""
    folder, skipped = tmp_path / "checkout", shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("csrc", "kernels", "ghosted_fast"):
        shutil.copytree(ROOT / name, folder / name, ignore=skipped)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


ASK = "from setuptools import build_meta; print(build_meta.get_requires_for_build_wheel())"
needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler"
)


def asked_for(checkout: Path, isolated: dict[str, str], **more: str) -> str:
    return call(sys.executable, "-c", ASK, cwd=checkout, **isolated, **more).splitlines()[-1]


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif(
    not Path(sysconfig.get_path("platlib"), "torch").is_dir(), reason="torch is elsewhere"
)
def test_a_build_in_isolation_takes_the_torch_of_the_environment(
    checkout: Path, isolated: dict[str, str]
) -> None:
    script = "import importlib.util; print(importlib.util.find_spec('torch'))"
    assert call(sys.executable, "-c", script, cwd=checkout, **isolated) == "None\n"
    assert asked_for(checkout, isolated) == "[]"
    assert asked_for(checkout, isolated, NO_TORCH="1") == "['torch>=2.10']"
    assert asked_for(checkout, isolated | {"GHOSTED_FAST_BUILD": "none"}, NO_TORCH="1") == "[]"


@pytest.mark.slow
@needs_compiler
def test_without_torch_building_says_so(checkout: Path, isolated: dict[str, str]) -> None:
    script = "from setuptools import build_meta; build_meta.build_wheel('.')"
    refused = subprocess.run(
        [sys.executable, "-c", script],
        cwd=checkout,
        env={**os.environ, **isolated, "NO_TORCH": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode != 0
    assert "expected torch 2.10 or later to build for, got none: install it" in refused.stderr


def test_versions_agree() -> None:
    torch = next(item for item in PROJECT["project"]["dependencies"] if item.startswith("torch"))
    oldest = re.search(r'OLDEST_TORCH = "(.+)"', (ROOT / "setup.py").read_text(encoding="utf-8"))
    assert oldest is not None and torch == f"torch>={oldest[1]}"
    assert {re.split(r"\W", item)[0] for item in PROJECT["build-system"]["requires"]} == BUILDING


def test_wheels_are_for_every_python_that_is_said() -> None:
    wheels, project = PROJECT["tool"]["cibuildwheel"], PROJECT["project"]
    said = {
        item.rpartition(" ")[2] for item in project["classifiers"] if " :: Python :: 3." in item
    }
    assert wheels["build"] == [f"cp{version.replace('.', '')}-*" for version in sorted(said)]
    assert project["requires-python"] == f">={min(said)}"
    assert wheels["linux"]["archs"] == ["x86_64", "aarch64"]
    assert wheels["linux"]["environment"]["GHOSTED_FAST_BUILD"] == "cpu"
    assert "ghosted-fast doctor" in wheels["test-command"]
