"""The `feddra-ds` command: one table of commands, and the one place where errors become lines and exit codes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from feddra_ds import __version__
from feddra_ds.common.text import printable
from feddra_ds.config.overrides import parse_overrides

# command: (its module, what it does). A module has add_arguments(parser) and run(args) -> exit code, and is imported
# only when its command is asked for. A command of two words belongs to a group.
COMMANDS = {
    "train": ("feddra_ds.commands.train", "train from a config"),
    "config list": ("feddra_ds.commands.config_list", "list the configs that come with the package"),
    "config show": ("feddra_ds.commands.config_show", "print one of them, to start your own from"),
    "config schema": ("feddra_ds.commands.config_schema", "print a JSON schema of a config, for editors to complete"),
    "config reference": ("feddra_ds.commands.config_reference", "print what every key means, as Markdown"),
    "data synth": ("feddra_ds.commands.data_synth", "make radiograph-like images with reports for five sites"),
    "data convert": ("feddra_ds.commands.data_convert", "turn a CSV and a folder of images into shards per client"),
    "data partition": ("feddra_ds.commands.data_partition", "split labelled shards over clients by a Dirichlet draw"),
    "data inspect": ("feddra_ds.commands.data_inspect", "show what a folder of shards holds"),
    "data index": ("feddra_ds.commands.data_index", "make the indexes that a config's shards from elsewhere need"),
    "experiment run": ("feddra_ds.commands.experiment_run", "train and measure the arms of a spec over its seeds"),
    "experiment table": ("feddra_ds.commands.experiment_table", "show its arms' means and paired differences"),
    "experiment plot": ("feddra_ds.commands.experiment_plot", "draw them, an SVG a metric"),
    "evaluate": (
        "feddra_ds.commands.evaluate",
        "measure retrieval and zero-shot classification of a run or an exported model",
    ),
    "probe": ("feddra_ds.commands.probe", "train a linear classifier on a model's frozen image features"),
    "export": (
        "feddra_ds.commands.export",
        "write the model of a run or of one of its checkpoints as a folder of its own",
    ),
    "report": ("feddra_ds.commands.report", "write a run's report.html, one self-contained page"),
    "status": ("feddra_ds.commands.status", "show where a run in the background stands"),
    "doctor": ("feddra_ds.commands.doctor", "check this machine, and with --config whether a run can start on it"),
}
GROUPS = {
    "config": "list and print shipped configs, and what every key means",
    "data": "make, convert, split and look at shards",
    "experiment": "compare configs over seeds",
}
TAKE_CONFIG_KEYS = ("train", "doctor", "data index")  # whatever else is on their command line is --section.key value


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code: 2 for what a user can mend, 130 after Ctrl-C, 141 for a closed pipe."""
    words = sys.argv[1:] if argv is None else argv
    # the deepspeed launcher adds --local_rank=N; LOCAL_RANK in the environment says the same
    words = [word for word in words if not word.startswith("--local_rank")]
    parser = _parser(words)
    args, rest = parser.parse_known_args(words)
    args.rest = rest
    if rest and not args.takes_config_keys:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        args.overrides = parse_overrides(rest)
        return int(args.run(args))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `… | head` has read enough; nothing more can be written, at the interpreter's end neither
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        problems = _problems(error)
        if not problems:
            raise
        for problem in problems:
            print("feddra-ds:", printable(problem, keep="\n"), file=sys.stderr)
        return 2


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of all commands, with the arguments of the command that `words` ask for."""
    parser = argparse.ArgumentParser(
        prog="feddra-ds", description="Federated distributionally robust vision-language pre-training."
    )
    parser.add_argument("--version", action="version", version=__version__)
    top = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    groups = {}
    for name, (module_name, about) in COMMANDS.items():
        group, _, own_name = name.rpartition(" ")
        if group and group not in groups:
            groups[group] = top.add_parser(group, help=GROUPS[group]).add_subparsers(required=True, metavar="COMMAND")
        command = groups.get(group, top).add_parser(
            own_name, help=about, description=f"{about[0].upper()}{about[1:]}.", conflict_handler="resolve"
        )
        if name.split() == list(words[: len(name.split())]):
            module = import_module(module_name)
            command.set_defaults(run=module.run, takes_config_keys=name in TAKE_CONFIG_KEYS)
            module.add_arguments(command)
    return parser


def _problems(error: Exception) -> list[str]:
    """What a user can mend, a line each; empty for any other error."""
    if hasattr(error, "problems"):
        return list(error.problems)
    if isinstance(error, ValueError):
        return [str(error)]
    if isinstance(error, OSError) and error.filename is not None:
        return [f"{error.filename}: {error.strerror}"]
    return []
