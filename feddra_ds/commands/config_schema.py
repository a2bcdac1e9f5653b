"""`feddra-ds config schema`: a JSON schema of a config, with which an editor completes and explains keys."""

from __future__ import annotations

import argparse
import json

from feddra_ds.config.reference import json_schema


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`config schema` has no arguments; --help says what to do with it."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "An editor with a YAML language server completes and explains keys from it:\n"
        "  feddra-ds config schema > feddra_config.schema.json\n"
        "and in the first line of a config beside that file:\n"
        "  # yaml-language-server: $schema=feddra_config.schema.json"
    )


def run(args: argparse.Namespace) -> int:
    """Print the schema."""
    print(json.dumps(json_schema(), indent=2, ensure_ascii=False))
    return 0
