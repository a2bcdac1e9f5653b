"""`feddra-ds data index`: the indexes that a training with this config would make at first use."""

from __future__ import annotations

import argparse

from feddra_ds.common.console import next_step
from feddra_ds.common.logs import log_to_stderr
from feddra_ds.config.load import load
from feddra_ds.data.format.dataset import open_dataset

EXAMPLES = ("feddra-ds data index --config my.yaml",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `data index`."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="config of the training; --section.key value come on top, as in `train`, such as --data.clients",
    )


def run(args: argparse.Namespace) -> int:
    """Print a line for each client, and one for each thing of its shards that was left out. Raises ConfigError, DataError."""
    config = load(args.config, args.overrides)
    with log_to_stderr(0):
        dataset = open_dataset(config.data.root, config.clients.ids, data=config.data)
        for client in dataset.client_ids:
            counts = [f"{dataset.num_samples(client, split):,} {split}" for split in dataset.splits(client)]
            print(f"{client}: {', '.join(counts)} pairs in {len(dataset.shards(client))} shards")
            for note in dataset.index(client).get("notes", []):
                print(f"note     {note}")
    next_step("feddra-ds train with the same keys")
    return 0
