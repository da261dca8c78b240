"""The file that lets transformers load a ghosted folder where `ghosted_fast` is not installed."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from ghosted_fast.checkpoint._server import show_to_server
from ghosted_fast.models.first_token import first_attended
from ghosted_fast.models.runtime_classes import named_base_of

MODULE = "modeling_ghosted"
_SOURCE = Path(__file__).with_name(f"{MODULE}.py")
# What the file takes from the package, and is given when it is saved.
_INLINED = (show_to_server, first_attended)


def remote_code() -> str:
    """Return `modeling_ghosted.py` with what it takes from the package written into it."""
    source = _SOURCE.read_text(encoding="utf-8")
    for function in _INLINED:
        line = f"from {function.__module__} import {function.__name__}\n"
        assert line in source
        source = f"{source.replace(line, '')}\n\n{inspect.getsource(function)}"
    return source


def auto_map_of(model: Any) -> dict[str, str] | None:
    """Return which classes of the file transformers loads a ghosted model with.

    Args:
        model: A ghosted model.

    Returns:
        The configuration's `auto_map`; None where the dense classes are not transformers' own, so
        that the file could not find them.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    dense: Any = named_base_of(type(model.config))
    found = {
        "AutoConfig": dense,
        "AutoModel": MODEL_MAPPING.get(dense, None),
        "AutoModelForCausalLM": MODEL_FOR_CAUSAL_LM_MAPPING.get(dense, None),
    }
    classes = {auto: item for auto, item in found.items() if isinstance(item, type)}
    if not all(item.__module__.startswith("transformers.") for item in classes.values()):
        return None
    return {auto: f"{MODULE}.Ghosted{item.__name__}" for auto, item in classes.items()}
