"""Open a model as transformers loads it, but leave all weights in their files.

The class, the configuration, the dtype and what checkpoint names mean are transformers' own: it
runs its loading to the end, with tensors that have a shape and no memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ghosted_fast.errors import (
    CheckpointError,
    UnsupportedModelError,
)
from ghosted_fast.models.auto_classes import auto_classes
from ghosted_fast.models.families import decoder_layers
from ghosted_fast.models.loading import (
    auto_class,
    loading,
    locate_model,
    read_config,
    resolve_dtype,
    source_options,
)
from ghosted_fast.models.unloaded.files import StoredTensor, tensors_in
from ghosted_fast.models.unloaded.gguf_tensors import gguf_config, gguf_tensors_in
from ghosted_fast.models.unloaded.pickled import pickled_tensors_in

_META = torch.device("meta")
# What finds the tensors in a file, by the end of its name.
_READERS = {".safetensors": tensors_in, ".bin": pickled_tensors_in}
# What finds the tensors of a model on meta, given the files that transformers found.
_Finder = Callable[[Any, Any], dict[str, StoredTensor]]


@dataclass(frozen=True, eq=False)
class Unloaded:
    """A model whose weights are in files.

    Attributes:
        model: The model. Its parameters, and the buffers that are saved, are on the meta device;
            other buffers, such as rotary frequencies, are in memory.
        spec: What it was opened from.
        tensors: Every tensor in its files, by the name that it has there.
        settings: How transformers would load it.
        missing: Parameters that the files do not hold, and that are tied to no others.
    """

    model: Any
    spec: str
    tensors: dict[str, StoredTensor]
    settings: Any
    missing: frozenset[str]

    @property
    def folder(self) -> Path:
        """The folder that holds the files."""
        return next(iter(self.tensors.values())).path.parent

    @cached_property
    def layers_path(self) -> str:
        """Path of the decoder layers in the model."""
        return layers_path_of(self.model)

    @cached_property
    def names(self) -> dict[str, str]:
        """What each tensor in the files is called in the model."""
        return names_in(self.model, self.settings, self.tensors)

    @cached_property
    def unchanged(self) -> dict[str, StoredTensor]:
        """The weights that lie in the files as the model has them, by their names in the model."""
        found = _found_in(self.model, self.settings, self.tensors)
        return {inside: self.tensors[name] for name, inside, changed in found if not changed}

    @cached_property
    def ties(self) -> dict[str, str]:
        """Weights that are the same as another, and that one, by their names in the model.

        Where the files hold each of the two in a place of its own, they are two: transformers
        leaves them so too, unless they are equal.
        """
        ties: dict[str, str] = getattr(self.model, "all_tied_weights_keys", None) or {}
        held = {inside: self.tensors[name] for name, inside in self.names.items()}
        return {
            name: other
            for name, other in ties.items()
            if name not in held or other not in held or held[name] == held[other]
        }

    @cached_property
    def by_layer(self) -> dict[int | None, list[str]]:
        """The names of tensors in the files by layer; None for what is in no layer."""
        found: dict[int | None, list[str]] = {}
        for name in self.tensors:
            found.setdefault(layer_in(self.names[name], self.layers_path), []).append(name)
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in the files."""
        return sum(item.nbytes for item in self.tensors.values())


def layers_path_of(model: Any) -> str:
    """Return the path of a model's decoder layers in it."""
    layers = decoder_layers(model)
    return next(name for name, module in model.named_modules() if module is layers)


def layer_in(name: str, layers_path: str) -> int | None:
    """Return the number of the layer that a weight of a model is in, None if it is in none."""
    number, _, _ = name.removeprefix(f"{layers_path}.").partition(".")
    return int(number) if name.startswith(f"{layers_path}.") and number.isdigit() else None


def open_unloaded(spec: str | Path, dtype: str | torch.dtype | None = None) -> Unloaded:
    """Open a model and leave its weights in their files.

    Args:
        spec: A local folder, a hub id, or a GGUF file, whose tensors are dequantized when they are
            read.
        dtype: As in `load_model`.

    Raises:
        SourceError: There is no such model, or transformers cannot load it.
        UnsupportedModelError: Its weights are in other files than safetensors and those of
            `torch.save`, or quantized; see `pickled_tensors_in`.
        CheckpointError: A file is damaged, or does not hold what a ghosted model needs.
    """
    wanted = resolve_dtype(dtype)
    name, gguf_file = locate_model(str(spec), None)
    seen: list[Any] = []
    find: _Finder = _tensors_in_files
    with loading(spec), quietly():
        if gguf_file is None:
            config = read_config(name)
            how: dict[str, Any] = {"dtype": wanted or "auto", **source_options(name)}
        else:
            path = Path(name) / gguf_file
            spec, config = str(path), gguf_config(path)
            found_as = wanted or torch.float32  # as transformers dequantizes
            find = partial(_tensors_in_gguf, path, found_as)
            how = {"dtype": found_as, "config": config, "state_dict": {}}
        _check_plain(config, spec)
        model_class = _class_for(config, auto_class(config if gguf_file is None else None))
        opened = _without_weights(model_class, seen, find)
        model = opened.from_pretrained(name if gguf_file is None else None, **how)
    model.__class__ = model_class
    if gguf_file is not None:
        model.config._name_or_path = str(spec)
    tensors, settings, missing = seen[0]
    _give_buffers(model)
    found = Unloaded(model.eval(), str(spec), tensors, settings, frozenset(missing))
    lacking = sorted(n for n in missing if layer_in(n, found.layers_path) is not None)
    if lacking:
        raise CheckpointError(
            f"expected all weights of the layers in the files of {str(spec)!r}, which lack "
            f"{', '.join(lacking[:4])}: copy or save the model again"
        )
    return found


def names_in(model: Any, settings: Any, names: Mapping[str, Any]) -> dict[str, str]:
    """Return what tensors in files are called in a model; of several that become one, that one.

    Args:
        model: The model.
        settings: How transformers loads it.
        names: The names in the files.
    """
    return {name: inside for name, inside, _ in _found_in(model, settings, names)}


def _found_in(
    model: Any, settings: Any, names: Mapping[str, Any]
) -> Iterator[tuple[str, str, bool]]:
    """Yield names in files, what each is called in a model, and whether its numbers are changed."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    known = model.state_dict()
    mapping = settings.weight_mapping or []
    renamings = [item for item in mapping if isinstance(item, WeightRenaming)]
    converters = [item for item in mapping if isinstance(item, WeightConverter)]
    prefix = model.base_model_prefix
    for name in names:
        new, changed = rename_source_key(name, renamings, converters, prefix, known)
        if new not in known and name in known:  # as in transformers' own loop
            new, changed = rename_source_key(name, [], [], prefix, known)
        yield name, new, changed is not None


def load_into(model: Any, settings: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Put some tensors of a model's files into it, as transformers does.

    Args:
        model: The model.
        settings: How transformers loads it.
        tensors: By their names in the files. Those of the meta device stay there.

    Returns:
        Transformers' record of what was missing, unexpected and of another shape.
    """
    from transformers.core_model_loading import convert_and_load_state_dict_in_model

    device = next(iter(tensors.values())).device if tensors else _META
    settings = replace(settings, device_map={"": str(device)})
    conversions = getattr(model, "_weight_conversions", None)
    with quietly():
        info, _ = convert_and_load_state_dict_in_model(model, dict(tensors), settings)
    if device != _META:
        model._weight_conversions = conversions  # those of the whole model
    return info


def finished(model: Any, info: Any) -> Any:
    """Tie what is tied, and return the record without what is not missed."""
    model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
    model._adjust_missing_and_unexpected_keys(info)
    return info


def meta_tensors(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return tensors without memory of the same shapes and dtypes."""
    return {
        name: torch.empty(tuple(item.shape), dtype=item.dtype, device=_META)
        for name, item in tensors.items()
    }


def _class_for(config: Any, auto: Any) -> Any:
    """Return the class that an auto class of transformers loads for a configuration."""
    from transformers.models.auto.auto_factory import _get_model_class

    try:
        return _get_model_class(config, auto._model_mapping)
    except KeyError:
        found = auto_classes(type(config)).get(auto)
        if found is None:
            raise
        return found


def _check_plain(config: Any, spec: str | Path) -> None:
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            f"expected unquantized weights to leave in their files, got {str(spec)!r}, which is "
            "quantized: load it (load_model), or name the model that it was made of"
        )


def _tensors_in_files(_: Any, files: Any) -> dict[str, StoredTensor]:
    """Return the tensors in the files that transformers found for a model."""
    paths = [Path(file) for file in files or []]
    if not paths or not all(path.suffix in _READERS for path in paths):
        raise UnsupportedModelError(
            "expected weights in safetensors files or in .bin files of torch.save, got "
            f"{', '.join(path.name for path in paths) or 'none'}: load the model and save it "
            "once with save_model"
        )
    tensors: dict[str, StoredTensor] = {}
    for path in paths:
        tensors |= _READERS[path.suffix](path)
    return tensors


def _tensors_in_gguf(path: Path, dtype: torch.dtype, model: Any, _: Any) -> Any:
    """Return the tensors in a GGUF file by their names in a model."""
    return gguf_tensors_in(path, model, dtype)


def _without_weights(model_class: Any, seen: list[Any], find: _Finder) -> Any:
    """Return a class that loads as another one does, but for the weights.

    Args:
        model_class: The other.
        seen: Where the tensors, the settings and the missing names go.
        find: Finds the tensors.
    """

    def _load_pretrained_model(
        model: Any, state_dict: Any, files: Any, settings: Any, *_: Any, **__: Any
    ) -> Any:
        tensors = find(model, files)
        info = load_into(model, settings, meta_tensors(tensors))
        seen.append((tensors, settings, info.missing_keys))
        return info, None

    def _finalize_model_loading(model: Any, settings: Any, info: Any) -> Any:
        finished(model, info)
        seen[0] = (*seen[0][:2], set(info.missing_keys))
        return info

    marks = ("_derived_step", "_derived_from")  # of what is made at run time
    return type(model_class)(
        model_class.__name__,
        (model_class,),
        {
            **{name: value for name, value in vars(model_class).items() if name in marks},
            "__module__": model_class.__module__,
            "__qualname__": model_class.__qualname__,
            "_load_pretrained_model": staticmethod(_load_pretrained_model),
            "_finalize_model_loading": staticmethod(_finalize_model_loading),
        },
    )


def _give_buffers(model: Any) -> None:
    """Give a model on meta the buffers that no file holds, with their values."""
    for owner in model.modules():
        for name in owner._non_persistent_buffers_set:
            buffer = owner._buffers.get(name)
            if buffer is not None and buffer.device == _META:
                owner._buffers[name] = torch.empty_like(buffer, device="cpu")
    for module in model.modules():
        vars(module).pop("_is_hf_initialized", None)
    with torch.no_grad():
        model.initialize_weights()


def replace_tensors(owner: nn.Module, found: Mapping[tuple[nn.Module, str], Tensor]) -> None:
    """Put tensors into the modules of another, in the places of parameters and buffers.

    Args:
        owner: Only modules in it are changed.
        found: By module and name.
    """
    inside = set(owner.modules())
    for (module, name), tensor in found.items():
        if module in inside:
            held: Any = module._parameters if name in module._parameters else module._buffers
            held[name] = tensor


def tensors_on_meta(owner: nn.Module) -> dict[tuple[nn.Module, str], Tensor]:
    """Return the parameters and buffers without memory in a module, by module and name."""
    return {
        (module, name): tensor
        for module in owner.modules()
        for held in (module._parameters, module._buffers)
        for name, tensor in held.items()
        if tensor is not None and tensor.device == _META
    }


@contextmanager
def buffers_on(owner: nn.Module, device: torch.device) -> Iterator[None]:
    """Have the buffers of a module that no file holds on a device, as long as it computes there."""
    _move_buffers(owner, device)
    try:
        yield
    finally:
        _move_buffers(owner, torch.device("cpu"))


def _move_buffers(owner: nn.Module, device: torch.device) -> None:
    for module in owner.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device not in (device, _META):
                module._buffers[name] = buffer.to(device)


@contextmanager
def quietly() -> Iterator[None]:
    """Keep transformers from reporting on each piece that it loads or saves."""
    from transformers.utils import logging as of_transformers

    level, shown = of_transformers.get_verbosity(), of_transformers.is_progress_bar_enabled()
    of_transformers.set_verbosity(logging.ERROR)
    of_transformers.disable_progress_bar()
    try:
        yield
    finally:
        of_transformers.set_verbosity(level)
        if shown:
            of_transformers.enable_progress_bar()
