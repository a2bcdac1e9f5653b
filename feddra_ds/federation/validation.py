"""The losses L_i that move the weights p of equation (4), and retrieval: embeddings of seeded samples, without augmentation.

n: pairs of the sample · D: embedding size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from feddra_ds.common.errors import DataError
from feddra_ds.config.schema import Config
from feddra_ds.data.loading.client_data import ClientData
from feddra_ds.distributed.collectives import first_text, gather_uneven
from feddra_ds.distributed.topology import Topology
from feddra_ds.engine.engine import Engine
from feddra_ds.federation.protocol import Loss
from feddra_ds.federation.step import model_inputs
from feddra_ds.metrics.ranking import ranks, recall_table
from feddra_ds.objectives.base import Objective
from feddra_ds.objectives.features import Features


@dataclass(frozen=True)
class Embedded:
    """A whole sample, equal on every rank of the slot: unit-norm (n, D) fp32 embeddings on the host and text ids (n,)."""

    image: Tensor
    text: Tensor
    text_ids: Tensor
    temperature: float


def embed(
    engine: Engine,
    data: ClientData,
    num_pairs: int | None,
    config: Config,
    topology: Topology,
    draw: int | None = None,
) -> Embedded:
    """Embed a sample of one client (see ClientData.evaluation_batches) with the engine's weights. Collective over the slot.

    Raises DataError, on every rank of the slot alike, where one of them cannot read its part.
    Every rank runs the same number of forwards (under ZeRO 3 a forward is a collective), so a rank with fewer pairs
    repeats its last batch and drops the result.
    """
    engine.train(False)
    per_rank = config.evaluation.batch_size
    wanted = data.num_samples if num_pairs is None else min(num_pairs, data.num_samples)
    longest = math.ceil(wanted / topology.plan.ranks_per_slot)
    num_forwards = math.ceil(longest / per_rank)
    batches = iter(data.evaluation_batches(num_pairs, per_rank, config.run.seed, draw))
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    inputs: dict[str, Tensor] | None = None
    dim, temperature = config.model.embedding_dim, config.objective.temperature
    fault: str | None = None
    for _ in range(num_forwards):
        try:
            batch = next(batches, None)
        except DataError as error:  # the other ranks go on, and so does this one, to meet them below
            fault, batch = str(error), None
        if batch is not None:
            inputs = model_inputs(batch, engine)
        elif inputs is None:  # this rank has no pair at all
            side = config.data.image_size
            inputs = {
                "pixel_values": torch.zeros(1, 3, side, side, device=engine.device, dtype=engine.dtype),
                "input_ids": torch.zeros(1, 8, dtype=torch.int64, device=engine.device),
                "attention_mask": torch.ones(1, 8, dtype=torch.int64, device=engine.device),
            }
        with torch.no_grad():
            out = engine(**inputs)
        dim, temperature = out.image_embeds.shape[1], float(out.temperature)
        if batch is not None:
            parts.append((out.image_embeds.float().cpu(), out.text_embeds.float().cpu(), batch.text_ids.cpu()))
    group = topology.slot_group if topology.plan.ranks_per_slot > 1 else None
    if (problem := first_text(fault, group, topology.device)) is not None:
        raise DataError(problem)
    empty = torch.zeros(0, dim)
    image, text, ids = (
        (torch.cat(column) for column in zip(*parts, strict=True))
        if parts
        else (empty, empty, torch.zeros(0, dtype=torch.int64))
    )
    if topology.plan.ranks_per_slot == 1:
        return Embedded(image, text, ids, temperature)
    image, text, ids = (gather_uneven(x.to(engine.device), topology.slot_group).cpu() for x in (image, text, ids))
    return Embedded(image, text, ids, temperature)


def measure_loss(
    engine: Engine, data: ClientData, objective: Objective, config: Config, topology: Topology, draw: int | None
) -> Loss:
    """L_i of equation (4): the mean loss of a sample's pairs, in batches of dro.evaluation_batch_size for every client.

    The anchor term is not part of it; what chance gives is objective.chance(batch size). The sample has
    dro.evaluation_pairs pairs, or as many whole batches as the client has. Collective over the slot; equal on its ranks.
    """
    batch = config.dro.evaluation_batch_size
    num_pairs = min(config.dro.evaluation_pairs, data.num_samples) // batch * batch
    sample = embed(engine, data, num_pairs, config, topology, draw)
    losses = []
    for i in range(0, num_pairs, batch):
        part = Features(sample.image[i : i + batch], sample.text[i : i + batch], temperature=sample.temperature)
        losses.append(objective.per_pair(part, sample.text_ids[i : i + batch]))
    return Loss.of(torch.cat(losses))


def retrieval(sample: Embedded) -> dict[str, float]:
    """Recall@k both ways beside its chance level, identical reports counted as positives: `ranking.recall_table`."""
    return recall_table(ranks(sample.image.numpy(), sample.text.numpy(), sample.text_ids.numpy()))
