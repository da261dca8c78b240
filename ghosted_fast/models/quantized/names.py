r"""Names of modules in the settings of a quantization, for the layers that are kept.

A setting names modules that are left as they are, or that have settings of their own: by the whole
name, by a regular expression ("re:.*layers\.(0|4)\.mlp"; some formats write no prefix), or by the
class. A name is renumbered. An expression is kept if it means the same modules under their new
numbers, which only the names of the model's modules can say; else expressions that mean these and
no others take its place.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any

from torch import nn

# Names of modules beside the text decoder, whose layers stay.
_OF_OTHERS = re.compile(r"vision|visual|image|audio|tower")
# Between the names of modules there are dots, in regular expressions with a backslash.
_NUMBERED = re.compile(r"(?<![\w-])(layers|h|blocks|layer)(\\?\.)(\d+)(?![^.\\$])")
_PLAIN = re.compile(r"[\w.\-/]*")
_PREFIX = re.compile(r"(?:re:|[+-]:)?")


@dataclass(frozen=True)
class Renumbering:
    """What the names of a model's modules become when layers go.

    Attributes:
        kept: Indices of the kept layers, sorted.
        layers: Path of the list of layers in the model; empty if no modules are known.
        within: The names of modules and parameters in each kept layer, in their order.
        others: Those outside of the layers.
    """

    kept: list[int]
    layers: str = ""
    within: tuple[tuple[str, ...], ...] = ()
    others: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, model: nn.Module, layers: nn.ModuleList, kept: list[int], gone: bool
    ) -> Renumbering:
        """Return that of a model.

        Args:
            model: The model.
            layers: The list of its decoder layers.
            kept: Indices of the kept layers.
            gone: Whether the other layers have been taken out of the list already.
        """
        path = next(name for name, module in model.named_modules() if module is layers)
        there = range(len(kept)) if gone else kept
        return cls(
            kept=kept,
            layers=path,
            within=tuple(tuple(_names(layers[index])) for index in there),
            others=tuple(name for name in _names(model) if not name.startswith(f"{path}.")),
        )

    @cached_property
    def pairs(self) -> list[tuple[str, str]]:
        """The names before and after the cut, of all that is kept."""
        found = [(name, name) for name in self.others]
        for new, (old, names) in enumerate(zip(self.kept, self.within, strict=False)):
            before, after = (f"{self.layers}.{index}" for index in (old, new))
            found.append((before, after))
            found += [(f"{before}.{name}", f"{after}.{name}") for name in names]
        return found

    def apply(self, value: Any) -> Any:
        """Return what a setting is for the kept layers; objects that hold settings are changed."""
        if isinstance(value, Enum):  # one of transformers' is a string too
            return value
        if isinstance(value, str):
            renamed = self.rename(value)
            return renamed[0] if len(renamed) == 1 else value
        if isinstance(value, list | tuple | set):
            return type(value)(
                new
                for entry in value
                for new in (self.rename(entry) if isinstance(entry, str) else [self.apply(entry)])
            )
        if isinstance(value, dict):
            renumbered = {
                new: entry
                for key, entry in ((key, self.apply(entry)) for key, entry in value.items())
                for new in (self.rename(key) if isinstance(key, str) else [key])
            }
            return renumbered if type(value) is dict else type(value)(renumbered)
        if _holds_settings(value):
            held = vars(value)
            for name, entry in list(held.items()):
                held[name] = self.apply(entry)
        return value

    def rename(self, name: str) -> list[str]:
        """Return what stands for a name or an expression: nothing if it names removed layers."""
        if _OF_OTHERS.search(name):
            return [name]
        if _PLAIN.fullmatch(name):
            return [] if self._is_gone(name) else [self._numbered_anew(name)]
        wanted = [new for old, new in self.pairs if _matches(name, old)]
        literal = [] if self._is_gone(name) else [self._numbered_anew(name)]
        for same in ([name], literal):
            if same and [new for _, new in self.pairs if _matches(same[0], new)] == wanted:
                # Where no module is named, the number is all there is to go by.
                return same if wanted else literal
        return list(self._expressions(_PREFIX.match(name)[0], wanted))  # type: ignore[index]

    def _is_gone(self, name: str) -> bool:
        match = _NUMBERED.search(name)
        return match is not None and int(match[3]) not in self.kept

    def _numbered_anew(self, name: str) -> str:
        return _NUMBERED.sub(
            lambda match: f"{match[1]}{match[2]}{self.kept.index(int(match[3]))}", name
        )

    def _expressions(self, prefix: str, names: Sequence[str]) -> Iterator[str]:
        """Yield regular expressions that mean some modules and nothing else."""
        chosen = set(names)
        places: dict[str, list[str]] = {}
        for name in names:
            if name.rpartition(".")[0] in chosen and name not in self._modules:
                continue  # the weight of a module that is named itself
            number, _, rest = name.removeprefix(f"{self.layers}.").partition(".")
            if name.startswith(f"{self.layers}.") and number.isdigit():
                places.setdefault(rest, []).append(number)
            else:
                yield f"{prefix}{re.escape(name)}$"
        for rest, numbers in places.items():
            inside = f"\\.{re.escape(rest)}" if rest else ""
            yield f"{prefix}{re.escape(self.layers)}\\.({'|'.join(numbers)}){inside}$"

    @cached_property
    def _modules(self) -> set[str]:
        """New names that others begin with: those of modules that hold something."""
        return {new.rpartition(".")[0] for _, new in self.pairs}


def _names(module: nn.Module) -> Iterator[str]:
    """Yield the names of all modules and parameters in a module."""
    for name, _ in module.named_modules():
        if name:
            yield name
    for name, _ in module.named_parameters():
        yield name


def _matches(pattern: str, name: str) -> bool:
    """Return whether an expression means a module, or one that it is in."""
    body = _PREFIX.sub("", pattern, count=1)
    with suppress(re.error):
        return re.match(rf"(?:{body})(?:(?<=\.)|(?=\.|$))", name) is not None
    return fnmatch.fnmatchcase(name, body)


def _holds_settings(value: Any) -> bool:
    """Return whether a value is an object of settings: a data class or a model of pydantic."""
    if isinstance(value, type) or not hasattr(value, "__dict__"):
        return False
    return hasattr(type(value), "__dataclass_fields__") or hasattr(type(value), "model_fields")
