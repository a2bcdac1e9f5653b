"""`feddra-ds config reference`: docs/configuration.md, written from the config classes."""

from __future__ import annotations

import argparse

from feddra_ds.config.reference import reference


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`config reference` has no arguments."""


def run(args: argparse.Namespace) -> int:
    """Print the page."""
    print(reference(), end="")
    return 0
