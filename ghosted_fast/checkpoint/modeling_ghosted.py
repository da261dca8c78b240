"""A ghosted model in plain PyTorch, for machines without the package `ghosted_fast`.

`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` runs this file, which is
saved beside the weights. Decoder layers were removed from the model; a ghost in the kept layer
before each gap (or before the first kept layer) gives the state that the removed layers would have:

    y = x + f(x) @ weight.T + bias      f(x) = x or x / sqrt(mean(x^2) + norm_eps)

At the first attended token of a sequence, y is `first_state` where the ghost has one. The classes
`Ghosted<X>`, for any class X of transformers, are made when they are first asked for. Where the
package is installed, they are its faster ones.

Source: Yun et al., arXiv 2605.15491 (the ghost).
"""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from ghosted_fast.checkpoint._server import show_to_server
from ghosted_fast.models.built_whole import (
    described_whole,
    list_properties,
    of_each_layer,
    restore_values,
    take_layers_out,
    text_config_of,
)
from ghosted_fast.models.first_token import FirstTokens, mark_of, marked_at, parameters_of

FORMAT, FORMAT_WHOLE = 1, 2
_REQUIREMENT = "transformers>=5.19,<6"
_PREFIX, _TYPE_PREFIX = "Ghosted", "ghosted_"
_IS_FIRST = "ghost_is_first"


class Ghost(nn.Module):
    """The ghost; see the module's docstring.

    Args:
        hidden_size: Width d of the hidden state.
        entry: The ghost's record in the configuration.
    """

    def __init__(self, hidden_size: int, entry: dict[str, Any]) -> None:
        super().__init__()
        self.norm_eps: float | None = entry["norm_eps"]

        def vector(wanted: bool) -> nn.Parameter | None:
            return nn.Parameter(torch.zeros(hidden_size)) if wanted else None

        weight = torch.zeros(hidden_size, hidden_size)
        if entry["quantization"] is None:
            self.weight: Tensor = nn.Parameter(weight)
            self.register_buffer("scale", None)
        else:
            self.register_buffer("weight", weight.to(torch.int8))
            self.register_buffer("scale", torch.ones(hidden_size))
        self.scale: Tensor | None
        self.bias: Tensor | None
        self.first_state: Tensor | None
        self.register_parameter("bias", vector(entry["bias"]))
        self.register_parameter("first_state", vector(entry["first_state"]))

    def forward(self, x: Tensor, is_first: Tensor | None = None) -> Tensor:
        """Return y [..., d] for hidden states x [..., d] and the marks of first tokens [...]."""
        inputs = x.float()
        change = functional.linear(x, self.weight.to(x.dtype)).float()
        if self.scale is not None:
            change = change * self.scale
        if self.norm_eps is not None:
            change = change * torch.rsqrt(inputs.square().mean(-1, keepdim=True) + self.norm_eps)
        y = inputs + change
        if self.bias is not None:
            y = y + self.bias.float()
        y = y.to(x.dtype)
        if self.first_state is not None and is_first is not None:
            y = torch.where(is_first[..., None], self.first_state.to(x.dtype), y)
        return y

    def _apply(self, fn: Any, recurse: bool = True) -> Ghost:
        """Move or cast as any module, but keep the scale of an int8 weight in fp32."""
        scale = self.scale
        super()._apply(fn, recurse)
        if scale is not None and self.scale is not None and self.scale.dtype != torch.float32:
            self.scale = scale.to(self.scale.device)
        return self


class GhostedModel:
    """What a ghosted model class adds to the family's: ghosts, and loading that fails closed."""

    def __init__(self, config: Any, *inputs: Any, **kwargs: Any) -> None:
        _check_format(config)
        with described_whole(config) as kept:
            super().__init__(config, *inputs, **kwargs)  # type: ignore[call-arg]
        if kept is not None:
            take_layers_out(self, config, kept)
        _attach_ghosts(self)

    @classmethod
    def is_custom_code(cls) -> bool:
        """Say no: the modules are initialised as transformers' own."""
        return False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does; a ValueError if a weight is missing or has no place."""
        where = pretrained_model_name_or_path
        wants_info = kwargs.pop("output_loading_info", False)
        loaded: Any = super()
        model, info = loaded.from_pretrained(where, *args, output_loading_info=True, **kwargs)
        path = next(name for name, module in model.named_modules() if module is _layers(model)[1])
        stray = [key for key in info["unexpected_keys"] if f"{path}." in key or "ghost." in key]
        if info["missing_keys"] or stray or info["mismatched_keys"]:
            raise ValueError(
                f"the saved model in {str(where)!r} is incomplete or was edited: missing weights "
                f"{sorted(info['missing_keys'])[:4]}, weights without a place {sorted(stray)[:4]}, "
                f"weights of another shape {sorted(info['mismatched_keys'])[:4]}. Save it again."
            )
        return (model, info) if wants_info else model


def _attach_ghosts(model: Any) -> None:
    """Give a new model the (empty) ghosts that its configuration lists."""
    record = model.config.ghost or {"format": FORMAT, "ghosts": []}
    path, layers = _layers(model)
    width = text_config_of(model.config).hidden_size
    for entry in record["ghosts"]:
        _swap_class(layers[entry["layer"]], _ghosted_layer_class)
        attribute = "ghost" if entry["side"] == "output" else "input_ghost"
        setattr(layers[entry["layer"]], attribute, Ghost(width, entry))
    if not any(entry["first_state"] for entry in record["ghosts"]):
        return
    base = model.base_model
    owner = base.get_submodule(path.rpartition(".")[0])
    where, by_keyword = marked_at(base, owner)
    if by_keyword:
        for layer in layers:  # layers without a ghost drop the mark before their attention sees it
            _swap_class(layer, _ghosted_layer_class)
        _swap_class(owner, _first_token_decoder_class)
        return
    _swap_class(where, _first_token_base_class)
    vars(where)["first_tokens"] = FirstTokens()
    for entry in record["ghosts"]:
        vars(layers[entry["layer"]])["first_tokens"] = where.first_tokens


def _check_format(config: Any) -> None:
    record = config.ghost
    if record is not None and record["format"] > FORMAT_WHOLE:
        raise ValueError(
            f"the model was saved in format {record['format']}, and this file reads up to "
            f"{FORMAT_WHOLE}: copy the file anew from the folder that the model came from, or "
            "install ghosted_fast"
        )


def _layers(model: Any) -> tuple[str, nn.ModuleList]:
    """Return the decoder layers and their path from the base model.

    Where the record does not name it, it is the outermost list as long as they are many.
    """
    record = model.config.ghost or {}
    if "layers" in record:
        return record["layers"], model.base_model.get_submodule(record["layers"])
    return next(
        (name, module)
        for name, module in model.base_model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == model.config.num_hidden_layers
    )


def _swap_class(module: Any, make: Any) -> None:
    if not getattr(module, f"_{make.__name__}", False):
        module.__class__ = make(type(module))
        setattr(module, f"_{make.__name__}", True)


@functools.cache
def _ghosted_layer_class(base: Any) -> type:
    """Make the class of layers with a ghost after their output, before their input, or both."""

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        is_first = kwargs.pop(_IS_FIRST, None)
        left = getattr(self, "first_tokens", None)
        if left is not None:
            is_first = left.on(hidden_states.device)
        before, behind = getattr(self, "input_ghost", None), getattr(self, "ghost", None)
        if before is not None:
            hidden_states = before(hidden_states, is_first)
        output = base.forward(self, hidden_states, *args, **kwargs)
        if behind is None:
            return output
        if isinstance(output, tuple | list):
            return type(output)((behind(output[0], is_first), *output[1:]))
        return behind(output, is_first)

    return _renamed(base, functools.wraps(base.forward)(forward))


@functools.cache
def _first_token_base_class(base: Any) -> type:
    """Make the class of base models that leave the mark where ghosts find it."""
    names = parameters_of(base)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.first_tokens.mark = mark_of(names, args, kwargs)
        return base.forward(self, **kwargs)

    return _renamed(base, functools.wraps(base.forward)(forward))


@functools.cache
def _first_token_decoder_class(base: Any) -> type:
    """Make the class of decoders that mark the first attended tokens for their layers."""
    names = parameters_of(base)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        is_first = mark_of(names, args, kwargs)
        if is_first is not None:
            kwargs[_IS_FIRST] = is_first
        return base.forward(self, **kwargs)

    return _renamed(base, functools.wraps(base.forward)(forward))


def _renamed(base: Any, forward: Any) -> type:
    """Make a subclass that transformers, which goes by names, takes for the class itself."""
    named = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (base,), {**named, "forward": forward})


def __getattr__(name: str) -> Any:
    """Make `Ghosted<X>` of transformers' configuration or model class X.

    `Ghosted<X>__<C>` is that of a model class X that transformers uses with a configuration class C
    beside its own.
    """
    if not name.startswith(_PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _check_version()
    dense_name, _, config_name = name.removeprefix(_PREFIX).partition("__")
    base = _of_transformers(dense_name)
    try:
        package = importlib.import_module("ghosted_fast.checkpoint")
    except ImportError:
        is_config = issubclass(base, transformers.PreTrainedConfig)
        made = _config_class(name, base) if is_config else _model_class(name, base, config_name)
        globals()[name] = made
        return made
    return package.ghosted_class(base)


def _of_transformers(name: str) -> Any:
    found = getattr(transformers, name, None)
    if found is None:
        raise AttributeError(
            f"transformers {transformers.__version__} has no {name}, of which the ghosted model is "
            f"made: pip install --upgrade '{_REQUIREMENT}'"
        )
    return found


def _config_class(name: str, base: Any) -> type:
    """Make the configuration class of a ghosted family: the family's with the field `ghost`."""

    def __post_init__(self: Any, **kwargs: Any) -> None:
        base.__post_init__(self, **kwargs)
        restore_values(self)

    members = {
        "__module__": __name__,
        "__post_init__": __post_init__,
        "__annotations__": {"ghost": dict | None},
        "model_type": _TYPE_PREFIX + base.model_type,
        "ghost": None,
        **{n: of_each_layer(n, getattr(base, n)) for n in list_properties(base)},
    }
    made = type(name, (base,), members)
    globals()[name] = made
    _convert_weights_alike(base.model_type, _TYPE_PREFIX + base.model_type)
    language_models = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if base in language_models and language_models[base].config_class is base:
        show_to_server(getattr(sys.modules[__name__], _PREFIX + language_models[base].__name__))
    return made


def _model_class(name: str, base: Any, config_name: str) -> type:
    """Make the class of a family's models with ghosts."""
    config_name = config_name or base.config_class.__name__
    config_class = getattr(sys.modules[__name__], _PREFIX + config_name)
    members = {"__module__": __name__, "config_class": config_class}
    _convert_weights_alike(base.__name__, name)
    return type(name, (GhostedModel, base), members)


def _check_version() -> None:
    found = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if not (5, 19) <= found < (6,):
        raise ImportError(
            f"expected {_REQUIREMENT} for ghosted models, got {transformers.__version__}: "
            f"pip install '{_REQUIREMENT}'"
        )


def _convert_weights_alike(dense: str, ghosted: str) -> None:
    """Register how the weights in a file differ from those in memory (Mixtral's experts)."""
    from transformers import conversion_mapping  # absent from versions that are refused

    conversion = conversion_mapping.get_checkpoint_conversion_mapping(dense)
    if conversion is not None:
        conversion_mapping.register_checkpoint_conversion_mapping(
            ghosted, conversion, overwrite=True
        )
