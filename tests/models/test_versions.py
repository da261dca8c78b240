"""Versions of transformers other than those in pyproject.toml are refused, with the remedy."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import ghosted_fast.checkpoint.modeling_ghosted as saved_file
from ghosted_fast.checkpoint import transformers_types
from ghosted_fast.errors import VersionError
from ghosted_fast.models import families, versions
from ghosted_fast.testing import tiny_model

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def test_range_is_that_of_the_package() -> None:
    (stated,) = re.findall(r'^    "(transformers>.*)",$', PYPROJECT.read_text(), re.MULTILINE)
    assert stated == versions.REQUIREMENT == saved_file._REQUIREMENT


def install(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    # Transformers replaces itself in sys.modules while it is imported: there may be two.
    for module in (sys.modules["transformers"], saved_file.transformers):
        monkeypatch.setattr(module, "__version__", version)


@pytest.mark.parametrize("found", ["4.57.3", "5.18.1", "6.0.0.dev0"])
def test_other_versions_are_refused(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    model = tiny_model("llama", 2)
    install(monkeypatch, found)
    remedy = f"got {found}: pip install 'transformers>=5.19,<6'"
    with pytest.raises(VersionError, match=re.escape(remedy)):
        families.find_family(model)  # before any work
    with pytest.raises(VersionError, match=re.escape(remedy)):
        transformers_types._ghosted_config_class(type(model.config))  # when a folder is loaded
    with pytest.raises(ImportError, match=re.escape(remedy)):
        saved_file.GhostedLlamaConfig  # noqa: B018


@pytest.mark.parametrize("found", ["5.19.0", "5.24.0.dev0"])
def test_versions_in_the_range_are_taken(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    install(monkeypatch, found)
    versions.check_transformers()
    saved_file._check_version()


def test_family_that_transformers_does_not_have() -> None:
    with pytest.raises(AttributeError, match=r"has no NewConfig.*pip install --upgrade"):
        saved_file.GhostedNewConfig  # noqa: B018
