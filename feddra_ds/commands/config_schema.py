"""`feddra-ds config schema`: a JSON schema of a config, with which an editor completes and explains keys."""

from __future__ import annotations

import argparse
import json

from feddra_ds.config.load import class_of
from feddra_ds.config.reference import json_schema

EXAMPLES = (
    "feddra-ds config schema > feddra_config.schema.json",
    "feddra-ds config schema --config my.yaml   # with the keys of its strategy and objective",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `config schema`; --help says what to do with it."""
    parser.add_argument(
        "--config", metavar="FILE", help="with the keys of the objective and strategy that this config names, yours too"
    )
    parser.epilog = (
        "An editor with a YAML language server completes and explains keys from it, with this first line of a config:\n"
        "  # yaml-language-server: $schema=feddra_config.schema.json"
    )


def run(args: argparse.Namespace) -> int:
    """Print the schema. Raises ConfigError."""
    print(json.dumps(json_schema(class_of(args.config)), indent=2, ensure_ascii=False))
    return 0
