"""Puts a run together: checks everything that can be checked alone, joins the groups, builds engine, data and server."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from feddra_ds import strategies
from feddra_ds.checkpoint.choose import agree_on_checkpoint
from feddra_ds.checkpoint.format import SHARED, read_coordinator
from feddra_ds.checkpoint.load import SavedModel
from feddra_ds.common.errors import ConfigError
from feddra_ds.common.files import write_atomic
from feddra_ds.common.logs import logger
from feddra_ds.common.text import listed
from feddra_ds.config.load import dump
from feddra_ds.config.schema import Config, EncoderConfig, ModelConfig
from feddra_ds.data.format.dataset import Dataset
from feddra_ds.data.loading.client_data import ClientData
from feddra_ds.data.loading.order import Position
from feddra_ds.data.loading.pool import DecodePool
from feddra_ds.data.loading.streaming import build_data
from feddra_ds.data.loading.words import Words
from feddra_ds.distributed.launch import Launch, choose_device
from feddra_ds.distributed.plan import Plan
from feddra_ds.distributed.topology import Topology
from feddra_ds.engine.engine import Engine
from feddra_ds.federation.aggregation.norms import UpdateNorms
from feddra_ds.federation.anchors import frozen_twin
from feddra_ds.federation.client import Client, LocalTrainer
from feddra_ds.federation.coordinator import Coordinator
from feddra_ds.federation.pairs import Pairs
from feddra_ds.federation.references import References
from feddra_ds.federation.saving import read_kept, read_residuals
from feddra_ds.federation.schedule import steps_per_round
from feddra_ds.federation.server import OwnModels, Server
from feddra_ds.model import SIDES
from feddra_ds.model.build import model_of, processor_of, tokenizer_of
from feddra_ds.model.dual_encoder import DualEncoder
from feddra_ds.model.dual_encoder_config import DualEncoderConfig
from feddra_ds.model.heads import synchronise_batchnorms
from feddra_ds.model.processor import DualEncoderProcessor
from feddra_ds.model.weights.deferred import Weights, defer, make_room
from feddra_ds.objectives import Objective
from feddra_ds.objectives import build as build_objective
from feddra_ds.objectives.features import WORDS
from feddra_ds.run.checks import POOLED, Checked, check, reference_checkpoint, what_all_ranks_share
from feddra_ds.run.debug import recorder
from feddra_ds.run.metrics_file import MetricsFile
from feddra_ds.run.prediction import Predict, predicted
from feddra_ds.run.rank_log import problems_told_once
from feddra_ds.run.rounds import Run
from feddra_ds.strategies import Strategy
from feddra_ds.strategies.mixture_set import MixtureSet, Vector


def build(config: Config, checked: Checked | None = None, predict: Predict | None = None) -> Run:
    """Build this rank's part of the run, resumed where run.resume says so. Raises ConfigError before any group starts.

    checked: what `check` has found, where the caller asked it before the heavy imports of this module. predict: of several
    ranks, says what one will need, for the plan.
    """
    launch = Launch.from_environment()
    dataset, dataset_ids, layout = checked or check(config, launch)
    strategy = strategies.build(config.strategy, config.dro)
    objective = build_objective(config.objective)
    device = choose_device(config.run.device, launch.local_rank)
    with problems_told_once(launch):
        tokenizer = tokenizer_of(config)
        processor = processor_of(config, tokenizer)
        seed_everything(config.run.seed)
        model, initial = defer(lambda: model_of(config, tokenizer))

    topology = Topology(
        layout,
        launch,
        device,
        config.clients.timeout_s,
        common=what_all_ranks_share(config, dataset, dataset_ids, device),
        client_ids=[POOLED] if strategy.pools_data else dataset_ids,
        interface=config.topology.interface,
        memory=predicted(predict, config, layout, launch, device),
    )
    step_factor = strategy.step_factor(len(dataset_ids))
    if topology.is_coordinator:
        _say_what_starts(config, layout, device, model, step_factor)
        _say_what_is_kept_out(dataset)
    resumed = agree_on_checkpoint(config, topology)
    trainer = build_trainer(config, model, initial, objective, strategy, topology, tokenizer)
    engine = trainer.engine
    clients, validation, client_ids, num_samples = build_clients(
        config, dataset, dataset_ids, strategy, topology, tokenizer, processor
    )
    if engine.adapter is not None:
        for client in clients:
            client.adapter_rank = engine.adapter.lower_rank(client.id)
    if objective.num_kept:
        for client in clients:
            client.pairs = Pairs(objective.num_kept)
    server = Server(engine, strategy, config, topology) if strategy.averages else OwnModels(engine, clients)
    center = strategy.center(num_samples)
    reference = None if config.dro.reference is None else reference_checkpoint(config.dro.reference)
    references = None if reference is None else References(reference, engine)
    run = Run(
        config=config,
        strategy=strategy,
        objective=objective,
        topology=topology,
        engine=engine,
        trainer=trainer,
        server=server,
        client_ids=client_ids,
        clients=clients,
        validation=validation,
        num_samples=num_samples,
        step_factor=step_factor,
        center=center,
        references=references,
        mixture=strategy.first_mixture(center),
    )
    state = None if resumed is None else _resume(run, resumed)
    if topology.is_coordinator:
        _lead(run, state)
    return run


def _say_what_starts(
    config: Config, layout: Plan, device: torch.device, model: DualEncoder, step_factor: int = 1
) -> None:
    pairs = layout.num_clients * steps_per_round(config, step_factor) * config.data.batch_size
    logger.info("%s on %s, %s, %s pairs a round", layout.describe(), device, config.strategy.name, f"{pairs:,}")
    if config.dro.apply == "loss" and config.optimizer.name != "sgd":
        logger.warning(
            f"dro.apply=loss is almost a no-op with optimizer.name={config.optimizer.name}, whose step does not depend on the "
            "loss's scale; dro.apply=aggregate lets p act"
        )
    if config.dro.apply == "both":
        logger.warning(
            "dro.apply=both optimises Σ N p² L, as p acts in the loss and again in the average (under adamw the loss's "
            "factor does almost nothing); dro.apply=aggregate optimises Σ p L"
        )
    if sides := sides_at_chance(config.model, model.config):
        logger.warning(
            "model.head.output_norm=%s: %s random weights and cls pooling, whose embeddings start almost equal; training "
            "may stay at chance for 100 steps and more; use pooling=mean or model.head.output_norm=batchnorm",
            config.model.head.output_norm,
            " and ".join(f"model.{side}" for side in sides) + (" has" if len(sides) == 1 else " have"),
        )


def _say_what_is_kept_out(dataset: Dataset) -> None:
    if dataset.without_val:
        told = listed([f"{client} {dataset.num_samples(client, 'val')}" for client in dataset.without_val])
        logger.info("kept out of training, as there is no val split (dro.holdout_fraction): %s pairs", told)


def sides_at_chance(config: ModelConfig, built: DualEncoderConfig) -> list[str]:
    """The encoders whose random weights, cls pooling and head without a batchnorm map all inputs to one direction."""
    if config.pretrained is not None or config.head.output_norm == "batchnorm":
        return []
    sections: dict[str, EncoderConfig] = {"vision": config.vision, "text": config.text}
    return [s for s in SIDES if sections[s].pretrained is None and getattr(built, f"{s}_pooling") == "cls"]


def build_trainer(
    config: Config,
    model: DualEncoder,
    initial: Weights | None,
    objective: Objective,
    strategy: Strategy,
    topology: Topology,
    tokenizer: PreTrainedTokenizerBase,
) -> LocalTrainer:
    """The engine over the model, and what trains clients on it. Raises ConfigError. Collective over the slot."""
    device, ranks = topology.device, topology.plan.ranks_per_slot
    # the twins are made before DeepSpeed partitions the model
    place = torch.device("cpu" if initial is None else "meta")
    frozen_aligner = frozen_twin(model.aligner, place, torch.float32)
    is_resident = config.objective.anchors == "resident" and (objective.needs_anchors or strategy.adds_loss)
    frozen_model = frozen_twin(model, place, torch.float32) if is_resident else None
    if (
        device.type == "cpu"
        and ranks > 1
        and (key := config.model.head.batchnorm_key or model.encoder_with_batchnorm())
    ):
        raise ConfigError(
            [
                f"{key}: batchnorm over several ranks of a client needs CUDA (SyncBatchNorm); use layers without it, or "
                "topology.ranks_per_slot = 1"
            ]
        )
    if ranks > 1:  # the slot's group is torch's default one
        for module in (model, frozen_aligner, frozen_model):
            if module is not None:
                synchronise_batchnorms(module)
    engine = Engine(model, config, device=device, slot_rank=topology.slot_rank, ranks_per_slot=ranks, weights=initial)
    for twin in (frozen_aligner, frozen_model):
        if twin is not None:
            make_room(twin, device, engine.dtype)
    observer = recorder(config.debug, engine, topology, Path(config.run.output_dir))
    words = Words(tokenizer) if WORDS in objective.needs else None
    return LocalTrainer(engine, frozen_aligner, frozen_model, objective, strategy, config, topology, observer, words)


def _resume(run: Run, folder: Path) -> dict[str, Any]:
    """Take the models, p, positions and the next round from a checkpoint; returns its coordinator.json."""
    state = read_coordinator(folder)
    if state["metrics"]["client_ids"] != run.client_ids:
        before = ", ".join(state["metrics"]["client_ids"])
        raise ConfigError(
            [
                f"data.root: its clients are {', '.join(run.client_ids)}, but the checkpoint in {folder} was trained with "
                f"{before}; start anew in another run.output_dir"
            ]
        )
    run.mixture, run.next_round = np.asarray(state["next_client_weights"]), state["round"] + 1
    norms = UpdateNorms(run.config.aggregate.max_norm_ratio, state.get("median_norms", {}))
    run.norm_limits = {stage: norms.limit(stage) for stage in norms.medians}
    for owner in run.server.states:
        saved = SavedModel(folder, owner)
        run.server.states[owner] = saved.read_state(run.engine)
        if owner == SHARED:
            run.engine.load_frozen(saved.read)
        run.engine.write(run.server.states[owner])  # as after a build: the engine holds a model that the server has
    read_residuals(folder, run.server, run.topology)
    read_kept(folder, run.server, run.clients)
    for client in run.clients:
        if client.id in state["positions"]:  # a client that was never heard of starts at its beginning
            client.position = Position(**state["positions"][client.id])
    return state


def _lead(run: Run, resumed: dict[str, Any] | None) -> None:
    """What the coordinator has beside the others: the run's folder, its record, its decisions."""
    config, center = run.config, run.center
    run.run_dir.mkdir(parents=True, exist_ok=True)
    write_atomic(run.run_dir / "config.yaml", dump(config))
    run.metrics = MetricsFile(
        run.run_dir / "metrics.jsonl", run.next_round, None if resumed is None else resumed["metrics"]
    )
    run.coordinator = Coordinator(
        config,
        run.topology,
        run.strategy,
        run.client_ids,
        center,
        run.mixture,
        losses=[] if resumed is None else resumed["metrics"]["client_losses"],
        loss_scale=run.objective.loss_scale,
        chance=run.objective.chance(config.dro.evaluation_batch_size),
        positions={} if resumed is None else resumed["positions"],
        smoothed=None if resumed is None else _losses_of(resumed.get("smoothed_losses")),
        norms=UpdateNorms(
            config.aggregate.max_norm_ratio if run.strategy.averages else None,
            {} if resumed is None else resumed.get("median_norms", {}),
        ),
    )
    run.checkpoints.coordinator = run.coordinator
    if run.strategy.averages and len(center) > 1 and config.dro.fixed_weights is None:
        _say_where_p_moves(run.strategy.mixture_set(center), run.client_ids)


def _losses_of(saved: list[float | None] | None) -> Vector | None:
    """(N,) from a checkpoint's list, in which None says that a client was never heard of."""
    return None if saved is None else np.array([np.nan if loss is None else loss for loss in saved])


def _say_where_p_moves(inside: MixtureSet, client_ids: list[str]) -> None:
    """The smallest and the largest weight that each client can come to have; a warning where a radius bounds nothing, which
    is what the simplex is asked for."""
    if inside.is_point:
        return
    low, high = inside.reach()
    reach = [f"{client} {a:.2f} to {b:.2f}" for client, a, b in zip(client_ids, low, high, strict=True)]
    logger.info("p can move, by client: %s", listed(reach))
    if inside.kind != "simplex" and np.any(high > 1 - inside.minimum * (1 - inside.center) - 1e-9):
        logger.warning(
            "dro.radius=%g forbids nothing: one client can have the whole average; lower it, or set dro.maximum_weight",
            inside.radius,
        )


def build_clients(
    config: Config,
    dataset: Dataset,
    dataset_ids: list[str],
    strategy: Strategy,
    topology: Topology,
    tokenizer: PreTrainedTokenizerBase,
    processor: DualEncoderProcessor,
) -> tuple[list[Client], dict[str, ClientData], list[str], list[int]]:
    """This slot's clients, their evaluation data by client id, and all clients' ids and numbers of training pairs."""
    members = {POOLED: dataset_ids} if strategy.pools_data else {i: [i] for i in dataset_ids}
    num_samples = [sum(dataset.num_samples(i, "train") for i in ids) for ids in members.values()]
    pool = DecodePool(config.data.num_workers, config.data.prefetch, timeout_s=config.clients.timeout_s)
    common: dict[str, Any] = {
        "config": config.data,
        "seed": config.run.seed,
        "tokenizer": tokenizer,
        "image_mean": processor.image_mean,
        "image_std": processor.image_std,
        "slot_rank": topology.slot_rank,
        "ranks_per_slot": topology.plan.ranks_per_slot,
        "pool": pool,
    }
    client_ids = list(members)
    clients, validation = [], {}
    for index in topology.plan.clients_of(topology.slot):
        name = client_ids[index]
        clients.append(Client(index, name, build_data(dataset, members[name], "train", **common)))
        if config.evaluation.every > 0:
            for member in members[name]:
                validation[member] = build_data(dataset, [member], config.evaluation.split, **common)
        if config.dro.evaluate_on == "val":
            is_built = config.evaluation.split == "val" and members[name] == [name] and name in validation
            clients[-1].val = validation[name] if is_built else build_data(dataset, members[name], "val", **common)
    return clients, validation, client_ids, num_samples


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch alike on every rank, so that all build the same initial weights."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
