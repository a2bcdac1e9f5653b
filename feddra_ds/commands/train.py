"""`feddra-ds train`: federated pre-training from a config and keys on top of it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from feddra_ds.config.load import class_of, dump, known_keys, load
from feddra_ds.config.reference import default_of, kind_of
from feddra_ds.config.schema import Config

if TYPE_CHECKING:
    from feddra_ds.distributed.plan import Plan
    from feddra_ds.distributed.topology import Memory

EXAMPLES = (
    "feddra-ds train my.yaml",
    "feddra-ds train quickstart --schedule.rounds 2   # a shipped config, with a key on top",
    "feddra-ds train my.yaml --strategy.name fedavg --run.output_dir runs/fedavg",
    "feddra-ds train my.yaml --print_config   # what it comes to",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `train`; every config key is an option, listed by --help."""
    parser.usage = "%(prog)s [-h] [FILE | --config FILE] [--print_config] [--section.key value ...]"
    about = "YAML config, or the name of one that `feddra-ds config list` shows; keys given as options come on top"
    parser.add_argument("file", nargs="?", metavar="FILE", help=about)
    parser.add_argument("--config", metavar="FILE", help="the same")
    parser.add_argument("--print_config", action="store_true", help="print the resolved config and exit")
    # not argparse's own --help, which knows nothing of the objective and strategy that the config names
    parser.add_argument("-h", "--help", action="store_true", help="show this, with every key of the config, and exit")
    parser.set_defaults(parser=parser)


def run(args: argparse.Namespace) -> int:
    """Exit code: 0; 1 where the run had to end; 2 for a bad config; 128 + signal; 75 where SIGUSR1 ended it after a checkpoint.

    Raises ConfigError and ValueError.
    """
    path = args.file or args.config
    if args.file and args.config:
        raise ValueError(f"--config: {args.config} is given beside {args.file}; a training has one config")
    if args.help:
        args.parser.epilog += "\n\n" + _keys(path, args.overrides)
        args.parser.print_help()
        return 0
    if args.print_config:
        print(dump(load(path, args.overrides)), end="")
        return 0
    from feddra_ds.run.train import run as train

    return train(path, args.overrides, _predict)


def _predict(config: Config, layout: Plan, device: str) -> Memory:
    """What a rank of this plan will need at its peak."""
    from feddra_ds.distributed.topology import Memory
    from feddra_ds.doctor.memory.verdict import plan_of

    plan = plan_of(config, layout, device)
    return Memory(plan.bytes_of("host"), plan.bytes_of("device"))


def _keys(path: str | None, overrides: dict[str, Any]) -> str:
    """The keys, with those of the objective and strategy that are chosen."""
    keys = known_keys(class_of(path, overrides))
    return "config keys, given as --section.key value (YAML values):\n" + "\n".join(
        f"  --{key}  {kind_of(info)}  (default: {default_of(info)})\n        {info.description or ''}"
        for key, info in keys.items()
    )
