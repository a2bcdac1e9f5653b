"""`feddra-ds data validate`: every byte of a dataset against its indexes."""

from __future__ import annotations

import argparse

from feddra_ds.commands._data_arguments import add_data_arguments, config_of, dataset_of
from feddra_ds.common.console import next_step, print_table, track
from feddra_ds.common.text import listed
from feddra_ds.data.format.look import are_too_many
from feddra_ds.data.format.preflight import lost_folders
from feddra_ds.data.format.validate import validate

EXAMPLES = (
    "feddra-ds data validate data/mine",
    "feddra-ds data validate --config my.yaml",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `data validate`."""
    add_data_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print a row for each client and a line for each problem. Returns 1 when there is one. Raises ConfigError, DataError."""
    config = config_of(args)
    dataset = dataset_of(config)
    problems = lost_folders(dataset)
    found = validate(dataset, track)
    rows = []
    for client, own in found.items():
        bad = sum(map(len, own.unreadable.values()))
        rows.append((client, own.shards, f"{own.num_bytes / 1e6:,.1f}", own.pairs, bad, len(own.problems)))
    columns = ["client", "shards", "MB read", "pairs", "unreadable", "problems"]
    print_table(f"{dataset.address}: every byte against its index", columns, rows)
    for client, own in found.items():
        problems += own.problems
        bad = sum(map(len, own.unreadable.values()))
        if not bad:
            continue
        reasons = "; ".join(f"{len(keys)} {why}: {listed(keys, 3)}" for why, keys in sorted(own.unreadable.items()))
        line = f"{client}: {bad} of {own.pairs} pairs are unreadable ({reasons})"
        if are_too_many(bad, own.pairs, config.data.max_bad_fraction):
            problems.append(f"{line}, more than data.max_bad_fraction ({config.data.max_bad_fraction:.0%}) bears with")
        else:
            print(f"note     {line}")
    for line in problems:
        print(f"PROBLEM  {line}")
    if problems:
        next_step("mend the problems above, or make the dataset again")
        return 1
    print("ok       every shard is what its index says")
    next_step("feddra-ds train")
    return 0
