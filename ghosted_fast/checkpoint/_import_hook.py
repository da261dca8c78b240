"""Makes the ghosted model types known to transformers when, and only when, it is imported."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_CONFIG_MODULE = "transformers.models.auto.configuration_auto"


def install_hook() -> None:
    """Have transformers know the ghosted configurations as soon as it knows its own.

    Call it any number of times, before or after transformers is imported.
    """
    module = sys.modules.get(_CONFIG_MODULE)
    if module is not None and hasattr(module, "AutoConfig"):
        if type(module.CONFIG_MAPPING).__module__ == _CONFIG_MODULE:
            _extend(module)
    elif not any(isinstance(finder, _ConfigFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _ConfigFinder())


def _extend(module: ModuleType) -> None:
    from ghosted_fast.checkpoint.transformers_types import extend_config_mapping

    extend_config_mapping(module)


class _ConfigFinder(MetaPathFinder):
    """Finds one module as everyone else does, and extends its table once it has run."""

    def find_spec(
        self, fullname: str, path: Any = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the module's own spec with its loader's `exec_module` extended."""
        if fullname != _CONFIG_MODULE:
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            run: Callable[[ModuleType], None] = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                _extend(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
