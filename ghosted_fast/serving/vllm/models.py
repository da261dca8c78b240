"""Ghosted models made of vLLM's own classes, when vLLM asks for them by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ghosted_fast.errors import UnsupportedModelError
from ghosted_fast.serving.vllm import NATIVE, THROUGH_TRANSFORMERS, WHOLE
from ghosted_fast.serving.vllm.configuration import check_native, check_version, check_windows

_MADE: dict[str, type] = {}


def __getattr__(name: str) -> type:
    architecture = name.removeprefix("Ghosted")
    make = next((make for names, make in _MAKERS if architecture in names), None)
    if name == architecture or make is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name not in _MADE:
        _MADE[name] = make(name)
    return _MADE[name]


def _native_class(name: str) -> type:
    from vllm import ModelRegistry
    from vllm.model_executor.models.utils import PPMissingLayer

    from ghosted_fast.serving.vllm.ghost import attach_ghost, make_ghost

    architecture = name.removeprefix("Ghosted")
    base: Any = ModelRegistry.models[architecture].load_model_cls()

    def __init__(self: Any, *, vllm_config: Any, prefix: str = "", **kwargs: Any) -> None:
        check_version()
        config = vllm_config.model_config.hf_config
        check_native(name, config)
        base.__init__(self, vllm_config=vllm_config, prefix=prefix, **kwargs)
        text = vllm_config.model_config.hf_text_config
        path, layers = decoder_layers(self, text.num_hidden_layers)
        check_windows(name, layers, text)
        for record in (config.ghost or {"ghosts": []})["ghosts"]:
            layer = layers[record["layer"]]
            if not isinstance(layer, PPMissingLayer):
                where = f"{path}.{record['layer']}"
                ghost = make_ghost(text.hidden_size, record, where)
                attach_ghost(layer, record["side"], ghost, architecture in WHOLE)

    def load_weights(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return base.load_weights(self, *args, **kwargs)
        except (KeyError, ValueError) as error:
            raise UnsupportedModelError(
                f"{name} cannot be served by vLLM, whose class builds other layers than those that "
                f"are left ({type(error).__name__}: {error}). Serve it with transformers."
            ) from error

    return type(
        name,
        (base,),
        {
            "__init__": __init__,
            "load_weights": load_weights,
            "__module__": __name__,
            "__doc__": f"vLLM's {architecture} with ghosts in place of removed layers.",
        },
    )


def decoder_layers(model: Any, count: int) -> tuple[str, nn.ModuleList]:
    """Return the decoder layers of a vLLM model, behind their path.

    Args:
        model: The model.
        count: How many they are.

    Raises:
        UnsupportedModelError: There is no such list.
    """
    inner = model.get_language_model() if hasattr(model, "get_language_model") else model
    for path, module in inner.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return path, module
    raise UnsupportedModelError(
        f"expected {type(model).__name__} to hold a list of its {count} decoder layers, found "
        "none: this version of vLLM builds the model otherwise. Serve it with transformers."
    )


def _transformers_class(name: str) -> type:
    """Return the class that runs transformers' modules, ghosts and all."""
    from vllm.model_executor.models.transformers import TransformersForCausalLM

    base: Any = TransformersForCausalLM

    def __init__(self: Any, *, vllm_config: Any, prefix: str = "") -> None:
        check_version()
        base.__init__(self, vllm_config=vllm_config, prefix=prefix)
        # vLLM marks a decoder when it is constructed. That of a model with first-token states gets
        # its class later, and is run as it is.
        vars(self.model).setdefault("do_not_compile", True)

    return type(name, (base,), {"__init__": __init__, "__module__": __name__})


_MAKERS: tuple[tuple[Any, Callable[[str], type]], ...] = (
    (NATIVE, _native_class),
    (THROUGH_TRANSFORMERS, _transformers_class),
)
