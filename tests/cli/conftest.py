"""A tiny model folder with a tokenizer, and texts: what the verbs work on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.tiny_text import TEXT, save_tiny_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": TEXT, "id": i}) + "\n" for i in range(120)))
    return path
