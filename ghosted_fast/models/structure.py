"""A model's structure: its decoder layers, found by looking, and models that share memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ghosted_fast.models.built_whole import text_config_of
from ghosted_fast.models.ghost_linear import GhostLinear

# Configuration attributes that count decoder layers, the usual one first: some families give it to
# their encoder.
COUNTS = ("num_hidden_layers", "decoder_layers", "num_decoder_layers", "num_layers", "num_blocks")
# How deep tensors are looked for in the objects that a module holds.
_DEPTH = 4
# Numbers of a parameter that are compared before all of them are.
_LOOKED_AT = 16


def counts_of(config: Any) -> dict[str, int]:
    """Return what a configuration says of the number of layers, by attribute."""
    found = {name: getattr(config, name, None) for name in COUNTS}
    return {name: value for name, value in found.items() if type(value) is int}


def language_model_of(model: Any) -> tuple[str, Any]:
    """Return the text decoder of a model, and its path from `model.base_model`.

    Args:
        model: A transformers model; one of text is its own text decoder.
    """
    base: nn.Module = model.base_model
    text = text_config_of(model.config)
    if text is model.config:
        return "", base
    for module in base.modules():
        config = getattr(module, "config", None)
        if hasattr(module, "base_model") and type(config) is type(text):
            inner = module.base_model
            return next(path for path, item in base.named_modules() if item is inner), inner
    return "", base


def find_layers(model: Any) -> tuple[str, str, str] | str:
    """Search a model for its decoder layers.

    Args:
        model: A transformers model.

    Returns:
        The path of the module that owns them, from `model.base_model`, the attribute that holds
        them and the one that holds the norm behind them ("" for none); or, as the end of a
        sentence, what was found instead.
    """
    path, decoder = language_model_of(model)
    counts = counts_of(text_config_of(model.config))
    found = list(_lists(decoder, set(counts.values())))
    for count in counts.values():
        candidates = [name for name, module in found if len(module) == count]
        if candidates:
            break
    else:
        return f"expected one module list as long as {counts or 'the layers are many'}, found none"
    depth = min(name.count(".") for name in candidates)
    candidates = [name for name in candidates if name.count(".") == depth]
    if len(candidates) != 1:
        return f"expected one module list of {count} layers, found {candidates}"
    owner, _, layers = candidates[0].rpartition(".")
    siblings = list(decoder.get_submodule(owner).named_children())
    position = [name for name, _ in siblings].index(layers)
    norms = [name for name, module in siblings[position + 1 :] if _is_norm(name, module)]
    return ".".join(part for part in (path, owner) if part), layers, norms[0] if norms else ""


def _lists(decoder: nn.Module, lengths: set[int]) -> Iterator[tuple[str, nn.ModuleList]]:
    """Yield the outermost module lists of given lengths, by path."""
    taken: list[str] = []
    for name, module in decoder.named_modules():
        if any(name.startswith(f"{path}.") for path in taken):
            continue
        if isinstance(module, nn.ModuleList) and len(module) in lengths:
            taken.append(name)
            yield name, module


def _is_norm(name: str, module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() or name.startswith("ln_")


def share_copy(model: Any) -> Any:
    """Return a copy of a model's structure that shares the memory of its parameters and buffers.

    Layers can be taken out of the copy, and it can be cast or moved, without touching the original.
    A value written into a shared weight shows in both. Packed weights that a module holds in
    objects of their own, as those of quantized models, are shared too.

    Args:
        model: Any module.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                memo |= {id(tensor): tensor for tensor in _tensors(value, _DEPTH)}
    for parameter in model.parameters():
        shared = parameter
        if type(parameter) is nn.Parameter:
            # An object of its own: casting a module replaces the data of its parameter objects.
            shared = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
            vars(shared).update(vars(parameter))
        memo[id(parameter)] = shared
    memo.update({id(buffer): buffer for buffer in model.buffers()})
    return copy.deepcopy(model, memo)


@torch.no_grad()
def share_equal_weights(model: nn.Module, source: nn.Module) -> int:
    """Let the parameters of a model lie in the memory of equal ones of another model.

    Two models of which one was made of the other then take the memory of one. Parameters are found
    by what they hold, whatever their names. Each of `source` serves one of `model`, so that none
    become tied. Ghosts, which are trained in place, keep their own, and so do vectors: they take
    little, and those of a norm or a bias are alike in many models.

    Args:
        model: The model whose parameters move.
        source: The other one, which is not changed.

    Returns:
        The bytes that are shared now.
    """
    there: dict[tuple[Any, ...], list[nn.Parameter]] = {}
    for weight in source.parameters():
        if _is_matrix(weight):
            there.setdefault(_look(weight), []).append(weight)
    ghosts = (module for module in model.modules() if isinstance(module, GhostLinear))
    own = {id(weight) for ghost in ghosts for weight in ghost.parameters()}
    shared = 0
    for weight in model.parameters():
        if id(weight) in own or not _is_matrix(weight):
            continue
        alike = there.get(_look(weight), [])
        place = next((i for i, other in enumerate(alike) if torch.equal(weight, other)), None)
        if place is not None:
            weight.data = alike.pop(place).data
            shared += weight.nbytes
    return shared


def _is_matrix(weight: nn.Parameter) -> bool:
    return type(weight) is nn.Parameter and weight.is_floating_point() and weight.dim() > 1


def _look(weight: nn.Parameter) -> tuple[Any, ...]:
    """Return what equal parameters have in common, and few others."""
    flat = weight.detach().reshape(-1)
    some = flat[:: max(1, len(flat) // _LOOKED_AT)][:_LOOKED_AT].tolist()
    return weight.shape, weight.dtype, weight.device, *some


def _tensors(value: Any, depth: int) -> Iterator[torch.Tensor]:
    """Yield the tensors that an attribute holds, but those of modules in it."""
    if isinstance(value, torch.Tensor):
        yield value
        return
    if depth == 0 or isinstance(value, nn.Module | type):
        return
    if isinstance(value, dict):
        held = list(value.values())
    elif isinstance(value, list | tuple):
        held = list(value)
    else:
        held = list(getattr(value, "__dict__", {}).values())
    for entry in held:
        yield from _tensors(entry, depth - 1)
