"""A device whose tensors are the processor's but may not meet them, as those of a GPU may not.

    python -m support.simulated_device FOLDER

sweeps the tiny models in a folder on it, and on the processor, and fails where the two differ or
where a tensor of the host meets one of the device. Torch learns of a device once and for all, so
this is a process of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import ghosted_fast as gf
from ghosted_fast.models.unloaded.opening import open_unloaded
from ghosted_fast.surgery.folder import FolderCut
from ghosted_fast.swept import asked, run
from ghosted_fast.testing import relative_rms
from support.simulated_streams import Place, SimulatedStreams
from support.swept_models import text

NAME = "simulated"
_setup_privateuseone_for_python_backend(NAME)
# What may be given tensors of both; for the indices of the others a GPU takes the host's too.
_INDEXING = ("index", "index_put", "index_put_")
_BETWEEN = ("copy_", "_to_copy", "to")


class OnDevice(torch.Tensor):
    """A tensor of the device, which is one of the processor."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        with torch.inference_mode(False):  # views are not inference tensors there either
            return torch.Tensor._make_wrapper_subclass(
                cls,
                held.shape,
                strides=held.stride(),
                storage_offset=held.storage_offset(),
                dtype=held.dtype,
                device=torch.device(NAME, 0),
            )

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, list):  # which torch makes a tensor of where no mode sees it
            place = torch.tensor(place).to(self.device)
        return super().__getitem__(place)

    @classmethod
    def __torch_dispatch__(cls, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _on_the_processor(func, args, kwargs or {})


class Device(TorchDispatchMode):
    """Within it tensors can be made on the device."""

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _on_the_processor(func, args, kwargs or {})


def _on_the_processor(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Do what is asked of tensors of the device, or of the host, with those of the processor."""
    name = func.name().partition("::")[2].partition(".")[0]
    if name == "_fused_sdp_choice":
        return 0  # the one that is made of plain operators
    leaves = tree_leaves((args, kwargs))
    there = [leaf for leaf in leaves if isinstance(leaf, OnDevice)]
    checked = [args[0], *args[2:]] if name in _INDEXING else leaves
    here = [leaf for leaf in checked if isinstance(leaf, Tensor) and leaf.dim() > 0]
    here = [leaf for leaf in here if not isinstance(leaf, OnDevice)]
    if there and here and name not in _BETWEEN:
        raise AssertionError(f"{func} is given tensors of the host and of the device")
    asked_for = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
    stays = asked_for[0].type == NAME if asked_for else bool(there)
    plain = tree_map(_of_the_processor, (args, kwargs))
    found = func(*plain[0], **plain[1])
    if name == "copy_":
        return args[0]
    same = {id(leaf.held): leaf for leaf in there}

    def placed(leaf: Any) -> Any:
        if not stays or not isinstance(leaf, Tensor):
            return leaf
        return same[id(leaf)] if id(leaf) in same else OnDevice(leaf)

    return tree_map(placed, found)


def _of_the_processor(leaf: Any) -> Any:
    if isinstance(leaf, torch.device) and leaf.type == NAME:
        return torch.device("cpu")
    return leaf.held if isinstance(leaf, OnDevice) else leaf


class DeviceStreams(SimulatedStreams):
    """Streams of the device, which computes at once."""

    device = torch.device(NAME, 0)

    def memory(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return super().memory(shape, dtype).to(self.device)

    def send(self, states: Tensor) -> tuple[Tensor, Place]:
        held, there = states.clone(), torch.full_like(states, float("nan")).to(self.device)
        return there, self._ask("in", lambda: there.copy_(held), None)


def swept(folder: Path, device: str, **how: Any) -> tuple[list[int], dict[str, Tensor]]:
    """Return the layers that a sweep has removed, and the ghosts in the folder that it gives."""
    corrections = 0 if "recovery" in how else 1
    options = gf.RunOptions(score_tokens=64, corrections=corrections, device=device)
    cut, report = gf.ghost_model(open_unloaded(folder), text(), run=options, **how)
    assert isinstance(cut, FolderCut)
    files = cut.save(folder.parent / "out", overwrite=True).glob("*.safetensors")
    tensors = {name: tensor for path in files for name, tensor in load_file(path).items()}
    return report.removed, {name: t for name, t in tensors.items() if "ghost" in name}


def ways() -> Iterator[dict[str, Any]]:
    """Yield what is asked of each model."""
    yield {"remove": 2}
    yield {"remove": gf.PerplexityBound(5.0), "options": gf.GhostOptions(features="auto")}
    yield {"removed": [1, 3, 4], "options": gf.GhostOptions(bias=True, first_state="on")}
    yield {"remove": 2, "criterion": "angular", "recovery": "linearpatch-r"}
    yield {"remove": 2, "criterion": "streamline", "recovery": "nbl"}
    yield {"removed": [2], "recovery": "ghost-paper"}


def main(folder: Path) -> None:
    """Sweep all models in a folder on both."""
    named: Callable[[str], torch.device] = torch.device
    asked.device_named, asked.free_memory = named, lambda _: 10**10
    asked._DEVICES = ("cpu", NAME)
    run.streams_of = lambda device: (
        None if device.type == "cpu" else DeviceStreams(computes_at_once=True)
    )
    for model in sorted(path for path in folder.iterdir() if (path / "config.json").exists()):
        for number, how in enumerate(ways()):
            removed, ghosts = swept(model, "cpu", **how)
            with Device():
                found, others = swept(model, f"{NAME}:0", **how)
            assert found == removed and others.keys() == ghosts.keys() != set()
            for name, tensor in ghosts.items():
                assert relative_rms(others[name], tensor) <= 1e-2, (model.name, number, name)
            print(f"{model.name} {number}: {len(ghosts)} tensors")  # noqa: T201 - what it shows


if __name__ == "__main__":
    main(Path(sys.argv[1]))
