"""A recipe as values of a verb's options, and the options of a fit as a recipe."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ghosted_fast.cli._shared.old_names import Verb

if TYPE_CHECKING:
    from torch import Tensor

_log = logging.getLogger(__name__)
# What belongs to a run, or to who starts it, and not to the model.
_OF_A_RUN = {
    *("output", "report", "profile", "overwrite", "state", "dry_run", "rank_timeout", "recipe"),
    *("as_json", "threads", "debug", "trust_remote_code", "help"),
}
# Of these one is given: one on the command line takes the place of any in a recipe.
_RIVALS = ("remove", "removed", "max_perplexity_increase", "min_speedup")
# What YAML has for no value.
_NOTHING = ("", "~", "null")


class RecipeVerb(Verb):
    """A verb of which one option in a recipe gives way to its rival on the command line."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take the command line apart."""
        rest = super().parse_args(ctx, args)
        given = [name for name in _RIVALS if _is_given(ctx, name)]
        for name in _RIVALS:
            if given and name not in given:
                ctx.params[name] = None
        return rest


def _is_given(ctx: Any, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def take_recipe(ctx: typer.Context, path: Path | None) -> Path | None:
    """Take the values of a recipe for the options that the command line does not give.

    Args:
        ctx: The command line that is being taken apart.
        path: The recipe; None for none.

    Raises:
        typer.BadParameter: It cannot be read, or names an option that there is not.
    """
    if path is None or ctx.resilient_parsing:
        return path
    from ghosted_fast.checkpoint.recipe import check_names, read_recipe
    from ghosted_fast.errors import SourceError

    options = [item for item in ctx.command.params if item.param_type_name == "option"]
    names = {item.opts[0].lstrip("-"): item.name for item in options}
    known = {name: key for name, key in names.items() if key not in _OF_A_RUN}
    try:
        recipe = read_recipe(path)["fit"]
        for name in recipe:
            if names.get(name) in _OF_A_RUN:
                raise SourceError(
                    f"expected --{name} on the command line alone, got it in the recipe "
                    f"{str(path)!r}: take it out there, and give it here"
                )
        check_names(recipe, known, f"the recipe {str(path)!r}")
        repeated = {item.name for item in options if item.multiple}
        values = {
            known[name]: _given(name, value, known[name] in repeated)
            for name, value in recipe.items()
        }
    except SourceError as error:
        raise typer.BadParameter(str(error)) from error
    ctx.default_map = {name: value for name, value in values.items() if value}
    return path


def _given(name: str, value: Any, repeated: bool) -> str | list[str]:
    """Return a value as the command line has it: a list with commas between, or repeated.

    What stands for no value is empty.

    Raises:
        SourceError: It is a dict, or holds one.
    """
    from ghosted_fast.errors import SourceError

    parts = value if isinstance(value, list) else [value]
    if not all(isinstance(part, str) for part in parts):
        raise SourceError(f"expected one value of {name!r} in the recipe, got {value!r}")
    text = ",".join(parts)
    if text in _NOTHING:
        return ""
    return parts if repeated else text


@dataclass(frozen=True)
class Recipe:
    """The recipe of a fit that is under way.

    Attributes:
        groups: The groups of options that it is made with, but for those of the run.
        path: The recipe that they were taken from, if they were.
    """

    groups: tuple[Any, ...]
    path: Path | None

    def check_text(self, text: Sequence[Tensor]) -> None:
        """Warn if a text, batches of token ids, is not that of the recipe it is to follow."""
        if self.path is None:
            return
        from ghosted_fast.checkpoint.recipe import read_recipe
        from ghosted_fast.text.fingerprints import token_digest

        made = read_recipe(self.path)["made"]
        known, found = made.get("text"), token_digest(text)
        if known is not None and known != found:
            _log.warning(
                "expected the text of the recipe %s (digest %s, %s tokens), got another (digest "
                "%s, %d tokens): the model will not be the recipe's",
                self.path,
                known,
                made.get("tokens", "some"),
                found,
                _num_tokens(text),
            )

    def written(self, text: Sequence[Tensor], facts: Mapping[str, Any]) -> dict[str, Any]:
        """Return what is to be kept with the model.

        In the place of a bound on speed, which depends on the machine and the hour, there stand the
        layers that were found.

        Args:
            text: Batches of token ids that were read.
            facts: What `GhostReport.to_dict()` returns.
        """
        from ghosted_fast.checkpoint.recipe import FORMAT
        from ghosted_fast.facts import layers_as_text
        from ghosted_fast.measure.system import machine_facts
        from ghosted_fast.text.fingerprints import token_digest

        removed = layers_as_text(facts["removed"])
        options = {
            item.name.replace("_", "-"): _written(getattr(group, item.name))
            for group in self.groups
            for item in fields(group)
            if item.name not in _OF_A_RUN and getattr(group, item.name) is not None
        }
        if "removed" in options or options.pop("min-speedup", None) is not None:
            options["removed"] = removed
        made = {"text": token_digest(text), "tokens": _num_tokens(text), "removed": removed}
        return {"recipe": FORMAT, "fit": options, "made": made | machine_facts()}


def _written(value: Any) -> Any:
    """Return an option as it is kept: one that can be repeated and was not, as its one value."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _num_tokens(text: Sequence[Tensor]) -> int:
    return sum(batch.numel() for batch in text)
