"""Subclasses made at run time, of layers, models and configurations, whose instances still pickle.

A class made at run time cannot be found by name, so an instance pickles (and deep-copies) as its
first named base class with the list of steps that lead from it to the instance's own class.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

_MAKERS: dict[str, Callable[[type], type]] = {}
_MADE: dict[tuple[str, type], type] = {}


class Derived:
    """The part of a derived class that pickles it; first base of every derived class."""

    _derived_step = ""
    _derived_from: type = object

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Reduce to the named base class, the steps and the state."""
        reduced: Any = super().__reduce_ex__(max(2, int(protocol)))
        steps: list[str] = []
        base: type = type(self)
        while "_derived_step" in vars(base):
            step: str = vars(base)["_derived_step"]
            steps.insert(0, f"{_MAKERS[step].__module__}:{step}")
            base = vars(base)["_derived_from"]
        return (new_instance, (base, tuple(steps)), *reduced[2:])


def maker(step: str) -> Callable[[Callable[[type], type]], Callable[[type], type]]:
    """Register the decorated function as the maker of one kind of derived class.

    The function takes the base class and returns a new subclass of `Derived` and the base.
    """

    def register(make: Callable[[type], type]) -> Callable[[type], type]:
        _MAKERS[step] = make
        return make

    return register


def subclass_for(step: str, base: type) -> type:
    """Return the class that a step makes of a base: the same class each time.

    Args:
        step: Name of a registered maker.
        base: The base class. If it was made by the same step, it is returned as it is.
    """
    if base.__dict__.get("_derived_step") == step:
        return base
    if (step, base) not in _MADE:
        derived: Any = _MAKERS[step](base)
        derived._derived_step = step
        derived._derived_from = base
        _MADE[step, base] = derived
    return _MADE[step, base]


def bases_of(base: type) -> tuple[type, ...]:
    """Return the bases of a class derived from `base`."""
    return (base,) if issubclass(base, Derived) else (Derived, base)


def named_base_of(cls: type) -> type:
    """Return the named class that a derived class was made of."""
    while "_derived_step" in vars(cls):
        cls = vars(cls)["_derived_from"]
    return cls


def new_instance(base: type, steps: tuple[str, ...]) -> Any:
    """Return a new instance of the class that some steps make of a base, for pickle.

    Args:
        base: A named class.
        steps: The steps, each behind the module whose import registers its maker and a colon: a
            new process unpickles before it has imported them.
    """
    cls: Any = base
    for entry in steps:
        module, _, step = entry.partition(":")
        import_module(module)
        cls = subclass_for(step, cls)
    return cls.__new__(cls)
