"""`feddra-ds config list`: the configs that come with the package."""

from __future__ import annotations

import argparse

from feddra_ds.common.console import next_step
from feddra_ds.config.shipped import about, names

EXAMPLES = ("feddra-ds config list",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`config list` has no arguments."""


def run(args: argparse.Namespace) -> int:
    """Print each config's name and the first line of its comment."""
    width = max(map(len, names()))
    for name in names():
        print(f"{name:<{width}}  {about(name)}")
    next_step("feddra-ds config show NAME > my.yaml", "feddra-ds train --config my.yaml   # or --config NAME as it is")
    return 0
