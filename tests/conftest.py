"""The longest files first: xdist hands out files in this order, and none of these should be the last to end."""

from __future__ import annotations

import pytest

LONGEST = ("test_quickstart.py", "test_cxr.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)
