"""Which classes of transformers load a model."""

from __future__ import annotations

from typing import Any

WITH_PICTURES = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM")
_NAMES = (
    "AutoModel",
    "AutoModelForCausalLM",
    *WITH_PICTURES,
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
)


def auto_classes(config_class: Any) -> dict[Any, Any]:
    """Return the model classes that transformers loads for a configuration.

    Args:
        config_class: A configuration class.

    Returns:
        The class by its auto class: the base model, the one for text, those for text with pictures
        or sound, those that judge a text or its tokens.
    """
    from transformers.models.auto import modeling_auto

    found = {}
    for name in _NAMES:
        auto = getattr(modeling_auto, name, None)
        model_class = auto._model_mapping.get(config_class, None) if auto is not None else None
        if isinstance(model_class, type):
            found[auto] = model_class
    return found
