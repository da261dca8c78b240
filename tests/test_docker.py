"""What can be told of the Dockerfiles where no daemon is: sources, versions, users, tags."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONSTRAINTS = (ROOT / "constraints.txt").read_text(encoding="utf-8")
VERSIONS = dict(re.findall(r"^([\w-]+)==(\S+)$", CONSTRAINTS, re.MULTILINE))
KNOWN = {"FROM", "RUN", "WORKDIR", "COPY", "ENV", "USER", "ENTRYPOINT", "CMD"}
each = pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)


def instructions(path: Path) -> list[tuple[str, str]]:
    """Return the instructions of a Dockerfile, each with what it is given."""
    lines = [
        line for line in path.read_text().splitlines() if line and not line.lstrip().startswith("#")
    ]
    text = re.sub(r"\\\n\s*", "", "\n".join(lines))
    pairs = (line.partition(" ") for line in text.splitlines())
    return [(name, given.strip()) for name, _, given in pairs]


def last_stage(path: Path) -> list[tuple[str, str]]:
    found = instructions(path)
    start = max(place for place, (name, _) in enumerate(found) if name == "FROM")
    return found[start:]


def commands(path: Path) -> list[list[str]]:
    """Return the commands that are run, word by word."""
    given = " && ".join(text for name, text in instructions(path) if name == "RUN")
    return [shlex.split(command) for command in given.split(" && ")]


def ignored(name: str) -> bool:
    """Return whether .dockerignore keeps a path at the top of the repository from the build."""
    lines = (ROOT / ".dockerignore").read_text().split()
    return f"!{name}" not in lines and "*" in lines


def test_there_is_one_for_processors_and_one_for_cuda() -> None:
    assert [path.name for path in FILES] == ["cpu.Dockerfile", "cuda.Dockerfile"]


@each
def test_only_known_instructions_stand_there(path: Path) -> None:
    found = instructions(path)
    assert {name for name, _ in found} - {"ARG"} == KNOWN
    assert found[0][0] == "FROM"


@each
def test_what_is_copied_is_there_and_not_ignored(path: Path) -> None:
    for name, given in instructions(path):
        if name != "COPY" or given.startswith("--from="):
            continue
        for source in given.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert not ignored(source), source


@each
def test_all_that_a_build_needs_is_copied(path: Path) -> None:
    copied = {
        source
        for name, given in instructions(path)
        if name == "COPY"
        for source in given.split()[:-1]
    }
    manifest = {"csrc", "kernels", "ghosted_fast", "setup.py", "pyproject.toml"}
    assert manifest | {PROJECT["readme"], *PROJECT["license-files"], "constraints.txt"} <= copied


@each
def test_images_have_a_tag_that_stays(path: Path) -> None:
    images = [given.split()[0] for name, given in instructions(path) if name == "FROM"]
    assert len(images) == 2 and len(set(images)) == 1
    for image in images:
        python = re.fullmatch(r"python:(3\.\d+)-slim-\w+", image)
        assert python is not None, image
        assert f"Programming Language :: Python :: {python[1]}" in PROJECT["classifiers"]
    assert ":latest" not in path.read_text()


@each
def test_no_image_runs_as_root(path: Path) -> None:
    stage = last_stage(path)
    (user,) = [given for name, given in stage if name == "USER"]
    assert user == "1000" and f"useradd --uid {user}" in path.read_text()
    names = [name for name, _ in stage]
    assert "RUN" not in names[names.index("USER") :]
    started = [json.loads(given) for name, given in stage if name in ("ENTRYPOINT", "CMD")]
    assert started == [["ghosted-fast"], ["--help"]]


@each
def test_versions_are_those_of_the_constraints(path: Path) -> None:
    for name, version in re.findall(r"([\w-]+)==([\d.]+)", path.read_text()):
        assert VERSIONS[name] == version
    installs = [words for words in commands(path) if "/venv/bin/pip" in words]
    assert len(installs) >= 3
    for words in installs:
        exact = [word for word in words if word.startswith("$(grep '^torch==' constraints.txt)")]
        assert exact or words[words.index("-c") + 1] == "constraints.txt", words
        assert "--no-cache-dir" in words


@each
def test_packages_and_extras_exist(path: Path) -> None:
    wanted = [word for words in commands(path) for word in words if word.startswith(".[")]
    (extras,) = wanted
    assert set(extras[2:-1].split(",")) <= set(PROJECT["optional-dependencies"])
    building = {"setuptools", "wheel", "pybind11", "ninja"}
    assert any(building <= set(words) for words in commands(path))
    named = {word for words in commands(path) for word in words if word.startswith("nvidia-")}
    assert named <= VERSIONS.keys()
    assert bool(named) == (path.stem == "cuda")


@each
def test_it_is_built_for_what_it_is_called(path: Path) -> None:
    built = [given for name, given in instructions(path) if "GHOSTED_FAST_BUILD" in given]
    assert [given.partition(" ")[0] for given in built] == [f"GHOSTED_FAST_BUILD={path.stem}"]


@each
def test_lists_of_system_packages_are_not_left(path: Path) -> None:
    for name, given in instructions(path):
        if name == "RUN" and "apt-get" in given:
            assert "--no-install-recommends" in given
            assert "rm -rf /var/lib/apt/lists/*" in given


@each
def test_the_page_on_installing_names_it_and_the_version(path: Path) -> None:
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    assert f"docker/{path.name}" in page
    for text in (page, path.read_text()):
        for version in re.findall(r"ghosted-fast:([\d.]+)", text):
            assert version == PROJECT["version"]
