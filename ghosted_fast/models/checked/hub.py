"""Names of models: near ones where a name is not known, and whether the hub can be asked at all."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from ghosted_fast.errors import SourceError

_SECONDS = 5.0
_PREFIX = "models--"


def hub_options(name: str) -> dict[str, Any]:
    """Return the options with which a model of the hub is loaded, having asked once for the hub.

    Where the hub does not answer, a model that is in the cache is taken from there: else each of
    its files would be asked for again and again.

    Args:
        name: A hub id.

    Raises:
        SourceError: The hub cannot be asked, and the model is not in the cache; the message names
            models there whose names are like it.
    """
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE and _answers(constants.ENDPOINT):
        return {}
    if _is_cached(name):
        return {"local_files_only": True}
    why = (
        "HF_HUB_OFFLINE is set"
        if constants.HF_HUB_OFFLINE
        else f"{constants.ENDPOINT} does not answer"
    )
    raise SourceError(
        f"cannot load the model {name!r}: expected a model in the cache, since {why}, got none of "
        f"that name{near(name, cached_models())}; check the name and the network, or give a folder"
    )


def near(name: str, known: list[str]) -> str:
    """Return the end of a clause that names what is written nearly so, "" if nothing is."""
    by_word = {item.lower(): item for item in known}
    found = difflib.get_close_matches(name.lower(), list(by_word), n=3, cutoff=0.6)
    return f" (near it: {', '.join(by_word[item] for item in found)})" if found else ""


def near_paths(path: Path) -> str:
    """Return the same of what lies beside a path that does not exist."""
    try:
        beside = [item.name for item in path.parent.iterdir()]
    except OSError:
        return ""
    return near(path.name, beside)


def cached_models() -> list[str]:
    """Return the hub ids of the models in the cache of the hub."""
    from huggingface_hub import constants

    try:
        folders = sorted(Path(constants.HF_HUB_CACHE).glob(f"{_PREFIX}*"))
    except OSError:
        return []
    return [folder.name.removeprefix(_PREFIX).replace("--", "/") for folder in folders]


def _is_cached(name: str) -> bool:
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"{_PREFIX}{name.replace('/', '--')}" / "snapshots"
    return folder.is_dir() and any(folder.iterdir())


def _answers(endpoint: str) -> bool:
    """Return whether the hub answers, whatever it says, tried once."""
    from huggingface_hub import get_session

    try:
        get_session().head(endpoint, timeout=_SECONDS)
    except Exception:  # of whatever client it has
        return False
    return True
