"""Command-line overrides and the list of commands."""

from __future__ import annotations

import pytest

from feddra_ds.cli import main, parse_overrides
from feddra_ds.config import ConfigError, known_keys


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


def test_train_help_explains_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for key in known_keys():
        assert f"--{key} " in text


COMMANDS = ["data", "evaluate", "probe", "export", "report", "status", "doctor"]
COMMANDS += [f"data {name}" for name in ("synth", "convert", "partition", "inspect")]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*command.split(), "--help"])
    assert stopped.value.code == 0
    assert "usage" in capsys.readouterr().out
