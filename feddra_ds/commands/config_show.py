"""`feddra-ds config show NAME`: a shipped config's text, to start a config of one's own from."""

from __future__ import annotations

import argparse

from feddra_ds.config.shipped import names, read

EXAMPLES = ("feddra-ds config show quickstart > my.yaml",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `config show`."""
    parser.add_argument("name", metavar="NAME", choices=names(), help=f"one of {', '.join(names())}")


def run(args: argparse.Namespace) -> int:
    """Print the file as it is, comments and all."""
    print(read(args.name), end="")
    return 0
