"""`feddra-ds completion`: a script with which a shell completes commands, options, config keys and files."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from feddra_ds.config.load import known_keys
from feddra_ds.config.reference import kind_of

EXAMPLES = (
    "feddra-ds completion bash > ~/.local/share/bash-completion/completions/feddra-ds",
    "feddra-ds completion zsh > ~/.zfunc/_feddra-ds   # with fpath+=~/.zfunc before compinit in ~/.zshrc",
)
_FOLDERS = ("DIR", "RUN", "RUN_OR_MODEL", "MODEL2", "ROOT")
_FILES = ("FILE", "SPEC", "SPEC|ROWS", "PATH")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `completion`."""
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="whose script to print")


def run(args: argparse.Namespace) -> int:
    """Print the script. Raises ValueError where shtab, which writes it, is missing."""
    try:
        import shtab
    except ImportError as error:
        raise ValueError("completion: needs shtab: pip install 'feddra-ds[completion]'") from error
    whole = args.parser_of_all()
    for parser in _commands(whole):
        if parser.get_default("takes_config_keys"):
            _add_config_keys(parser)
        for action in parser._actions:
            if action.metavar in _FOLDERS:
                action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
            elif action.metavar in _FILES:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(whole, args.shell))
    return 0


def _commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parser, and all those of its commands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from _commands(below)


def _add_config_keys(parser: argparse.ArgumentParser) -> None:
    for key, info in known_keys().items():
        parser.add_argument(f"--{key}", metavar="VALUE", choices=_choices(info.annotation), help=kind_of(info))


def _choices(annotation: Any) -> list[str] | None:
    """The values of a key that has few; None for others."""
    if annotation is bool:
        return ["true", "false"]
    return [str(value) for value in get_args(annotation)] if get_origin(annotation) is Literal else None
