"""Ghosted models on disk: what is written beside the weights, and how transformers reads it.

`ghosted_class` is the one name that saved folders call: it stays where it is, whatever moves.
"""

from __future__ import annotations


def ghosted_class(base: type) -> type:
    """Return the ghosted class of one of transformers' configuration or model classes.

    The file that is saved beside the weights calls it where this package is installed.

    Args:
        base: A configuration class, or a model class of a family that transformers has.

    Raises:
        ImportError: The installed transformers is not one that this package works with.
    """
    from transformers import PreTrainedConfig

    from ghosted_fast.checkpoint import transformers_types as transformers_types  # the makers
    from ghosted_fast.models.runtime_classes import subclass_for

    return subclass_for("config" if issubclass(base, PreTrainedConfig) else "model", base)
