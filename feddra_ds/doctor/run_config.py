"""The part of `feddra-ds doctor` that looks at a config: data, topology, parameters, what a round will do."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from feddra_ds import strategies
from feddra_ds.common.errors import ConfigError, DataError
from feddra_ds.common.text import listed, size
from feddra_ds.config.load import load
from feddra_ds.config.schema import Config
from feddra_ds.data.format.dataset import Dataset
from feddra_ds.distributed.launch import Launch
from feddra_ds.distributed.plan import Plan
from feddra_ds.doctor.finding import Finding
from feddra_ds.doctor.machine import check_disk
from feddra_ds.federation.schedule import steps_per_round
from feddra_ds.model.build import model_of, tokenizer_of
from feddra_ds.model.encoders import count_parameters
from feddra_ds.model.weights.deferred import defer
from feddra_ds.run.checks import check

_BYTES_OF_ADAM = 16  # per parameter: fp32 weight, gradient and two moments


def check_config(path: str, overrides: dict[str, Any], num_ranks: int) -> Iterator[Finding]:
    """Findings on one config at so many ranks. Raises ConfigError where the file itself cannot be read."""
    try:
        config = load(path, overrides)
    except ConfigError as error:
        if error.problems[0].startswith("--config"):
            raise
        yield from (_problem(line) for line in error.problems)
        return
    yield Finding("ok", "config", f"{path}: {config.strategy.name}, {config.schedule.rounds} rounds")
    try:
        dataset, ids, layout = check(config, Launch(0, num_ranks, 0, "127.0.0.1", 0))
    except (ConfigError, DataError) as error:
        yield from (_problem(line) for line in error.problems)
        return
    yield Finding("ok", "topology", layout.describe())
    yield from _sharing(layout, num_ranks)
    yield from _data(config, dataset, ids)
    yield from _parameters(config, layout, len(ids))


def _problem(line: str) -> Finding:
    key, _, rest = line.partition(": ")
    return Finding("problem", key, rest or line) if rest else Finding("problem", "config", line)


def _sharing(layout: Plan, num_ranks: int) -> Iterator[Finding]:
    shares = sorted({len(layout.clients_of(slot)) for slot in range(layout.num_slots)})
    if len(shares) > 1:
        todo = "slots wait for the one with the most clients; fit: a number of slots that divides the clients"
        yield Finding("note", "topology", f"slots host {shares[0]} or {shares[-1]} clients", todo)
    cores = os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS")
    if not torch.cuda.is_available() and num_ranks > 1 and int(threads or cores) * num_ranks > cores:
        todo = f"OMP_NUM_THREADS={max(1, cores // num_ranks)}, if all {num_ranks} ranks run on this host"
        yield Finding("note", "threads", f"{num_ranks} ranks × {threads or cores} threads on {cores} cores", todo)


def _data(config: Config, dataset: Dataset, ids: Sequence[str]) -> Iterator[Finding]:
    pairs = {client: dataset.num_samples(client, "train") for client in ids}
    strategy = strategies.build(config.strategy, config.dro)
    shown = steps_per_round(config, strategy.step_factor(len(ids))) * config.data.batch_size
    each = listed([f"{client} {count:,}" for client, count in pairs.items()], 20)
    yield Finding("ok", "data", f"{sum(pairs.values()):,} train pairs: {each}")
    small = min(pairs, key=lambda client: pairs[client])
    text = f"a round shows every client {shown:,} pairs, {shown / pairs[small]:.1f} × all of {small}'s"
    if strategy.pools_data:
        text = f"a round shows {shown:,} pairs, {shown / sum(pairs.values()):.1f} × all of them"
    yield Finding("ok", "round", text)
    if strategy.pools_data or config.dro.evaluate_on == "anchors":
        return
    split, batch = config.dro.evaluate_on, config.dro.evaluation_batch_size
    judged = {client: dataset.num_samples(client, split) // batch * batch for client in ids}
    few = {client: count for client, count in judged.items() if count < config.dro.evaluation_pairs}
    if few:
        todo = "nothing, unless that is too few for a steady p: then raise dro.loss_smoothing, or leave the client out"
        each = listed([f"{client} {count}" for client, count in few.items()], 20)
        text = f"of {split} pairs, fewer than dro.evaluation_pairs = {config.dro.evaluation_pairs} move p: {each}"
        yield Finding("note", "dro.evaluation_pairs", text, todo)


def _parameters(config: Config, layout: Plan, num_clients: int) -> Iterator[Finding]:
    try:
        tokenizer = tokenizer_of(config)
        model, _ = defer(lambda: model_of(config, tokenizer))  # only shapes, without memory for weights
    except ConfigError as error:
        yield from (_problem(line) for line in error.problems)
        return
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total, aligner = count_parameters(model), count_parameters(model.aligner)
    yield Finding(
        "ok", "parameters", f"{total:,}: {aligner:,} in the alignment module, {total - aligner:,} in the backbone"
    )
    state = trained * _BYTES_OF_ADAM // layout.ranks_per_slot
    free = psutil.virtual_memory().available
    if not torch.cuda.is_available() and state > free:
        todo = "more ranks a client (ZeRO 1 and up share it), or a smaller model"
        yield Finding("problem", "memory", f"weights and Adam need {size(state)} a rank, {size(free)} are free", todo)
    models = num_clients if config.strategy.name == "local" else 1
    kept = config.checkpoint.keep or config.schedule.rounds
    yield from check_disk(Path(config.run.output_dir), (kept + 2) * models * trained * 4)
