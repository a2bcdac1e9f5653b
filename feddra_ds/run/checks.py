"""Everything about data, topology and device that can be wrong, before any process group starts.

Nothing slow is imported, torch only for the device: what is wrong is said at once.
"""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feddra_ds import strategies
from feddra_ds.checkpoint.format import read_coordinator
from feddra_ds.common.errors import ConfigError, DataError
from feddra_ds.common.text import listed
from feddra_ds.common.tree import get_path
from feddra_ds.config.checks import few_to_compare
from feddra_ds.config.schema import Config
from feddra_ds.data.format.dataset import Dataset, open_dataset
from feddra_ds.data.format.preflight import preflight
from feddra_ds.distributed.launch import Launch, choose_device, missing_hostfile
from feddra_ds.distributed.plan import Plan, plan
from feddra_ds.model import lora_options
from feddra_ds.model.lora_options import LoraOptions
from feddra_ds.run.trackers import tracker_problems

if TYPE_CHECKING:
    import torch

    from feddra_ds.strategies import Strategy

POOLED = "pooled"  # the one client of a strategy that pools the data
_MAY_DIFFER_BY_HOST = ("data.root", "data.num_workers", "data.prefetch", "data.verify", "topology.interface")


def _cannot_be_made(folder: Path) -> list[str]:
    """A line where the run's folder is none and cannot become one, or cannot be written to."""
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir():
        return [f"run.output_dir: {nearest} is a file, so {folder} cannot be a folder; choose another"]
    if not os.access(nearest, os.W_OK | os.X_OK):
        return [f"run.output_dir: {nearest} cannot be written to; choose another folder"]
    return []


def make_val_splits(dataset: Dataset, config: Config) -> None:
    """For dro.evaluate_on=val: take a slice out of the training pairs of each client that has no val split."""
    if config.dro.evaluate_on != "val":
        return
    for client in dataset.wanted(config.clients.ids):
        if (
            client in dataset.clients
            and not dataset.num_samples(client, "val")
            and dataset.num_samples(client, "train")
        ):
            dataset.make_val(client, config.dro.holdout_fraction, config.dro.evaluation_batch_size, config.run.seed)


def _reference_problem(config: Config, ids: list[str]) -> str | None:
    """Why dro.reference cannot be compared with, or None."""
    reference = config.dro.reference
    if reference is None:
        return None
    folder = reference_checkpoint(reference)
    if folder is None:
        return f"dro.reference: {reference} has no whole checkpoint; give the folder of a finished run of strategy.name=local"
    state = read_coordinator(folder)
    if state["config"]["strategy"]["name"] != "local":
        return f"dro.reference: {reference} is a run of {state['config']['strategy']['name']}; give one of strategy.name=local"
    if missing := [client for client in ids if client not in state["metrics"]["client_ids"]]:
        return f"dro.reference: {reference} has no model of {listed(missing)}; train it with these clients too"
    if state["config"]["model"] != config.model_dump(mode="json")["model"]:
        return f"dro.reference: {reference} has another model section; train both runs with the same one"
    return None


def _adapter_problems(config: Config, adapter: LoraOptions, ids: list[str]) -> list[str]:
    """What the adapters' rule cannot work with: a line each."""
    rule, out = adapter.aggregation, []
    if rule in ("product", "residual", "stack") and config.aggregate.precision != "fp32":
        out.append(
            f"aggregate.precision: {config.aggregate.precision} rounds deltas of factors, and "
            f"model.adapter.aggregation={rule} needs each client's own; use fp32, or factors, freeze_a or alternate"
        )
    if unknown := sorted(set(adapter.ranks or {}) - set(ids)):
        out.append(f"model.adapter.ranks: {listed(unknown)} are no clients of this run, which are {listed(ids)}")
    if adapter.moves_frozen and config.dro.reference is not None:
        out.append(
            f"model.adapter.aggregation: {rule} moves the frozen weights, under which the clients' own models of "
            "dro.reference do not stand; use product, factors or freeze_a"
        )
    if adapter.moves_frozen and get_path(config.deepspeed, "zero_optimization.offload_param.device") == "nvme":
        out.append(
            f"model.adapter.aggregation: {rule} moves the frozen weights, which "
            "deepspeed.zero_optimization.offload_param.device=nvme keeps in files; use cpu"
        )
    return out


def _rule_problems(config: Config, strategy: Strategy, num_clients: int) -> list[str]:
    """What of the rule of aggregation does not go with the strategy, the adapters or the number of clients: a line each."""
    aggregate = config.aggregate
    out: list[str] = []
    if not aggregate.holds_updates:
        return out
    key, remedy = ("rule", "mean") if aggregate.rule != "mean" else ("min_cosine", "null")
    name = config.strategy.name
    if not strategy.averages:
        out.append(f"aggregate.{key}: strategy.name={name} averages no updates; use {remedy}")
    elif num_clients < aggregate.fewest_clients:
        out.append(few_to_compare(config, num_clients, "this run"))
    if strategy.takes_snapshot or strategy.folds_drifts or (strategy.num_kept and strategy.steps):
        out.append(
            f"aggregate.{key}: would leave out clients that strategy.name={name} has counted elsewhere; use {remedy}"
        )
    if (rule := (config.model.adapter or {}).get("aggregation")) in ("product", "residual", "stack"):
        out.append(f"aggregate.{key}: is of single numbers, and model.adapter.aggregation={rule} of products of factors; use "
                   f"{remedy}, or factors, freeze_a or alternate")  # fmt: skip
    return out


def reference_checkpoint(run_dir: str) -> Path | None:
    """The newest checkpoint of a run, or None. Its manifest came last: a folder that has one was written to its end."""
    manifests = sorted((Path(run_dir) / "checkpoints").glob("round-*/manifest.json"))
    return manifests[-1].parent if manifests else None


Checked = tuple[Dataset, list[str], Plan]


def check(config: Config, launch: Launch) -> Checked:
    """Everything about data, topology and device that can be wrong, before any process group starts.

    Returns the dataset, the ids of its clients and the plan. Raises ConfigError with a line per problem.
    """
    problems: list[str] = []
    strategy = strategies.build(config.strategy, config.dro)
    dataset = None
    try:
        dataset = open_dataset(config.data.root, data=config.data)
        make_val_splits(dataset, config)
        problems += preflight(
            dataset,
            config.clients.ids,
            batch_size=config.data.batch_size,
            eval_batch_size=config.dro.evaluation_batch_size,
            loss_split="val" if config.dro.evaluate_on == "val" else "train",
            eval_split=config.evaluation.split if config.evaluation.every > 0 else None,
            verify=config.data.verify and launch.rank == 0,
            pooled=strategy.pools_data,
        )
    except DataError as error:
        problems += error.problems
    problems += _cannot_be_made(Path(config.run.output_dir).absolute())
    problems += tracker_problems(config.run) if launch.rank == 0 else []
    if problems or dataset is None:
        raise ConfigError(problems)
    dataset.choose(config.clients.ids)
    ids = list(dataset.client_ids)
    num_clients = 1 if strategy.pools_data else len(ids)
    if config.clients.minimum > num_clients:
        problems.append(f"clients.minimum: {config.clients.minimum} is more than the {num_clients} clients there are")
    per_round = config.clients.per_round
    if per_round is not None and per_round > num_clients:
        problems.append(
            f"clients.per_round: {per_round} is more than the {num_clients} clients there are; null takes all"
        )
    problems += _rule_problems(config, strategy, num_clients)
    uncounted = [client for client in ids if dataset.is_uncounted(client)]
    if config.dro.center == "samples" and uncounted:
        problems.append(f"dro.center: samples needs all pairs counted, and those of {listed(uncounted)} are not; "
                        "`feddra-ds data index` with the same keys counts them")  # fmt: skip
    if config.aggregate.ema is not None and not strategy.averages:
        problems.append(
            f"aggregate.ema: strategy.name={config.strategy.name} has no global model to average over rounds; use null"
        )
    weights = config.dro.fixed_weights
    if weights is not None and len(weights) != num_clients:
        problems.append(f"dro.fixed_weights: {len(weights)} weights for {num_clients} clients ({', '.join(ids)})")
    if problem := _reference_problem(config, ids):
        problems.append(problem)
    try:
        adapter = lora_options.parse(config.model.adapter)
        problems += [] if adapter is None else _adapter_problems(config, adapter, ids)
    except ValueError as error:
        problems += str(error).splitlines()
    layout = None
    if launch.rank == 0 and (hostfile := missing_hostfile()):
        problems.append(f"--hostfile: there is no file {hostfile}, so deepspeed has started this host's ranks alone")
    try:
        choose_device(config.run.device, launch.local_rank)
        layout = plan(launch.world_size, num_clients, config.topology.ranks_per_slot)
        if config.data.batch_size % layout.ranks_per_slot:
            problems.append(
                f"data.batch_size: {config.data.batch_size} pairs do not divide over a client's {layout.ranks_per_slot} ranks"
            )
    except ValueError as error:
        problems.append(str(error))
    if problems or layout is None:
        raise ConfigError(problems)
    return dataset, ids, layout


def what_all_ranks_share(
    config: Config, dataset: Dataset, dataset_ids: list[str], device: torch.device
) -> dict[str, Any]:
    """What must be the same on every host, by name: config, data, kind of device, versions."""
    tree = config.model_dump(mode="json")
    keys = {f"{section}.{key}": value for section, keys in tree.items() for key, value in keys.items()}
    counted = [client for client in dataset_ids if not dataset.is_uncounted(client)]
    return {
        **{key: value for key, value in keys.items() if key not in _MAY_DIFFER_BY_HOST},
        **{f"the number of {client}'s training pairs": dataset.num_samples(client, "train") for client in counted},
        "the kind of device": device.type,
        **{f"the version of {name}": metadata.version(name) for name in ("feddra-ds", "torch", "deepspeed")},
    }
