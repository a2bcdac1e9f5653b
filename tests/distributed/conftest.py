"""Fixtures of the distributed tier: one small dataset for the whole session."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import write_dataset


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clients (north, south, west) of small images with short reports."""
    return write_dataset(tmp_path_factory.mktemp("data") / "three")
