"""Where each model family keeps its decoder layers, its final norm and its per-layer settings.

One frozen record per family. A model of a family that is not in the table is searched: a decoder
has exactly one `nn.ModuleList` as long as `config.num_hidden_layers`, with a norm beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ghosted_fast.errors import UnknownFamilyError, UnsupportedModelError
from ghosted_fast.models.built_whole import text_config_of
from ghosted_fast.models.checked.usable import check_unwrapped
from ghosted_fast.models.structure import find_layers, language_model_of
from ghosted_fast.models.versions import check_transformers

GHOSTED_PREFIX = "ghosted_"


@dataclass(frozen=True)
class Refusal:
    """A configuration value under which layers cannot be removed.

    Args:
        attribute: Name of the configuration attribute.
        required: The only value that can be served.
        reason: Why any other value is refused, as the end of a sentence.
    """

    attribute: str
    required: Any
    reason: str


@dataclass(frozen=True)
class Family:
    """Where a family keeps what surgery has to touch.

    Args:
        name: `config.model_type` of the dense model.
        owner: Path from `model.base_model` to the module that runs the layers; "" is itself.
        layers: Attribute of the owner that holds the `nn.ModuleList` of decoder layers.
        final_norm: Attribute of the owner that holds the norm after the last layer; "" for none.
        per_layer_lists: Configuration attributes with one entry per layer; they are sliced.
        layer_index_lists: Configuration attributes that list layer indices; they are remapped.
        refusals: Configuration values under which layers cannot be removed.
        make_explicit: Turns settings that depend on a layer's index into lists, in place.
        mlp_output: Path in a layer of the module whose output the layer adds last; "" if unknown.
        mlp_projections: Paths of the linear layers (or stacked weights [experts, d, in]) of which
            one makes that output; none where a norm stands behind it.
    """

    name: str
    owner: str = ""
    layers: str = "layers"
    final_norm: str = "norm"
    per_layer_lists: tuple[str, ...] = ("layer_types", "mlp_layer_types")
    layer_index_lists: tuple[str, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    make_explicit: Callable[[Any], None] | None = None
    mlp_output: str = "mlp"
    mlp_projections: tuple[str, ...] = ("mlp.down_proj", "mlp.experts.down_proj")


def _with_norm_behind_mlp(name: str) -> Family:
    return Family(name, mlp_output="post_feedforward_layernorm", mlp_projections=())


def _list_dense_layers(config: Any) -> None:
    """Replace Qwen3-MoE's `decoder_sparse_step` by the list of the layers it leaves dense."""
    step = config.decoder_sparse_step
    listed = set(config.mlp_only_layers)
    config.mlp_only_layers = [
        i for i in range(config.num_hidden_layers) if i in listed or (i + 1) % step
    ]
    config.decoder_sparse_step = 1


_FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("llama"),
        Family("qwen2"),
        Family("qwen3"),
        Family("mistral"),
        _with_norm_behind_mlp("gemma2"),
        _with_norm_behind_mlp("gemma3_text"),
        Family("phi3"),
        _with_norm_behind_mlp("olmo2"),
        Family("mixtral"),
        Family(
            "qwen3_moe",
            layer_index_lists=("mlp_only_layers",),
            make_explicit=_list_dense_layers,
        ),
        Family(
            "gpt2",
            layers="h",
            final_norm="ln_f",
            mlp_projections=("mlp.c_proj",),
            refusals=(
                Refusal(
                    "scale_attn_by_inverse_layer_idx",
                    False,
                    "each layer's attention is scaled by its index, which removal would change",
                ),
            ),
        ),
        Family(
            "opt",
            owner="decoder",
            final_norm="final_layer_norm",
            mlp_output="fc2",
            mlp_projections=("fc2",),
            refusals=(
                Refusal(
                    "do_layer_norm_before",
                    True,
                    "its layers end with a norm, and ghosts need a pre-norm model",
                ),
                Refusal("_remove_final_layer_norm", False, "it has no norm after the last layer"),
            ),
        ),
        Family(
            "gpt_neox",
            final_norm="final_layer_norm",
            mlp_projections=("mlp.dense_4h_to_h",),
        ),
    )
}


def register_family(family: Family) -> None:
    """Add a family to the table, or replace its record.

    Args:
        family: The record. Saved models of the family load again once it has been registered.
    """
    _FAMILIES[family.name] = family


def known_families() -> dict[str, Family]:
    """Return the records of the table, by the family's name."""
    return dict(_FAMILIES)


def dense_model_type(config: Any) -> str:
    """Return `config.model_type` without the prefix that ghosted models carry."""
    return str(config.model_type).removeprefix(GHOSTED_PREFIX)


def find_family(model: Any) -> Family:
    """Return the record of a model's family, from the table or by looking at the model.

    Args:
        model: A transformers decoder-only model, with or without its language model head, or one
            that reads pictures too and holds such a decoder.

    Returns:
        The record. For a ghosted model it is that of the dense family.

    Raises:
        VersionError: The installed transformers is too old or too new.
        TypeError: `model` is no transformers model.
        UnsupportedModelError: The family is known, but not in this configuration.
        UnknownFamilyError: The family is unknown and its layers could not be found.
    """
    check_transformers()
    config = _config_of(model)
    if config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{type(model).__name__} has an encoder and a decoder: expected a decoder-only model"
        )
    text = text_config_of(config)
    known = _FAMILIES.get(dense_model_type(text))
    family = _family_by_structure(model) if known is None else _inside(model, known)
    for refusal in family.refusals:
        value = getattr(text, refusal.attribute, refusal.required)
        if value != refusal.required:
            raise UnsupportedModelError(
                f"layers cannot be removed from this {family.name} model: expected "
                f"config.{refusal.attribute} = {refusal.required}, got {value}, where "
                f"{refusal.reason}"
            )
    return family


def decoder_of(model: Any, family: Family | None = None) -> nn.Module:
    """Return the module that owns and runs the decoder layers.

    Args:
        model: A transformers decoder-only model.
        family: Its record, where that is known already; likewise in the next two.
    """
    base: nn.Module = model.base_model
    return base.get_submodule((family or find_family(model)).owner)


def decoder_layers(model: Any, family: Family | None = None) -> nn.ModuleList:
    """Return the list of decoder layers."""
    family = family or find_family(model)
    layers = getattr(decoder_of(model, family), family.layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


def layers_path(model: Any, family: Family | None = None) -> str:
    """Return the path of the list of decoder layers from `model.base_model`."""
    family = family or find_family(model)
    return f"{family.owner}.{family.layers}".removeprefix(".")


def final_norm(model: Any, family: Family | None = None) -> nn.Module:
    """Return the norm after the last decoder layer.

    Raises:
        UnsupportedModelError: The family has none.
    """
    family = family or find_family(model)
    if not family.final_norm:
        raise UnsupportedModelError(f"the family {family.name!r} has no norm after the last layer")
    norm = getattr(decoder_of(model, family), family.final_norm)
    assert isinstance(norm, nn.Module)
    return norm


def hidden_size(model: Any) -> int:
    """Return the width of the hidden state between two decoder layers."""
    return int(text_config_of(_config_of(model)).hidden_size)


def num_layers(model: Any) -> int:
    """Return the number of decoder layers that the model has now."""
    return len(decoder_layers(model))


def _config_of(model: Any) -> Any:
    check_unwrapped(model)
    config = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or not hasattr(config, "get_text_config"):
        raise TypeError(
            f"expected a transformers model (a PreTrainedModel), got {type(model).__name__}. "
            "Unwrap a compiled, parallel or adapter model first."
        )
    return config


# Settings of models found by structure under which weights depend on the places of layers.
_BY_PLACE = (
    Refusal(
        "rescale_every",
        0,
        "the weights of later layers are halved, once the model is run, by their places: load it "
        "with rescale_every=0",
    ),
)


def _family_by_structure(model: Any) -> Family:
    """Make the record of a model whose family is not in the table."""
    found = find_layers(model)
    if isinstance(found, str):
        raise _unknown(model, found)
    owner, layers, norm = found
    return Family(
        dense_model_type(text_config_of(model.config)),
        owner=owner,
        layers=layers,
        final_norm=norm,
        per_layer_lists=(),
        mlp_output="",
        refusals=_BY_PLACE,
    )


def _inside(model: Any, family: Family) -> Family:
    """Return the record of a text family for a model that may hold its decoder deep inside."""
    path, _ = language_model_of(model)
    if not path:
        return family
    owner = ".".join(part for part in (path, family.owner) if part)
    return replace(family, owner=owner)


def _unknown(model: Any, found: str) -> UnknownFamilyError:
    name = dense_model_type(model.config)
    return UnknownFamilyError(
        f"the family {name!r} ({type(model).__name__}) is not in the table, and its layers could "
        f"not be found by structure: {found}. Add a record: "
        f"ghosted_fast.models.families.register_family(Family({name!r}, owner=<path of the module "
        'with the layers, from model.base_model>, layers="layers", final_norm="norm")). '
        f"Known families: {', '.join(_FAMILIES)}."
    )
