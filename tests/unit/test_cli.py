"""The table of commands, and errors as lines and exit codes."""

from __future__ import annotations

import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

from feddra_ds import cli
from feddra_ds.cli import COMMANDS, GROUPS, build_parser, main
from feddra_ds.common.errors import DataError
from feddra_ds.config.load import known_keys


def code_of(words: list[str]) -> int:
    """The exit code of a command line, whether main returns it or argparse leaves with it."""
    try:
        return main(words)
    except SystemExit as stopped:
        return int(stopped.code or 0)


def test_train_help_explains_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(["train", "--help"]) == 0
    text = capsys.readouterr().out
    for key in known_keys():
        assert f"--{key} " in text


@pytest.mark.parametrize("command", [*GROUPS, *COMMANDS])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of([*command.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: feddra-ds {command} ")
    for name in COMMANDS:
        assert not name.startswith(f"{command} ") or name.split()[1] in text


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_are_commands_and_options_say_what_they_take(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = import_module(COMMANDS[command][0])
    ran = []
    monkeypatch.setattr(module, "run", lambda args: ran.append(args) or 0)
    assert module.EXAMPLES
    for example in module.EXAMPLES:
        words = shlex.split(example.replace(">", "#").replace(" | ", " # "), comments=True)
        assert words[0] == "feddra-ds"
        assert words[1:][: len(command.split())] == command.split()
        assert main(words[1:]) == 0, example
    assert len(ran) == len(module.EXAMPLES)
    assert code_of([*command.split(), "--help"]) == 0
    if command != "train":  # whose help is its own run's
        assert all(f"  {example}\n" in capsys.readouterr().out for example in module.EXAMPLES[:1])
    parser = build_parser(command.split())[1]
    assert parser is not None
    for action in parser._actions:
        assert action.help, action.option_strings
        takes = action.nargs != 0
        assert not takes or action.metavar or action.choices, f"{action.option_strings} does not say what it takes"


def test_train_takes_its_config_as_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["quickstart"], ["--data.batch_size", "7", "quickstart"], ["quickstart", "--data.batch_size=7"]):
        assert main(["train", *words, "--print_config"]) == 0
        out = capsys.readouterr().out
        assert "output_dir: quickstart/run" in out
        assert (" batch_size: 7\n" in out) == (len(words) > 1)
    assert main(["train", "--print_config", "quickstart"]) == 0
    capsys.readouterr()
    assert main(["train", "quickstart", "--config", "my.yaml"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "feddra-ds: --config: my.yaml is given beside quickstart; a training has one config"


def test_completion_in_bash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """bash itself completes commands, options, choices and config keys with the script."""
    assert main(["completion", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    asked = {
        "feddra-ds eval": ["evaluate"],
        "feddra-ds data conv": ["convert"],
        "feddra-ds probe --features e": ["embedding"],
        "feddra-ds train --data.batch_s": ["--data.batch_size"],
        "feddra-ds train --optimizer.name a": ["adamw"],
    }
    code = "source ./script; complete=$(complete -p feddra-ds | sed 's/.*-F \\([^ ]*\\).*/\\1/')\n"
    for line in asked:
        *_, before, word = line.split()
        code += f"COMP_WORDS=({line}); COMP_CWORD={len(line.split()) - 1}; COMPREPLY=()\n"
        code += f"$complete feddra-ds {word} {before}; echo ${{COMPREPLY[*]}}\n"
    done = subprocess.run(["bash", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert [line.split() for line in done.stdout.splitlines()] == list(asked.values()), done.stderr
    assert main(["completion", "zsh"]) == 0
    assert capsys.readouterr().out.startswith("#compdef feddra-ds")


def test_completion_says_what_it_needs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert capsys.readouterr().err == "feddra-ds: completion: needs shtab: pip install 'feddra-ds[completion]'\n"


def test_only_the_command_that_is_asked_for_is_imported() -> None:
    code = (
        "import sys; from feddra_ds.cli import COMMANDS, main; main(['config', 'list']); "
        "print(sorted(m for m, _ in COMMANDS.values() if m in sys.modules), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "['feddra_ds.commands.config_list'] False"


def test_the_launchers_local_rank_is_dropped(capsys: pytest.CaptureFixture[str]) -> None:
    for place in range(4):  # `deepspeed --module` puts it before the command, `deepspeed launch/train.py` behind it
        words = ["train", "--config=quickstart", "--print_config"]
        words.insert(place, "--local_rank=1")
        assert main(words) == 0
        assert "output_dir: quickstart/run" in capsys.readouterr().out


class Broken(RuntimeError):
    problems = ("a.csv: has no column", "b.csv: is empty")


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (DataError(["hospital-a: no shards", "hospital-b: no shards"]), 2, ["hospital-a: no shards", "hospital-b: no shards"]),
        (Broken(), 2, ["a.csv: has no column", "b.csv: is empty"]),
        (ValueError("--seed: must be at least 0"), 2, ["--seed: must be at least 0"]),
        (PermissionError(13, "Permission denied", "/x"), 2, ["/x: Permission denied"]),
        (KeyboardInterrupt(), 130, []),
    ],
)  # fmt: skip
def test_errors_become_lines_and_exit_codes(
    error: BaseException,
    code: int,
    lines: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(args: object) -> int:
        raise error

    monkeypatch.setattr(
        cli, "import_module", lambda _: SimpleNamespace(run=fail, add_arguments=lambda parser: None, EXAMPLES=())
    )
    assert main(["status"]) == code
    assert capsys.readouterr().err.splitlines() == [f"feddra-ds: {line}" for line in lines]


@pytest.mark.parametrize("error", [RuntimeError("a mistake of ours"), OSError("no file's")])
def test_errors_that_no_user_can_mend_keep_their_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(args: object) -> int:
        raise error

    monkeypatch.setattr(
        cli, "import_module", lambda _: SimpleNamespace(run=fail, add_arguments=lambda parser: None, EXAMPLES=())
    )
    with pytest.raises(type(error)):
        main(["status"])


def test_an_unknown_option_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["config", "list", "--colour", "red"])
    assert stopped.value.code == 2
    assert "unrecognized arguments: --colour red" in capsys.readouterr().err


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
