"""Prove that a cut model is the one that will be loaded: build it anew, without memory, compare."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ghosted_fast.errors import UnsupportedModelError
from ghosted_fast.facts import named_layers
from ghosted_fast.models.contract import hidden_state, plain_tokens, with_state
from ghosted_fast.models.cut_config import lists_changed, read_again
from ghosted_fast.models.decoder import Decoder, evaluating
from ghosted_fast.models.families import decoder_layers, decoder_of, num_layers
from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.models.runtime_classes import named_base_of

# Attributes that say how a module is used, not what it is.
_USE = frozenset(("training", "gradient_checkpointing", "config", "first_tokens"))
# The layer, None outside of all, and the name in it.
_Place = tuple[int | None, str]
_PLAIN = (int, float, str, bool, type(None), torch.dtype, torch.Size)


def differences(cut: Any, dense: Any, removed: list[int]) -> list[str]:
    """Return in what a cut model differs from the one that its configuration builds.

    Compared are the names, shapes and kinds of all weights, and in the layers and in what runs them
    the classes of all modules and every number, string, dtype and function they hold. What differs
    already between the dense model and its own configuration is nothing that the cut can mend.

    Args:
        cut: The model without the layers.
        dense: The model that it was cut from.
        removed: Indices of the layers that were cut.

    Returns:
        What differs, as "the weight x" or "layers.3.attention.scale (0.1, not 0.2)"; empty if they
        are the same.
    """
    try:
        built = _built_anew(cut)
        changed = lists_changed(cut.config, built.config)
        if changed:
            return [f"config.{name}" for name in changed]
        found = dict(_differences(cut, built))
        known = dict(_differences(dense, _built_anew(dense))) if found else {}
    except Exception as error:  # whatever the family's own code makes of the configuration
        return [f"how it is built ({type(error).__name__}: {error})"]
    kept = [i for i in range(len(removed) + num_layers(cut)) if i not in removed]
    return [text for place, text in found.items() if _before(place, kept) not in known]


def _built_anew(model: Any) -> Any:
    """Return a model without memory, built from a model's configuration as loading does."""
    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights():
        built = type(model)(read_again(model.config))
    with torch.device("meta"):
        built.initialize_weights()
    return built


def _before(place: _Place, kept: list[int]) -> _Place:
    """Return what a place in a kept layer was called before the cut."""
    layer, name = place
    return None if layer is None else kept[layer], name


def _differences(here: Any, built: Any) -> Iterator[tuple[_Place, str]]:
    """Yield each place in which two models differ, and what to say of it."""
    layers = decoder_layers(here)
    path = next(name for name, module in here.named_modules() if module is layers)
    mine, other = _weights(here), _weights(built)
    for name in sorted(mine.keys() | other.keys()):
        if mine.get(name) != other.get(name):
            yield _place(name, path), f"the weight {name} ({_pair(mine, other, name)})"
    leaf = path.rpartition(".")[2]
    mine, other = dict(_attributes(decoder_of(here))), dict(_attributes(decoder_of(built)))
    for name in sorted(mine.keys() | other.keys()):
        if mine.get(name) != other.get(name):
            yield _place(name, leaf), f"{name} ({_pair(mine, other, name)})"


def _pair(mine: dict[str, Any], other: dict[str, Any], name: str) -> str:
    return f"{mine.get(name, 'nothing')}, not {other.get(name, 'nothing')}"


def _place(name: str, layers: str) -> _Place:
    """Take a name apart, so that it can be found under the number that the layer had before."""
    number, _, rest = name.removeprefix(f"{layers}.").partition(".")
    if name.startswith(f"{layers}.") and number.isdigit():
        return int(number), rest
    return None, name


def _weights(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Return shape and kind of every weight and buffer by name."""
    found = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not _is_packed(tensor):
            found[name] = (tuple(tensor.shape), "float" if tensor.is_floating_point() else "other")
    return found


def _is_packed(tensor: torch.Tensor) -> bool:
    """Return whether a weight is in a form that its own library makes of it on loading."""
    return type(tensor) not in (nn.Parameter, torch.Tensor) or tensor.dtype == torch.uint8


def _attributes(owner: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield name and value of all that the modules hold."""
    for path, module in owner.named_modules():
        if isinstance(module, GhostLinear):
            continue
        yield f"{path}.<class>".removeprefix("."), named_base_of(type(module)).__name__
        for name, value in vars(module).items():
            if name.startswith("_") or name in _USE:
                continue
            plain = _plain(value)
            if plain is not None:
                yield f"{path}.{name}".removeprefix("."), plain


def _plain(value: Any) -> str | None:
    """Return the text that stands for a value, None for one that cannot be compared."""
    if isinstance(value, functools.partial):
        return f"{_plain(value.func)}{_plain(value.args)}{_plain(value.keywords)}"
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, list | tuple):
        entries = [_plain(entry) for entry in value]
        return None if None in entries else repr(entries)
    if isinstance(value, dict):
        return _plain([*value.keys(), *value.values()])
    name = getattr(value, "__qualname__", None)
    return str(name) if callable(value) and name is not None else None


def check_computed_alike(cut: Any, dense: Any, removed: list[int]) -> None:
    """Raise unless a cut model computes what the dense one does whose layers are passed by.

    Args:
        cut: The model without the layers, and with nothing in their place.
        dense: The model that it was cut from.
        removed: Indices of the layers that were cut.

    Raises:
        UnsupportedModelError: It does not: what the kept layers do depends on the removed ones
            beyond the hidden state, or on their own places.
    """
    decoder = Decoder.of(dense)
    tokens = plain_tokens(dense)

    def pass_by(_: Any, args: Any, kwargs: Any, output: Any) -> Any:
        return with_state(output, hidden_state(args, kwargs))

    handles = [decoder.layers[i].register_forward_hook(pass_by, with_kwargs=True) for i in removed]
    try:
        with evaluating(dense), torch.inference_mode():
            expected = dense(tokens, use_cache=False)[0]
    finally:
        for handle in handles:
            handle.remove()
    try:
        with evaluating(cut), torch.inference_mode():
            got = cut(tokens, use_cache=False)[0]
    except Exception as error:
        raise UnsupportedModelError(
            f"{named_layers(removed)} cannot be removed from this {decoder.family.name} "
            f"model, which does not run without ({type(error).__name__}: {error})"
        ) from error
    if not torch.allclose(got.float(), expected.float(), rtol=1e-2, atol=1e-3):
        raise UnsupportedModelError(
            f"{named_layers(removed)} cannot be removed from this {decoder.family.name} "
            "model: the layers behind them depend on more than the hidden state that they hand on "
            f"(the logits differ by {(got - expected).abs().max().item():.2g} from those of the "
            "model in which the layers are passed by)"
        )
