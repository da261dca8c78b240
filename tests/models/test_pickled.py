"""Tensors in files of torch.save: the same numbers, read in their places, and what is refused."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_text import tiny_tokenizer
from torch import nn

from ghosted_fast.errors import CheckpointError, SourceError, UnsupportedModelError
from ghosted_fast.models.loading import load_model
from ghosted_fast.models.unloaded.files import StoredTensor
from ghosted_fast.models.unloaded.opening import open_unloaded
from ghosted_fast.models.unloaded.pickled import pickled_tensors_in
from ghosted_fast.testing import tiny_model

BASE = torch.arange(60.0).view(6, 10)
TENSORS = {
    "whole": BASE,
    "turned": BASE.t(),
    "rows": BASE[2:4],
    "columns": BASE[:, 3:7],
    "steps": BASE[1::2, ::3],
    "spread": torch.arange(3.0).view(3, 1).expand(3, 4),
    "one": torch.tensor(7.0),
    "none": torch.zeros(0, 4),
    "none of a view": BASE[:, 5:5],
    "half": torch.randn(5, 3).bfloat16(),
    "counts": torch.arange(9),
    "flags": torch.tensor([True, False]),
    "parameter": nn.Parameter(torch.randn(4, 4)),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    return tmp_path / "pytorch_model.bin"


def test_tensors_are_those_that_torch_loads(path: Path) -> None:
    expected = torch.load(path, weights_only=True)
    found = pickled_tensors_in(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        mine = found[name]
        assert (mine.shape, mine.dtype) == (tuple(tensor.shape), tensor.dtype), name
        read = mine.read()
        assert read.is_contiguous(), name
        assert torch.equal(read, tensor), name
        plain = tensor.detach().contiguous().view(-1).view(torch.uint8)
        assert b"".join(map(bytes, mine.chunks())) == plain.numpy().tobytes(), name
    assert list(found.values()) == sorted(found.values(), key=lambda item: item.offset)


def test_names_of_one_storage_are_places_in_it(path: Path) -> None:
    found = pickled_tensors_in(path)
    begin = found["whole"].offset
    assert found["turned"].offset == begin
    assert found["rows"].offset == begin + 2 * 10 * 4
    assert found["rows"].strides is None
    assert found["columns"].offset == begin + 3 * 4
    assert found["columns"].span_bytes == (5 * 10 + 4) * 4
    assert begin + found["whole"].nbytes <= path.stat().st_size


def test_no_number_is_read_to_find_them(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With other numbers in the file nothing is found to be different."""
    expected = pickled_tensors_in(path)
    monkeypatch.delattr(StoredTensor, "read")
    monkeypatch.setattr(torch.UntypedStorage, "from_file", None)  # what maps files
    whole = expected["whole"]
    data = bytearray(path.read_bytes())
    data[whole.offset : whole.offset + whole.nbytes] = b"\xff" * whole.nbytes
    path.write_bytes(data)
    assert pickled_tensors_in(path) == expected


class Code:
    """What runs a program when it is unpickled."""

    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('code was run')",)


def older(path: Path) -> None:
    torch.save(TENSORS, path, _use_new_zipfile_serialization=False)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def repacked(path: Path, method: int = zipfile.ZIP_STORED, **changed: bytes) -> None:
    """Write the archive anew, some entries with another content."""
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as old, zipfile.ZipFile(path, "w") as new:
        for item in old.infolist():
            content = changed.get(Path(item.filename).name, old.read(item))
            new.writestr(item.filename, content, method)


def of_another_version(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 6] = 255
    path.write_bytes(data)


def before_the_beginning(path: Path) -> None:
    """Move the list of entries, as the archive's last record has it, but not the entries."""
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\x06\x06") + 50] += 1
    path.write_bytes(data)


def short_storage(path: Path) -> None:
    repacked(path, **{"0": b"\0" * 8})


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (older, UnsupportedModelError, "in the older format, which can only be read whole"),
        (cut_short, CheckpointError, "whose entries cannot be found .*incomplete, copy"),
        (of_another_version, CheckpointError, r"cannot be found \(zip file version"),
        (before_the_beginning, CheckpointError, "cannot be found .*Invalid argument"),
        (lambda path: path.write_bytes(b"no model"), CheckpointError, "cannot be found"),
        (lambda path: path.write_bytes(b""), CheckpointError, "cannot be found"),
        (lambda path: repacked(path, zipfile.ZIP_DEFLATED), UnsupportedModelError, "compressed"),
        (lambda path: repacked(path, byteorder=b"big"), UnsupportedModelError, "big-endian"),
        (lambda path: repacked(path, **{"data.pkl": b"\x80\x02N"}), CheckpointError, "pickle|read"),
        (short_storage, CheckpointError, r"got an archive without them: it is damaged"),
        (lambda path: torch.save({"x": Code()}, path), CheckpointError, "asks for .*exec"),
        (lambda path: torch.save([BASE], path), CheckpointError, "got list: take the weights"),
        (
            lambda path: torch.save({"model": TENSORS}, path),
            CheckpointError,
            "dict under 'model'",
        ),
        (lambda path: torch.save({"step": 3}, path), CheckpointError, "got int under 'step'"),
        (
            lambda path: torch.save({"x": BASE.to_sparse()}, path),
            (CheckpointError, UnsupportedModelError),
            "x as torch.sparse_coo|cannot be read",
        ),
        (
            lambda path: torch.save({"x": BASE.to(torch.complex128)}, path),
            UnsupportedModelError,
            "x as torch.strided of torch.complex128: load the model, save it once",
        ),
        (
            lambda path: torch.save({"x": torch.empty(3, device="meta")}, path),
            UnsupportedModelError,
            "x, of which torch does not say where it lies",
        ),
    ],
)
def test_what_can_not_be_left_in_a_file_is_refused_with_what_to_do(
    path: Path, damage: Callable[[Path], Any], kind: Any, message: str
) -> None:
    damage(path)
    with pytest.raises(kind, match=message) as caught:
        pickled_tensors_in(path)
    assert str(path) in str(caught.value)
    assert "trust the source" not in str(caught.value)


def test_a_folder_with_a_bad_pickle_is_refused_however_it_is_opened(tmp_path: Path) -> None:
    """Transformers itself looks into the file where the configuration names no dtype."""
    model = tiny_model("llama")
    tiny_tokenizer().save_pretrained(tmp_path)
    for dtype in (torch.float32, None):
        model.config.save_pretrained(tmp_path)
        config = tmp_path / "config.json"
        if dtype is None:
            text = config.read_text().replace('"dtype": "float32",', "")
            assert '"dtype"' not in text
            config.write_text(text)
        torch.save({**model.state_dict(), "x": Code()}, tmp_path / "pytorch_model.bin")
        for opened in (open_unloaded, lambda folder: load_model(folder)):
            with pytest.raises((CheckpointError, SourceError)) as caught:
                opened(tmp_path)
            assert "trust the source" not in str(caught.value)
