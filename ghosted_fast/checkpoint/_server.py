"""Ghosted classes where `transformers serve` looks for them."""

from __future__ import annotations

import sys


def show_to_server(model_class: type) -> None:
    """Put a class where `transformers serve` looks for it: on transformers, by its name.

    Transformers replaces itself in `sys.modules` while its parts are imported, so that the server
    may hold another module object than is found there.
    """
    server = [
        vars(module)
        for name, module in list(sys.modules.items())
        if name.startswith("transformers.cli.serving.")
    ]
    found = [sys.modules["transformers"], *(names.get("transformers") for names in server)]
    for module in filter(None, found):
        setattr(module, model_class.__name__, model_class)
