"""The `feddra-ds` command: one table of commands, and the one place where errors become lines and exit codes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from feddra_ds import __version__
from feddra_ds.common.errors import WaitTimeout
from feddra_ds.common.text import printable

# command: (its module, what it does). A module has add_arguments(parser), EXAMPLES and run(args) -> exit code, and is imported
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
    "data validate": ("feddra_ds.commands.data_validate", "read every byte of shards against their indexes"),
    "data index": ("feddra_ds.commands.data_index", "make the indexes that a config's shards from elsewhere need"),
    "experiment run": ("feddra_ds.commands.experiment_run", "train and measure the arms of a spec over its seeds"),
    "experiment table": ("feddra_ds.commands.experiment_table", "show its arms' means and paired differences"),
    "experiment plot": ("feddra_ds.commands.experiment_plot", "draw them, an SVG a metric"),
    "evaluate": (
        "feddra_ds.commands.evaluate",
        "measure retrieval and zero-shot classification of a run or an exported model",
    ),
    "probe": ("feddra_ds.commands.probe", "train a linear classifier on a model's frozen image features"),
    "finetune": (
        "feddra_ds.commands.finetune",
        "measure transfer: fine-tune the image encoder on shares of the labels, frozen or whole",
    ),
    "embed": ("feddra_ds.commands.embed", "write the embeddings of a dataset's pictures and texts to a file"),
    "search": ("feddra_ds.commands.search", "find the pictures that a text describes best, and write them as a page"),
    "export": (
        "feddra_ds.commands.export",
        "write the model of a run or of one of its checkpoints as a folder of its own",
    ),
    "report": ("feddra_ds.commands.report", "write a run's report.html, one self-contained page"),
    "status": ("feddra_ds.commands.status", "show where a run in the background stands"),
    "completion": ("feddra_ds.commands.completion", "print a script that completes these commands in a shell"),
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
    parser, command = build_parser(words)
    keys: list[str] = []
    if command is not None and command.get_default("takes_config_keys"):
        words, keys = _without_config_keys(words, command)
    args = parser.parse_args(words)
    from feddra_ds.config.overrides import parse_overrides  # late: --help can do without

    args.rest, args.parser_of_all = keys, lambda: build_parser(None)[0]
    try:
        args.overrides = parse_overrides(keys)
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


class _Help(argparse.HelpFormatter):
    """Wraps a text of one line, and keeps one of several, such as examples, as it is."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


def build_parser(words: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser | None]:
    """(the parser of all commands, that of the one that `words` ask for), whose arguments alone it has; None: those of all."""
    parser = argparse.ArgumentParser(
        prog="feddra-ds", description="Federated distributionally robust vision-language pre-training."
    )
    parser.add_argument("--version", action="version", version=__version__)
    top = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    groups = {}
    asked = None
    for name, (module_name, about) in COMMANDS.items():
        group, _, own_name = name.rpartition(" ")
        if group and group not in groups:
            groups[group] = top.add_parser(group, help=GROUPS[group]).add_subparsers(required=True, metavar="COMMAND")
        command = groups.get(group, top).add_parser(
            own_name,
            help=about,
            description=f"{about[0].upper()}{about[1:]}.",
            conflict_handler="resolve",
            formatter_class=_Help,
        )
        if words is None or name.split() == list(words[: len(name.split())]):
            module, asked = import_module(module_name), command
            command.set_defaults(run=module.run, takes_config_keys=name in TAKE_CONFIG_KEYS)
            module.add_arguments(command)
            examples = "\n".join(["examples:", *(f"  {line}" for line in module.EXAMPLES)])
            command.epilog = "\n\n".join(part for part in (command.epilog, examples) if part)
    return parser, asked


def _without_config_keys(words: Sequence[str], command: argparse.ArgumentParser) -> tuple[list[str], list[str]]:
    """(what is for argparse, config keys with their values): every option that is not one of the command's own is a config key,
    so that its value is not taken for the command's file."""
    own = {option for action in command._actions for option in action.option_strings}
    kept: list[str] = []
    keys: list[str] = []
    items = list(words)
    while items:
        word = items.pop(0)
        if not word.startswith("--") or word.partition("=")[0] in own:
            kept.append(word)
            continue
        keys.append(word)
        if "=" not in word and items and not items[0].startswith("--"):
            keys.append(items.pop(0))
    return kept, keys


def _problems(error: Exception) -> list[str]:
    """What a user can mend, a line each; empty for any other error."""
    if hasattr(error, "problems"):
        return list(error.problems)
    if isinstance(error, (ValueError, WaitTimeout)):
        return [str(error)]
    if isinstance(error, OSError) and error.filename is not None:
        return [f"{error.filename}: {error.strerror}"]
    return []
