"""What `data inspect` and `data validate` share: which shards they look at; this file is not a command."""

from __future__ import annotations

import argparse
from typing import Any

from feddra_ds.common.parse import parse_yaml
from feddra_ds.common.tree import set_path
from feddra_ds.config.load import load
from feddra_ds.config.schema import Config, DataConfig
from feddra_ds.data.format.dataset import Dataset, open_dataset

# option: the key of a config that it sets
KEYS = {
    "root": "data.root",
    "clients": "data.clients",
    "client_field": "data.client_field",
    "text_field": "data.text_field",
    "text_length": "data.text_length",
    "max_bad_fraction": "data.max_bad_fraction",
    "tokenizer": "model.text.tokenizer",
}


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the shards are, what is in them, and how many pairs may be unreadable."""
    add = parser.add_argument
    add("root", nargs="?", metavar="ROOT", help="folder of the dataset; with --client-field, of one set of shards")
    add("--config", metavar="FILE", help="config of a training, whose data, clients and tokenizer are looked at; the options "
        "here come on top")  # fmt: skip
    add("--clients", metavar="MAP", help="in place of ROOT: each client's shards, as data.clients, such as "
        "'{north: /archive/north, south: \"/archive/south/{000..011}.tar\"}'")  # fmt: skip
    add("--client-field", metavar="F", help="field of a sample's json that names its client, as data.client_field")
    add("--text-field", metavar="F", help="field of a sample's json that is its text (its .txt where the json has none), as "
        "data.text_field")  # fmt: skip
    add("--max-bad-fraction", type=float, metavar="F", help="share of unreadable pairs of a client above which this is a problem "
        f"(default: the config's, else {DataConfig().max_bad_fraction})")  # fmt: skip


def config_of(args: argparse.Namespace) -> Config:
    """What --config says, with the options on top. Raises ConfigError."""
    overrides: dict[str, Any] = {}
    for option, key in KEYS.items():
        value = getattr(args, option, None)
        if value is not None:
            set_path(overrides, key, _as_yaml(value) if option == "clients" else value)
    return load(args.config, overrides)


def dataset_of(config: Config) -> Dataset:
    """Its data, by place, whatever data.order is. Raises DataError."""
    return open_dataset(config.data.root, config.clients.ids, data=config.data.model_copy(update={"order": "exact"}))


def _as_yaml(text: str) -> Any:
    try:
        return parse_yaml(text)
    except ValueError:
        return text  # which the config refuses
