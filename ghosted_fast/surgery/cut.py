"""Cut layers out of a model, put ghosts into the gaps, and make the rest agree."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import index as as_index
from typing import Any

from ghosted_fast.checkpoint.model_card import IMPORTED, attach_report
from ghosted_fast.checkpoint.record import is_ghosted, refresh_record, removal_record
from ghosted_fast.checkpoint.transformers_types import become_ghosted_class
from ghosted_fast.errors import ArgumentError, UnsupportedModelError
from ghosted_fast.facts import named_layers, runs_of
from ghosted_fast.models.built_whole import (
    cut_owner,
    keep_layers,
    keep_ties,
    number_layers,
    text_config_of,
)
from ghosted_fast.models.contract import Contract
from ghosted_fast.models.cut_config import computed_lists, cut_config, lists_changed, read_again
from ghosted_fast.models.decoder import Decoder, model_name
from ghosted_fast.models.families import (
    Family,
    decoder_layers,
    decoder_of,
    find_family,
    hidden_size,
)
from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.models.ghosted_layers import (
    INPUT,
    OUTPUT,
    attach_ghosts,
    check_swappable,
    ghost_of,
)
from ghosted_fast.models.quantized.names import Renumbering
from ghosted_fast.models.quantized.unpacked import forget_packing
from ghosted_fast.models.structure import counts_of, share_copy
from ghosted_fast.surgery.proof import differences


def removed_intervals(removed: Iterable[int], num_layers: int) -> list[tuple[int, int]]:
    """Return the gaps that removing layers leaves.

    Args:
        removed: Indices of the layers to remove, in any order.
        num_layers: Number of layers of the model.

    Returns:
        The maximal runs [start, stop) of removed layers, sorted.

    Raises:
        TypeError: An index is no integer.
        ArgumentError: No layer is removed or none is kept, or an index is out of range or given
            twice.
    """
    given = list(removed)
    if any(isinstance(layer, bool) or not hasattr(layer, "__index__") for layer in given):
        raise TypeError(f"expected the indices of layers to remove as integers, got {given}")
    layers = sorted(as_index(layer) for layer in given)
    if not layers:
        raise ArgumentError("expected at least one layer to remove, got none")
    if layers[0] < 0 or layers[-1] >= num_layers:
        raise ArgumentError(
            f"expected layers in 0..{num_layers - 1} (the model has {num_layers}), got {layers}"
        )
    if len(set(layers)) != len(layers):
        raise ArgumentError(f"expected each layer once, got {layers}")
    if len(layers) == num_layers:
        raise ArgumentError(f"expected at least one of the {num_layers} layers to be kept")
    return runs_of(layers)


def prune_model(model: Any, removed: Iterable[int], inplace: bool = False) -> Any:
    """Remove layers and put nothing in their place.

    Args:
        model: A transformers decoder-only model.
        removed: Indices of the layers to remove.
        inplace: Whether to change `model` itself; otherwise a copy that shares its weights.

    Returns:
        The pruned model: an ordinary model of its family, where a configuration of the family
        describes the layers that are left.
    """
    return remove_layers(model, removed, inplace=inplace)


def remove_layers(
    model: Any,
    removed: Iterable[int],
    ghosts: Sequence[GhostLinear | None] | None = None,
    inplace: bool = False,
) -> Any:
    """Remove layers and put a ghost into each gap.

    The ghost of a gap lives in the kept layer before it, as `ghost`; that of a gap at the start in
    the first kept layer, as `input_ghost`. The layers that are kept are renumbered, and the
    configuration follows. A model that already has ghosts keeps them, except those of the layers
    that are removed.

    Args:
        model: A transformers decoder-only model, ghosted or not.
        removed: Indices of the layers to remove.
        ghosts: One ghost or None for each gap, in the order of `removed_intervals`; None for no
            ghost at all. They become part of the model, moved and cast as its layers are.
        inplace: Whether to change `model` itself; otherwise a copy that shares its weights.

    Returns:
        The model: `ghosted_<family>` if it has a ghost, or if no configuration of the family
        describes the layers that are left; else an ordinary model of its family.

    Raises:
        TypeError: `model` is no transformers model, or a ghost no `GhostLinear`.
        ArgumentError: Layers or ghosts do not fit the model, or a gap starts where a ghost already
            stands.
        UnknownFamilyError, UnsupportedModelError: See `find_family`; or other layers need those, or
            the cut model would be another once it was saved and loaded.
    """
    decoder = Decoder.of(model)
    intervals = removed_intervals(removed, decoder.num_layers)
    placed = _place_ghosts(model, intervals, ghosts)
    _check_lists(model.config, decoder.family, decoder.num_layers)
    dropped = {layer for start, stop in intervals for layer in range(start, stop)}
    reason = decoder.needs(dropped)
    if reason is not None:
        raise UnsupportedModelError(reason)
    if placed:
        for module in (model, model.base_model, decoder.owner, *decoder.layers):
            check_swappable(module)
    cut = Cut(sorted(dropped), placed)
    trial, whole = _proven(model, cut)
    if not inplace:
        return trial
    _cut(model, cut, whole=whole)
    return model


@dataclass(frozen=True)
class Cut:
    """Which layers go, and the new layer index, side and module of each ghost."""

    removed: list[int]
    placed: list[tuple[int, str, GhostLinear]]


def _proven(model: Any, cut: Cut) -> tuple[Any, bool]:
    """Return a cut copy that will be the same once saved and loaded, and whether it is built whole.

    Raises:
        UnsupportedModelError: There is none.
    """
    for asked in (False, True):
        trial = share_copy(model)
        whole = _cut(trial, cut, asked)
        found = differences(trial, model, cut.removed)
        if not found:
            return trial, whole
        if whole:  # there is no other way
            break
    others = f" and {len(found) - 1} more places" if len(found) > 1 else ""
    raise UnsupportedModelError(
        f"{named_layers(cut.removed)} cannot be removed from this "
        f"{find_family(model).name} model: saved and loaded, it would be another, in "
        f"{found[0]}{others}"
    )


def _cut(model: Any, cut: Cut, whole: bool) -> bool:
    """Take layers out of a model and put ghosts in, in place.

    Args:
        model: The model.
        cut: What goes and what comes.
        whole: Whether the model is to be built whole when it is loaded, the layers taken out
            afterwards, where the cut configuration does not describe it.

    Returns:
        Whether it will be.
    """
    config, decoder = _own_config(model), Decoder.of(model)
    count = decoder.num_layers
    kept = [layer for layer in range(count) if layer not in cut.removed]
    dense_count, dense_removed = removal_record(config, count)
    dense_kept = [layer for layer in range(dense_count) if layer not in dense_removed]
    text, known = text_config_of(config), getattr(config, "ghost", None) or {}
    lists = computed_lists(text, count)
    names = Renumbering.of(model, decoder.layers, kept, gone=False)
    dense_values = cut_config(config, decoder.family, kept, count, names)
    keep_layers(decoder.owner, decoder.layers, kept)
    keep_ties(model, decoder.layers, kept)
    whole = whole or "dense_config" in known
    if cut.placed or is_ghosted(config) or whole:
        if known:
            config.ghost = None  # it is that of the model before the cut
        now = computed_lists(text, len(kept))
        wanted = {name: [value[layer] for layer in kept] for name, value in lists.items()}
        different = {name: value for name, value in wanted.items() if now.get(name) != value}
        if whole:
            mended = lists_changed(config, read_again(config))
            different |= {name: list(getattr(text, name)) for name in mended}
        become_ghosted_class(
            model,
            removed=sorted([*dense_removed, *(dense_kept[layer] for layer in cut.removed)]),
            num_hidden_layers=dense_count,
            whole={
                "dense_config": {**dense_values, **known.get("dense_config", {})},
                "per_layer": different,
            }
            if whole
            else None,
        )
        for index, _, ghost in cut.placed:
            weight = next(decoder.layers[index].parameters())
            ghost.to(device=weight.device, dtype=decoder.dtype)
        attach_ghosts(model.base_model, decoder.owner, decoder.layers, cut.placed)
        refresh_record(model)
    forget_packing(model)
    return whole


def adopt_removal(model: Any, removed: Iterable[int], boundaries: Iterable[int]) -> None:
    """Make a ghosted model, in place, of one that somebody else took layers out of.

    The layers are numbered anew, and the configuration follows if it still describes all layers.
    The ghosts themselves are put in afterwards.

    Args:
        model: A transformers decoder-only model without some of its layers.
        removed: Indices of these, in the dense model.
        boundaries: Where ghosts will stand: the number of layers that the model has before each.

    Raises:
        ArgumentError: `removed` does not fit the number of layers, a boundary is at no gap, or the
            model is ghosted already.
        UnsupportedModelError: See `find_family` and `check_swappable`.
    """
    family, layers, decoder = find_family(model), decoder_layers(model), decoder_of(model)
    given, described = list(removed), text_config_of(model.config).num_hidden_layers
    count = len(layers) + len(given)
    intervals = removed_intervals(given, count)
    dropped = {layer for start, stop in intervals for layer in range(start, stop)}
    kept = [layer for layer in range(count) if layer not in dropped]
    gaps = [sum(layer < start for layer in kept) for start, _ in intervals]
    if not set(boundaries) <= set(gaps):
        raise ArgumentError(
            f"expected ghosts behind as many layers as are kept before the gaps {intervals}, "
            f"{gaps}, got ghosts behind {sorted(boundaries)} layers"
        )
    if is_ghosted(model.config):
        raise ArgumentError("expected a model without a record of removed layers, got one")
    if described not in (count, len(layers)):
        raise ArgumentError(
            f"expected config.num_hidden_layers to be {len(layers)}, the layers that the model "
            f"has, or {count}, with the {len(given)} removed ones, got {described}"
        )
    # The lists must fit now, so that they fit when they are cut.
    _check_lists(model.config, family, described)
    for module in (model, decoder, *layers):
        check_swappable(module)
    config = _own_config(model)
    there = list(range(len(layers)))
    names = Renumbering.of(model, layers, kept, gone=True) if described == count else None
    cut_config(config, family, kept if described == count else there, described, names)
    number_layers(dict(zip(kept, layers, strict=True)), kept)
    cut_owner(decoder, kept, count)
    become_ghosted_class(model, removed=sorted(dropped), num_hidden_layers=count)
    name = model_name(model)
    attach_report(config, {"model": name, "recovery": IMPORTED})


def _contract_of(model: Any) -> Contract:
    """Return what a model's layers take from one another, nothing where it cannot run here.

    A model whose kernels are missing on this machine can still be cut, saved and run elsewhere.
    """
    decoder = Decoder.of(model)
    try:
        return decoder.contract
    except UnsupportedModelError as error:
        if not isinstance(error.__cause__, ImportError):
            raise
        return Contract([None] * decoder.num_layers, frozenset(), {})


def _place_ghosts(
    model: Any, intervals: list[tuple[int, int]], ghosts: Sequence[GhostLinear | None] | None
) -> list[tuple[int, str, GhostLinear]]:
    """Return the new layer index, side and module of each ghost, checked against the model."""
    if ghosts is None:
        return []
    if len(ghosts) != len(intervals):
        raise ArgumentError(
            f"expected {len(intervals)} ghosts (or None), one for each of the gaps {intervals}, "
            f"got {len(ghosts)}"
        )
    layers, width = decoder_layers(model), hidden_size(model)
    contract = _contract_of(model)
    placed: list[tuple[int, str, GhostLinear]] = []
    dropped = 0
    for (start, stop), ghost in zip(intervals, ghosts, strict=True):
        if ghost is not None:
            if not isinstance(ghost, GhostLinear):
                raise TypeError(f"expected a GhostLinear or None, got {type(ghost).__name__}")
            if ghost.hidden_size != width:
                raise ArgumentError(
                    f"expected ghosts of hidden_size {width}, as the model's, "
                    f"got {ghost.hidden_size}"
                )
            beside = contract.beside(start, stop)
            if beside is None:
                raise UnsupportedModelError(contract.why_needed(range(start, stop)))
            side = OUTPUT if beside < start else INPUT
            if ghost_of(layers[beside], side) is not None:
                raise ArgumentError(
                    f"the gap {start, stop} starts where a ghost already stands: fit one ghost "
                    "for the whole gap from the dense model instead"
                )
            placed.append((start - dropped - (side == OUTPUT), side, ghost))
        dropped += stop - start
    return placed


def _check_lists(config: Any, family: Family, count: int) -> None:
    """Raise unless the configuration has an entry per layer wherever it has any."""
    text = text_config_of(config)
    counts = counts_of(text)
    if count not in counts.values():
        raise UnsupportedModelError(
            f"expected config.num_hidden_layers = {count}, the number of layers that the model "
            f"has, got {counts.get('num_hidden_layers')}"
        )
    for name in family.per_layer_lists:
        entries = getattr(text, name, None)
        if entries is not None and len(entries) != count:
            raise UnsupportedModelError(
                f"expected config.{name} to have one entry for each of the {count} layers, "
                f"got {len(entries)}"
            )


def _own_config(model: Any) -> Any:
    """Give a model a configuration that it shares with no other model, and return it."""
    memo: dict[int, Any] = {}
    new = copy.deepcopy(model.config, memo)
    for module in model.modules():
        for name, value in vars(module).items():
            if hasattr(value, "get_text_config") and id(value) in memo:
                vars(module)[name] = memo[id(value)]
    settings = getattr(new, "quantization_config", None)
    if getattr(model, "hf_quantizer", None) is not None and settings is not None:
        model.hf_quantizer.quantization_config = settings
    return new
