"""Command-line overrides and the list of commands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from feddra_ds.cli import main, parse_overrides
from feddra_ds.common.errors import ConfigError
from feddra_ds.config.load import known_keys


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


def test_a_path_that_cannot_be_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    where = str(tmp_path / "file" / "data")
    assert main(["data", "synth", "--num-pairs", "20", "--image-size", "16", "--out", where]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"feddra-ds: {tmp_path}/file")


def test_a_config_that_nobody_gave_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--data.batch_size", "x"]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("feddra-ds: --config: none was given")


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    command = f"{sys.executable} -m feddra_ds train --help | head -1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.startswith("usage")
    assert "Traceback" not in done.stderr
