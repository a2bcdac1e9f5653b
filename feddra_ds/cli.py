"""The `feddra-ds` command: one parser, each command's work in its own module."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import yaml

from feddra_ds import __version__
from feddra_ds.common.errors import ConfigError
from feddra_ds.common.tree import set_path
from feddra_ds.config.load import dump, known_keys, load

# command: (module with add_arguments and run, what it does). Imported only when the command is asked for.
COMMANDS = {
    "evaluate": ("evaluate", "measure retrieval and zero-shot classification of a run or an exported model"),
    "probe": ("probe", "train a linear classifier on a model's frozen image features"),
    "export": ("export", "write the model of a run or of one of its checkpoints as a folder of its own"),
    "report": ("report", "write a run's report.html, one self-contained page"),
    "status": ("status", "show where a run in the background stands"),
    "doctor": ("doctor", "check this machine, and with --config whether a run can start on it"),
}
TAKE_CONFIG_KEYS = ("train", "doctor")  # whatever else is on their command line is --section.key value


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="feddra-ds", description="Federated distributionally robust vision-language pre-training."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_train(
        commands.add_parser("train", help="train from a config", formatter_class=argparse.RawDescriptionHelpFormatter)
    )
    data = commands.add_parser("data", help="make, convert, split and look at shards")
    if "data" in (argv if argv is not None else sys.argv[1:])[:1]:
        add_data(data)  # imports what it lists
    for name, (module_name, about) in COMMANDS.items():
        command = commands.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".")
        if name in (argv if argv is not None else sys.argv[1:])[:1]:
            module = import_module(f"feddra_ds.commands.{module_name}")
            module.add_arguments(command)
            if command.get_default("run") is None:
                command.set_defaults(run=module.run)
    args, rest = parser.parse_known_args(argv)
    args.rest = rest
    if rest and args.command not in TAKE_CONFIG_KEYS:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        args.overrides = parse_overrides(rest)
        return int(args.run(args, rest) if args.command == "train" else args.run(args))
    except ValueError as error:  # ConfigError and DataError have a line per problem
        for problem in getattr(error, "problems", [error]):
            print(f"feddra-ds: {problem}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `… | head` has read enough; nothing more can be written, at the interpreter's end neither
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.filename is None:
            raise
        print(f"feddra-ds: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def add_train(parser: argparse.ArgumentParser) -> None:
    """Arguments of `train`; every config key is an option, listed by --help."""
    parser.add_argument(
        "--config", metavar="FILE", help="YAML config (configs/ has examples); keys given as options come on top"
    )
    parser.add_argument("--print_config", action="store_true", help="print the resolved config and exit")
    parser.epilog = "config keys, given as --section.key value (YAML values), with their defaults:\n" + "\n".join(
        f"  --{key}  (default: {_default(info)})\n        {info.description or ''}"
        for key, info in known_keys().items()
    )
    parser.set_defaults(run=run_train)


def run_train(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from feddra_ds.run.train import run

    overrides = parse_overrides(rest)
    if args.print_config:
        print(dump(load(args.config, overrides)), end="")
        return 0
    return run(args.config, overrides)


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """`--a.b value` and `--a.b=value` as a nested dict, values read as YAML; the last of a key wins. Raises ConfigError."""
    tree: dict[str, Any] = {}
    problems, items = [], list(arguments)
    while items:
        item = items.pop(0)
        key, equals, value = item.partition("=")
        if not key.startswith("--") or len(key) < 3:
            problems.append(f"{item}: is not an option; write --section.key value")
            continue
        if not equals:
            if not items or items[0].startswith("--"):
                problems.append(f"{key[2:]}: has no value; write {key} VALUE")
                continue
            value = items.pop(0)
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError:
            parsed = value
        if isinstance(parsed, str) and _is_float(parsed):
            parsed = float(parsed)  # YAML 1.1 reads 1e-3 as text
        set_path(tree, key[2:], parsed)
    if problems:
        raise ConfigError(problems)
    return tree


def add_data(parser: argparse.ArgumentParser) -> None:
    """Subcommands of `data`, each with its own module."""
    commands = parser.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    for name, about in (
        ("synth", "make radiograph-like images with reports for five sites"),
        ("convert", "turn a CSV and a folder of images into shards per client"),
        ("partition", "split labelled shards over clients by a Dirichlet draw"),
        ("inspect", "show what a folder of shards holds"),
    ):
        module = import_module(f"feddra_ds.commands.data_{name}")
        sub = commands.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".")
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)


def _default(info: Any) -> str:
    value = info.get_default(call_default_factory=True)
    return "null" if value is None else str(value)


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return text[:1] in "+-.0123456789"
