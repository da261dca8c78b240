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
        if auto is None:
            continue
        model_class = auto._model_mapping.get(config_class, None)
        model_class = model_class or _by_another_name(auto._model_mapping, config_class)
        if isinstance(model_class, type):
            found[auto] = model_class
    return found


def _by_another_name(mapping: Any, config_class: Any) -> Any:
    """Return the class of a configuration that transformers lists for that of a larger model alone.

    A model of text made from the configuration of one that reads pictures has that of its text
    part, which no auto class may know.
    """
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    for model_type, name in mapping._model_mapping.items():
        module = f"transformers.models.{model_type_to_module_name(model_type)}."
        if isinstance(name, str) and config_class.__module__.startswith(module):
            model_class = mapping._load_attr_from_module(model_type, name)
            if getattr(model_class, "config_class", None) is config_class:
                return model_class
    return None
