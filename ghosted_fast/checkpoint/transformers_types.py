"""Ghosted models as transformers models of their own: `ghosted_llama`, `ghosted_qwen2`, ...

Each family gets a configuration class with one more field, `ghost`, and model classes that build
the ghosts it lists. Transformers finds the configurations by name once `_hook` has extended its
table; the models of a family are registered when a ghosted configuration of it is made.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from ghosted_fast import _env, distributed
from ghosted_fast._atomic_files import write_atomically
from ghosted_fast.checkpoint.alignment import align_weights
from ghosted_fast.checkpoint.digests import check_digests, write_digests
from ghosted_fast.checkpoint.model_card import own_card_kept, put_card_back, write_card
from ghosted_fast.checkpoint.recipe import write_recipe
from ghosted_fast.checkpoint.record import (
    FORMAT,
    FORMAT_WHOLE,
    check_record,
    is_ghosted,
    refresh_record,
)
from ghosted_fast.checkpoint.remote_code import MODULE, auto_map_of, remote_code
from ghosted_fast.errors import CheckpointError
from ghosted_fast.models.auto_classes import auto_classes
from ghosted_fast.models.built_whole import (
    described_whole,
    list_properties,
    of_each_layer,
    restore_values,
    take_layers_out,
    text_config_of,
)
from ghosted_fast.models.families import (
    GHOSTED_PREFIX,
    decoder_layers,
    decoder_of,
    hidden_size,
    layers_path,
)
from ghosted_fast.models.ghosted_layers import ghosts_of
from ghosted_fast.models.quantized.packing import packed_again
from ghosted_fast.models.runtime_classes import (
    Derived,
    bases_of,
    maker,
    named_base_of,
    subclass_for,
)
from ghosted_fast.models.structure import counts_of
from ghosted_fast.models.versions import check_transformers

_REGISTERED: set[type] = set()


def become_ghosted_class(
    model: Any,
    removed: list[int],
    num_hidden_layers: int,
    whole: dict[str, Any] | None = None,
) -> None:
    """Turn a model and its configuration into those of its ghosted family, in place.

    Args:
        model: A model whose configuration no other model shares.
        removed: Indices of the removed layers, in the dense model.
        num_hidden_layers: Number of layers of the dense model.
        whole: What the model is built whole of, if the cut configuration does not build it:
            `dense_config`, the values of the dense configuration that the cut one has no more;
            `per_layer`, what its properties say of the kept layers.
    """
    from ghosted_fast.models.ghosted_layers import swap_class

    config = model.config
    if not is_ghosted(config):
        config.__class__ = subclass_for("config", type(config))
        # One that was read from a file holds the family's name itself, before that of its class.
        vars(config).pop("model_type", None)
    config.ghost = {
        "format": FORMAT if whole is None else FORMAT_WHOLE,
        "removed": removed,
        "num_hidden_layers": num_hidden_layers,
        "family": config.model_type.removeprefix(GHOSTED_PREFIX),
        "layers": layers_path(model),
        "ghosts": [],
        **(whole or {}),
    }
    register_models(type(config))
    if not isinstance(model, GhostedModel):
        swap_class(model, "model")
        _record_outputs_of(model)


def _record_outputs_of(model: Any) -> None:
    """Let transformers find the outputs it can record: it looks them up by the class's name."""
    from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

    _CAN_RECORD_REGISTRY[model] = getattr(model, "_can_record_outputs", None)


class GhostedModel(Derived):
    """What a ghosted model class adds to the family's: ghosts, and loading that fails closed."""

    def __init__(self, config: Any, *inputs: Any, **kwargs: Any) -> None:
        with described_whole(config) as kept:
            super().__init__(config, *inputs, **kwargs)  # type: ignore[call-arg]
        if kept is not None:
            take_layers_out(self, config, kept)
        _build_ghosts(self)

    @classmethod
    def is_custom_code(cls) -> bool:
        """Return whether the dense class is: its modules are initialised as transformers' are."""
        dense: Any = named_base_of(cls)
        return bool(dense.is_custom_code())

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a saved model as transformers does, and refuse one that is damaged.

        Raises:
            CheckpointError: A weight is missing or has another shape, the file holds ghosts or
                layers that the configuration does not know, or it cannot be read. With
                `ignore_mismatched_sizes`, weights outside the layers may have any shape.
        """
        from safetensors import SafetensorError

        where = pretrained_model_name_or_path
        folder = Path(str(where)) / (kwargs.get("subfolder") or "")
        record = getattr(kwargs.get("config"), "ghost", None)
        if folder.is_dir() and record is not None:
            check_digests(folder, record, every=_env.verifies_all())
        wants_info = kwargs.pop("output_loading_info", False)
        any_size = kwargs.pop("ignore_mismatched_sizes", False)
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        try:
            model, info = super().from_pretrained(where, *args, **kwargs)  # type: ignore[misc]
        except SafetensorError as error:
            raise CheckpointError(
                f"the weights in {str(where)!r} cannot be read: expected a whole file, got "
                f"{error}; it is damaged or incomplete, copy or save it again"
            ) from error
        _check_loaded(model, info, where, any_size)
        return (model, info) if wants_info else model

    def save_pretrained(
        self, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> Any:
        """Save the model as transformers does, with the ghosts it has now.

        A model card is written beside it, unless there is one of somebody else's, and the file that
        loads the folder where this package is not installed. Weights are aligned in their files
        (`align_weights`). Weights of compressed-tensors that a forward pass unpacked are packed.
        """
        return packed_again(self)._save_as_it_is(save_directory, is_main_process, *args, **kwargs)

    def _save_as_it_is(
        self, save_directory: Any, is_main_process: bool, *args: Any, **kwargs: Any
    ) -> Any:
        refresh_record(self)
        save = functools.partial(super().save_pretrained, save_directory, is_main_process)  # type: ignore[misc]
        folder = Path(save_directory)
        if not (is_main_process and distributed.is_writer()) or folder.is_file():
            return save(*args, **kwargs)
        _write_companions(self, folder)
        # A folder to which an adapter alone is saved holds no weights of the model.
        self.config.ghost["digests"] = not getattr(self, "_hf_peft_config_loaded", False)  # type: ignore[attr-defined]
        with own_card_kept(folder):
            found = save(*args, **kwargs)
        align_weights(folder)
        if self.config.ghost.get("digests"):  # type: ignore[attr-defined]
            write_digests(folder)
        return found

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Do nothing: the class is in a package, and no file of it is saved beside the weights."""

    def _upload_modified_files(self, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        """Push as transformers does, with our model card in the place of its empty one."""
        folder = Path(working_dir)
        align_weights(folder)
        put_card_back(folder)
        _write_companions(self, folder)  # anew: what is older is not pushed
        if self.config.ghost.get("digests"):  # type: ignore[attr-defined]
            write_digests(folder)
        return super()._upload_modified_files(working_dir, *args, **kwargs)  # type: ignore[misc]


def _write_companions(model: Any, folder: Path) -> None:
    """Write the model card, the recipe and, where it can serve, the file of plain PyTorch."""
    if getattr(model, "_hf_peft_config_loaded", False):
        return  # only an adapter is saved
    folder.mkdir(parents=True, exist_ok=True)
    write_card(model.config, folder)
    if recipe := model.config.ghost.get("recipe"):
        write_recipe(folder, recipe)
    auto_map = auto_map_of(model)
    if auto_map is not None:
        model.config.auto_map = auto_map
        write_atomically(folder / f"{MODULE}.py", remote_code())


def _build_ghosts(model: Any) -> None:
    """Give a new model the (empty) ghosts that its configuration lists."""
    from ghosted_fast.models.ghost_linear import GhostLinear
    from ghosted_fast.models.ghosted_layers import attach_ghosts

    ghosts = []
    for entry in (model.config.ghost or {"ghosts": []})["ghosts"]:
        ghost = GhostLinear(
            hidden_size(model),
            bias=entry["bias"],
            norm_eps=entry["norm_eps"],
            first_state=entry["first_state"],
        )
        if entry["quantization"] is not None:
            ghost.quantize(entry["quantization"])
        ghosts.append((entry["layer"], entry["side"], ghost))
    attach_ghosts(model.base_model, decoder_of(model), decoder_layers(model), ghosts)


def _check_loaded(model: Any, info: dict[str, Any], where: Any, any_size: bool) -> None:
    """Raise unless every weight was found, and every ghost and layer in the file has a place."""
    layers = decoder_layers(model)
    path = next(name for name, module in model.named_modules() if module is layers)

    def of_a_layer(key: str) -> bool:
        return f"{path}." in key or "ghost." in key

    missing = sorted(info["missing_keys"])
    stray = sorted(key for key in info["unexpected_keys"] if of_a_layer(key))
    resized = sorted(key for key, *_ in info["mismatched_keys"] if not any_size or of_a_layer(key))
    if missing or stray or resized:
        raise CheckpointError(
            f"the saved model in {str(where)!r} is incomplete or was edited: expected every weight "
            f"once, got missing weights {_shorten(missing)}, weights without a place "
            f"{_shorten(stray)}, weights of another shape {_shorten(resized)}. Save the ghosted "
            "model again."
        )
    for index, side, ghost in ghosts_of(layers):
        ghost.check_values(f"the ghost at the {side} of layer {index} in {str(where)!r}")


def _shorten(names: list[str]) -> str:
    shown = ", ".join(names[:4]) or "none"
    return shown if len(names) <= 4 else f"{shown}, ... ({len(names)})"


@maker("config")
def _ghosted_config_class(base: Any) -> type:
    """Make the configuration class of a ghosted family: the family's with the field `ghost`."""
    check_transformers()

    def __post_init__(self: Any, **kwargs: Any) -> None:
        base.__post_init__(self, **kwargs)
        check_record(self.ghost, base.model_type, *counts_of(text_config_of(self)).values())
        restore_values(self)
        register_models(type(self))

    return type(
        f"Ghosted{base.__name__}",
        bases_of(base),
        {
            "__module__": __name__,
            "__doc__": f"The configuration of a ghosted {base.__name__.removesuffix('Config')}.",
            "__annotations__": {"ghost": dict | None},
            "__post_init__": __post_init__,
            "register_for_auto_class": classmethod(lambda cls, auto_class="AutoConfig": None),
            "model_type": GHOSTED_PREFIX + base.model_type,
            "ghost": None,
            **{name: of_each_layer(name, getattr(base, name)) for name in list_properties(base)},
        },
    )


@maker("model")
def _ghosted_model_class(base: Any) -> type:
    """Make the class of a family's models with ghosts."""
    return type(
        f"Ghosted{base.__name__}",
        (GhostedModel, base),
        {
            "__module__": __name__,
            "__doc__": f"A {base.__name__} with ghosts in place of removed layers.",
            "config_class": subclass_for("config", base.config_class),
        },
    )


def register_models(config_class: type) -> None:
    """Register the models of a ghosted family with transformers.

    Args:
        config_class: The ghosted configuration class.
    """
    from transformers import conversion_mapping

    from ghosted_fast.checkpoint._server import show_to_server

    if config_class in _REGISTERED:
        return
    _REGISTERED.add(config_class)
    base: Any = named_base_of(config_class)
    names = {GHOSTED_PREFIX + base.model_type: base.model_type}
    for auto, dense in auto_classes(base).items():
        ghosted = subclass_for("model", dense)
        # Not by the class's own `register`: some families share a class, which names another one's
        # configuration.
        auto._model_mapping.register(config_class, ghosted, exist_ok=True)
        show_to_server(ghosted)
        names[ghosted.__name__] = dense.__name__
    for ghosted_name, dense_name in names.items():
        # How the weights in a file differ from those in memory, as in Mixtral's merged experts.
        conversion = conversion_mapping.get_checkpoint_conversion_mapping(dense_name)
        if conversion is not None:
            conversion_mapping.register_checkpoint_conversion_mapping(
                ghosted_name, conversion, overwrite=True
            )


def extend_config_mapping(module: Any) -> None:
    """Let transformers' table of configurations make the ghosted ones when they are asked for.

    They cannot be registered beforehand: the configurations of the families cannot be imported
    while transformers imports its table.

    Args:
        module: `transformers.models.auto.configuration_auto`.
    """
    mapping_class: Any = type(module.CONFIG_MAPPING)

    class ConfigMapping(mapping_class):
        def __contains__(self, key: object) -> bool:
            if super().__contains__(key):
                return True
            return isinstance(key, str) and super().__contains__(_dense_name(key))

        def __getitem__(self, key: str) -> Any:
            if super().__contains__(key) or key not in self:
                return super().__getitem__(key)
            config_class: Any = subclass_for("config", super().__getitem__(_dense_name(key)))
            module.AutoConfig.register(key, config_class, exist_ok=True)
            return config_class

    module.CONFIG_MAPPING.__class__ = ConfigMapping


def _dense_name(model_type: str) -> str | None:
    """Return the dense family of a ghosted model type, None for any other type."""
    dense = model_type.removeprefix(GHOSTED_PREFIX)
    return None if dense == model_type else dense
