"""Settings shared by all tests."""

from __future__ import annotations

import os

import pytest
import torch


def pytest_configure() -> None:
    # The workers share the cores, and tiny models run slower on two threads than on one. Tests of
    # threads set their number themselves.
    torch.set_num_threads(1)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device on this machine")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
