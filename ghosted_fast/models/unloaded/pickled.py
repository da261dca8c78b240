"""Tensors in files of `torch.save` (.bin): where they are, read one at a time and never mapped.

Such a file is a zip archive. A pickle says what the tensors are; the memory of each storage is an
entry of its own, which is not compressed. So a tensor is a place in the file, as in safetensors:
its bytes one after the other, or rows and columns of a storage that others may share.

Source: torch's notes on serialization, https://docs.pytorch.org/docs/stable/notes/serialization.html.
"""

from __future__ import annotations

import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ghosted_fast.errors import CheckpointError, UnsupportedModelError
from ghosted_fast.models.checked.pickle_reasons import said_of_pickle
from ghosted_fast.models.unloaded.files import StoredTensor, is_storable

# An entry begins with 30 bytes, the last four of which are the lengths of two fields behind them.
_ENTRY = struct.Struct("<26xHH")
# What torch.save wrote before version 1.6: a pickle that begins with this number, or a tar file.
_OLDER = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_TAR, _TAR_AT = b"ustar", 257
_LITTLE = b"little"
# What a damaged list of entries ends in.
_DAMAGES = (
    zipfile.BadZipFile,
    struct.error,
    ValueError,
    OverflowError,
    NotImplementedError,  # a version of the format that there is not
    OSError,  # a place that no file has
)


def pickled_tensors_in(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a file of `torch.save` by name, in the order in which they lie.

    Only the pickle is read, and no code that it asks for is run.

    Args:
        path: The file: a dict of tensors by name.

    Raises:
        CheckpointError: It is no such file, damaged, or holds or asks for something else.
        UnsupportedModelError: Its tensors can only be loaded: it was written before torch 1.6,
            compressed, on a big-endian machine, or they are sparse or quantized.
    """
    entries = _entries(path)
    found = _unpickled(path)
    if not isinstance(found, dict):
        raise _no_tensors(path, type(found).__name__)
    stored = {}
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise _no_tensors(path, f"{type(tensor).__name__} under {name!r}")
        stored[name] = _stored(path, name, tensor, entries)
    return dict(sorted(stored.items(), key=lambda pair: pair[1].offset))


def _no_tensors(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"expected tensors by name in {str(path)!r}, got {what}: take the weights out of it "
        "(torch.load), and save them alone with torch.save or save_pretrained"
    )


def _entries(path: Path) -> dict[int, int]:
    """Return where the entries of an archive begin in its file, and how many bytes each has."""
    with path.open("rb") as file:
        head = file.read(_TAR_AT + len(_TAR))
    if head.startswith(_OLDER) or head[_TAR_AT:] == _TAR:
        raise UnsupportedModelError(
            f"expected a file that torch.save wrote since version 1.6, got {str(path)!r} in the "
            "older format, which can only be read whole: load the model, save it once with "
            "save_model, and name that folder"
        )
    found: dict[int, int] = {}
    others: list[str] = []
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            for item in archive.infolist():
                file.seek(item.header_offset)
                name, extra = _ENTRY.unpack(file.read(_ENTRY.size))
                begin = item.header_offset + _ENTRY.size + name + extra
                found[begin] = item.file_size
                file.seek(begin)
                if item.compress_type != zipfile.ZIP_STORED:
                    others.append("compressed ones")
                elif item.filename.endswith("/byteorder") and file.read(6) != _LITTLE:
                    others.append("numbers of a big-endian machine")
    except _DAMAGES as error:
        raise CheckpointError(
            f"expected a whole file of torch.save, got {str(path)!r}, whose entries cannot be "
            f"found ({error}): it is damaged or incomplete, copy or download it again"
        ) from error
    if others:
        raise _only_loaded(path, others[0])
    return found


def _only_loaded(path: Path, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"expected plain tensors to leave in {str(path)!r}, got {what}: load the model, save it "
        "once with save_model, and name that folder"
    )


def _unpickled(path: Path) -> Any:
    """Return what is in a file, its tensors without memory.

    Torch neither reads nor maps the numbers of fake tensors, and says of each storage where it is.
    """
    try:
        with warnings.catch_warnings(), FakeTensorMode():
            warnings.simplefilter("ignore")  # what is wrong is said by the error
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged pickle ends in
        raise CheckpointError(
            f"expected a file of tensors that torch.save wrote, got {str(path)!r}, "
            f"{said_of_pickle(error)}; copy or download it again, or take a copy of the model in "
            "safetensors files"
        ) from error


def _stored(path: Path, name: str, tensor: Tensor, entries: dict[int, int]) -> StoredTensor:
    """Return where a tensor without memory lies in its file."""
    plain = tensor.layout == torch.strided and not tensor.is_conj() and not tensor.is_neg()
    if not plain or not is_storable(tensor.dtype):
        raise _only_loaded(path, f"{name} as {tensor.layout} of {tensor.dtype}")
    begin = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if begin is None:
        raise _only_loaded(path, f"{name}, of which torch does not say where it lies")
    strides = None if tensor.is_contiguous() else tensor.stride()
    offset = begin + tensor.storage_offset() * tensor.dtype.itemsize
    found = StoredTensor(path, offset, tuple(tensor.shape), tensor.dtype, strides)
    size = entries.get(begin)
    if size is None or offset + found.span_bytes > begin + size:
        raise CheckpointError(
            f"expected {found.span_bytes} bytes of {name} from byte {offset} of {str(path)!r} on, "
            "got an archive without them: it is damaged, copy or download it again"
        )
    return found
