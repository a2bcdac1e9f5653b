"""`feddra-ds config reference`: docs/configuration.md, written from the config classes."""

from __future__ import annotations

import argparse

from feddra_ds.config.load import class_of
from feddra_ds.config.reference import reference

EXAMPLES = (
    "feddra-ds config reference | less",
    "feddra-ds config reference --config my.yaml",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `config reference`."""
    parser.add_argument(
        "--config", metavar="FILE", help="show the keys of the objective and strategy that this config names, yours too"
    )


def run(args: argparse.Namespace) -> int:
    """Print the page. Raises ConfigError."""
    print(reference(class_of(args.config)), end="")
    return 0
