"""Config keys on the command line."""

from __future__ import annotations

import pytest

from feddra_ds.common.errors import ConfigError
from feddra_ds.config.overrides import parse_overrides


def test_overrides_are_yaml_values_and_the_last_wins() -> None:
    assert parse_overrides(["--a.b", "1", "--a.c=[x, y]", "--d.e.f", "null", "--a.b=1e-3", "--g", "-2", "--h=a=b"]) == {
        "a": {"b": 1e-3, "c": ["x", "y"]},
        "d": {"e": {"f": None}},
        "g": -2,
        "h": "a=b",
    }


def test_bad_overrides_are_all_named() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_overrides(["stray", "--a.c", "--a.d", "1", "--a.b"])
    assert [line.split(":")[0] for line in caught.value.problems] == ["stray", "a.c", "a.b"]
    assert "has no value; write --a.c VALUE" in caught.value.problems[1]
