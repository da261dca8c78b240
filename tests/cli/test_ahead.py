"""What can be known before a model is loaded is told before: options, names, texts, outputs."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from support.tiny_text import save_tiny_model
from typer.testing import CliRunner

from ghosted_fast.checkpoint import save
from ghosted_fast.cli.app import app
from ghosted_fast.errors import CheckpointError, OutputError, SourceError
from ghosted_fast.models import loading
from ghosted_fast.models.checked import hub
from ghosted_fast.models.checked.ahead import Ahead, look_ahead
from ghosted_fast.models.checked.gguf_header import read_gguf_header
from ghosted_fast.models.loading import load_model
from ghosted_fast.testing import tiny_model

FIVE = "\N{ARABIC-INDIC DIGIT FIVE}"


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test that loads a model."""

    def load(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(loading, "load_tokenizer", load)


def fails(*arguments: object, status: int = 1) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    assert result.stdout == "" and "Traceback" not in result.stderr
    return " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.usefixtures("unread")
def test_layers_and_positions_are_known_from_the_configuration(
    model_folder: Path, texts: Path, tmp_path: Path
) -> None:
    fit = ["fit", "--model", model_folder, "--calibration", texts, "--output", tmp_path / "new"]
    assert "expected remove in 1..5 for a model of 6 layers, got 40" in fails(*fit, "--remove", 40)
    assert "layers in 0..5" in fails(*fit, "--removed", "5-7")
    said = fails(*fit, "--remove", 2, "--sequence-length", 129)
    assert "--sequence-length <= 128, the positions of the model, got 129: cut" in said
    rest = ["--evaluation", texts, "--remove", "2,6", "--output", tmp_path / "grid"]
    said = fails("grid", "--model", model_folder, "--calibration", texts, *rest)
    assert "expected remove in 1..5" in said
    said = fails("eval", "--model", model_folder, "--evaluation", texts)
    assert "--sequence-length <= 128" in said


@pytest.mark.usefixtures("unread")
def test_texts_are_known_before(model_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.pdf"
    path.write_bytes(b"%PDF-1.4")
    rest = ["--remove", 2, "--output", tmp_path / "new"]
    said = fails("fit", "--model", model_folder, "--calibration", path, *rest)
    assert "got a PDF document: take the text out of it" in said


@pytest.mark.usefixtures("unread")
def test_what_is_read_is_never_replaced(model_folder: Path, texts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "all" / "dense"
    shutil.copytree(model_folder, folder)
    fit = ["fit", "--model", folder, "--calibration", texts, "--remove", 2, "--overwrite"]
    for output in (folder, folder / "..", texts.parent, tmp_path / "all"):
        said = fails(*fit, "--output", output)
        assert "expected an output apart from what is read, got" in said
    assert "apart from what is read" in fails("export", folder, "--to", "gguf", "--output", folder,
                                              "--overwrite")  # fmt: skip
    assert (folder / "model.safetensors").is_file()


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("place", ["/dev/null/new", "/proc/new", "x" * 300])
def test_places_that_cannot_be_written(
    model_folder: Path, texts: Path, place: str, tmp_path: Path
) -> None:
    fit = ["fit", "--model", model_folder, "--calibration", texts, "--remove", 2]
    assert "expected a place to write" in fails(*fit, "--output", place)
    said = fails(*fit, "--output", tmp_path / "new", "--report", f"{place}.html")
    assert "expected a place to write" in said


def test_other_folders_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear diary")
    with pytest.raises(ValueError, match=r"a model's folder to replace, got .* other files"):
        save.save_model(tiny_model("llama", 2), tmp_path / "notes", overwrite=True)
    assert (tmp_path / "notes" / "diary.txt").is_file()


def test_room_is_looked_for_before_the_work(
    model_folder: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def usage(_: object) -> Any:
        return type("Usage", (), {"free": 1000})()

    monkeypatch.setattr(save.shutil, "disk_usage", usage)
    fit = ["fit", "--model", model_folder, "--calibration", texts, "--remove", 2]
    said = fails(*fit, "--sequence-length", 32, "--output", tmp_path / "new")
    assert "of room to write" in said and "got 0 MiB: free some, or name another place" in said
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_the_old_folder(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = tiny_model("llama", 2)

    def full(*_: object, **__: object) -> None:
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(model, "save_pretrained", full)
    with pytest.raises(OutputError, match=r"No space left .*: nothing was changed there; check"):
        save.save_model(model, folder, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_names_that_are_nearly_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    save_tiny_model(tmp_path / "smaller")
    with pytest.raises(SourceError, match=r"no folder or file .*small' \(near it: smaller\)"):
        load_model(tmp_path / "small")
    snapshots = tmp_path / "models--org--SmolLM-135M" / "snapshots" / "1"
    snapshots.mkdir(parents=True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for offline, why in ((True, "HF_HUB_OFFLINE is set"), (False, "does not answer")):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        asked: list[str] = []
        monkeypatch.setattr(hub, "_answers", lambda name, asked=asked: bool(asked.append(name)))
        with pytest.raises(SourceError, match=rf"{why}.*\(near it: org/SmolLM-135M\)"):
            look_ahead("org/SmolLM-135")
        assert len(asked) == (not offline)
        assert hub.hub_options("org/SmolLM-135M") == {"local_files_only": True}


def gguf(pairs: int = 0, tensors: bytes = b"", count: int = 0) -> bytes:
    key = b"general.architecture"
    value = struct.pack("<Q", len(key)) + key + struct.pack("<IQ", 8, 5) + b"llama"
    return b"GGUF" + struct.pack("<IQQ", 3, count, 1 + pairs) + value + tensors


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGUF", "it ends there"),
        (b"not at all", "does not begin with GGUF"),
        (gguf(pairs=1), "it ends there"),
        (gguf(count=1 << 40), "tensors and"),
        (gguf(count=1, tensors=struct.pack("<QcIQIQ", 1, b"a", 1, 32, 0, 0)), "expected .* bytes"),
        (gguf(count=1, tensors=struct.pack("<QcI", 1, b"a", 9)), "has 9 dimensions"),
    ],
)
def test_damaged_gguf_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{message}.*(copy|download) "):
        read_gguf_header(path)


def test_weights_that_are_missing_are_not_made_up(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_tiny_model(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"none for model.layers.3.mlp.up_proj.weight \(1 miss"):
        load_model(folder)


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    tiny_model("llama", 2).save_pretrained(tmp_path / "bare")
    with pytest.raises(SourceError, match=r"expected a tokenizer beside its weights, .*; copy the"):
        load_model(tmp_path / "bare")


def test_code_that_comes_with_a_model_runs_only_where_it_is_trusted(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", num_layers=2)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("raise RuntimeError('it ran')")
    with pytest.raises(SourceError, match="got one of code that comes with it; if you trust"):
        load_model(folder)
    with pytest.raises(SourceError, match="it ran"):
        load_model(folder, trust_remote_code=True)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--tokens", "1" + "0" * 30),
        ("--sequence-length", "9223372036854775808"),
        ("--threads", "1000000"),
        ("--tokens", FIVE * 4),
        ("--heal", "1e30"),
        ("--heal", "1e999999999"),
        ("--heal", f"{FIVE}k"),
        ("--corrections", "9223372036854775808"),
        ("--removed", "0-99999999999"),
        ("--removed", f"{FIVE}-{FIVE}"),
        ("--damping", FIVE),
    ],
)
def test_absurd_numbers(option: str, value: str) -> None:
    removed = [] if option == "--removed" else ["--removed", "1"]
    command = ["fit", "--model", "m", "--calibration", "c", "--output", "o", *removed]
    assert option in fails(*command, option, value, status=2)


def test_positions_that_are_not_known() -> None:
    Ahead(positions=None).check_length(1 << 20, "length")
