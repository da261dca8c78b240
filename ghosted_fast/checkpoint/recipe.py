"""The recipe of a model: the options that it was fitted with, and what else made it.

It is the file `recipe.yaml` of the model's folder. A ghosted model also carries it in its
configuration, so that it is there again wherever the model is saved or pushed. All values are read
as the texts that the command line has.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ghosted_fast._atomic_files import write_atomically
from ghosted_fast.errors import SourceError
from ghosted_fast.text.files import first_line

RECIPE = "recipe.yaml"
FORMAT = 1
_PARTS = ("recipe", "fit", "made")
_HEADER = """\
# How this model was fitted by ghosted_fast. To fit it again:
#     ghosted-fast fit --recipe recipe.yaml --output FOLDER
# Options that are given besides take the place of those in `fit`.
"""


def attach_recipe(config: Any, recipe: Mapping[str, Any]) -> bool:
    """Keep a recipe in the configuration of a ghosted model.

    Args:
        config: The configuration; one without a `ghost` record is left as it is.
        recipe: `recipe`, the format's number; `fit`, options by name; `made`, what made the model.

    Returns:
        Whether it was attached.
    """
    if getattr(config, "ghost", None) is None:
        return False
    config.ghost["recipe"] = dict(recipe)
    return True


def write_recipe(folder: Path, recipe: Mapping[str, Any]) -> None:
    """Write a recipe into a folder."""
    import yaml

    # A configuration that was read again has lost the order, so names are sorted.
    parts = [{part: recipe[part]} for part in _PARTS if part in recipe]
    text = "".join(yaml.safe_dump(part, allow_unicode=True) for part in parts)
    write_atomically(folder / RECIPE, _HEADER + text)


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a recipe.

    Args:
        path: The file, or a folder that holds it.

    Returns:
        `fit` and `made` as dicts of texts, or of lists of texts.

    Raises:
        SourceError: It cannot be read, is no recipe, or is one of a later version.
    """
    import yaml

    path = path / RECIPE if path.is_dir() else path
    try:
        # Every scalar stays a text: `on`, 1e-3 and 14-18 are what the command line has.
        read = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise _no_recipe(path, first_line(error)) from error
    if not isinstance(read, dict) or not isinstance(read.get("fit"), dict):
        raise _no_recipe(path, "no options under 'fit:'")
    check_names(read, _PARTS, f"the recipe {str(path)!r}")
    made = read.get("made") or {}
    if not isinstance(made, dict):
        raise _no_recipe(path, f"{made!r} as 'made'")
    if read.get("recipe", str(FORMAT)) != str(FORMAT):
        raise SourceError(
            f"expected a recipe of format {FORMAT} in {str(path)!r}, got {read['recipe']!r}: "
            "install a newer ghosted_fast (pip install --upgrade ghosted_fast)"
        )
    return {"fit": read["fit"], "made": made}


def check_names(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise for a name that is not known, and say which are near.

    Raises:
        SourceError: There is one.
    """
    names = list(known)
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=3) or sorted(names)
            raise SourceError(
                f"expected names that are known in {where}, got {name!r}: write "
                f"{' or '.join(near)}, or leave it out"
            )


def _no_recipe(path: Path, got: str) -> SourceError:
    return SourceError(
        f"expected a recipe in {str(path)!r}, got {got}: name the {RECIPE} of a folder that "
        "ghosted-fast fit has written"
    )
