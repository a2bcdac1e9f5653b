"""What a round costs, before it is run: bytes between peers, seconds on the links, and the rest from a run that was measured.

The bytes are those of the server's averages (federation/aggregation): what a rank hands to collectives, which metrics.jsonl
counts as bytes_sent_per_rank, and what of it crosses from host to host. Left out: messages' own bytes (kilobytes), the
embeddings that peers gather where evaluation is due, and the steps of a slot that lies on several hosts.

Over a link of some latency a collective takes longer than its bytes: gloo (gloo/allreduce.cc, transport/tcp/pair.cc) cuts what
it sums into segments of at most 1 MiB, has two of them under way, and sends one when its receiver has said that it is ready for
it; and a TCP connection that has rested begins with ten packets and doubles them each round trip (RFC 6928, RFC 5681).
NCCL is taken to do alike.

Legend: S slots, W ranks of a slot, n elements of a slice, F elements of all factors of the adapters.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from feddra_ds import strategies
from feddra_ds.common.errors import ConfigError
from feddra_ds.config.load import load
from feddra_ds.config.schema import Config
from feddra_ds.distributed.plan import Plan, plan
from feddra_ds.engine.optimizer import parameter_groups
from feddra_ds.federation.aggregation import compression
from feddra_ds.federation.aggregation.lora_rules import RULES
from feddra_ds.federation.schedule import Stage, stages_of_round
from feddra_ds.model import lora, lora_options
from feddra_ds.model.dual_encoder import DualEncoder
from feddra_ds.run.metrics_file import read_metrics

_SEGMENT = 1 << 20  # gloo's kMaxSegmentSize
_UNDER_WAY = 2
_FIRST_WINDOW = 10 * 1460


@dataclass(frozen=True)
class Link:
    """What connects the hosts: bytes a second that a host sends, and seconds one way."""

    bytes_per_s: float
    latency_s: float


@dataclass(frozen=True)
class Collective:
    """One sum or exchange over the peers, as one rank sees it.

    handed: bytes that it hands over (bytes_sent_per_rank). on_ring: bytes that it sends to the next peer of a ring; to_each:
    to each of the other peers. hops: how many messages, or pairs of segments that are under way together, wait for one another,
    a round trip each.
    """

    handed: int
    on_ring: int = 0
    to_each: int = 0
    hops: int = 0


@dataclass(frozen=True)
class Average:
    """The average after a stage. handed: bytes of a rank. crossing: bytes that the busiest host sends. seconds: of a link."""

    stage: str
    handed: int
    crossing: int
    seconds: float


@dataclass(frozen=True)
class Rates:
    """What a run was measured at: pairs a second of a slot by stage, seconds of a client's evaluation and of a checkpoint."""

    ranks_per_slot: int
    pairs_per_s: dict[str, float]
    evaluate_s: float
    checkpoint_s: float


@dataclass(frozen=True)
class RoundCost:
    """A round. seconds: by what takes them; those of stages, evaluation and checkpoint only where rates are known."""

    averages: list[Average]
    seconds: dict[str, float]

    @property
    def bytes_sent_per_rank(self) -> int:
        return sum(average.handed for average in self.averages)


class Slices:
    """The elements of a rank's slices, of a model on the meta device."""

    def __init__(self, config: Config, model: DualEncoder, ranks_per_slot: int):
        adapter = lora_options.parse(config.model.adapter)
        apart = adapter is not None and adapter.aggregation == "alternate"
        decay = (config.optimizer.weight_decay, config.optimizer.decay_all)
        self.ranks = ranks_per_slot
        self.zero_stage = int((config.deepspeed.get("zero_optimization") or {}).get("stage") or 0)
        self.rule = None if adapter is None else RULES.get(adapter.aggregation)
        self._groups = [
            (group["part"], group["factor"], [p.numel() for p in group["params"]])
            for group in parameter_groups(model, *decay, factors_apart=apart)
        ]
        trained = {name: p.numel() for name, p in model.named_parameters()}
        self.factors = sum(trained[name] for layer in lora.pairs(list(trained)) for name in layer)
        self.buffers = [b.numel() * b.element_size() for name, b in model.state_dict().items() if name not in trained]

    def of(self, part: str, resting: str | None, *, padded: bool) -> int:
        """n of a part, without the groups of a factor that rests. padded: with what DeepSpeed fills up with."""
        groups = [
            sizes for name, factor, sizes in self._groups if name == part and (resting is None or factor != resting)
        ]
        return sum(self._share(sizes, padded) for sizes in groups)

    def _share(self, sizes: Sequence[int], padded: bool) -> int:
        if self.zero_stage == 0:
            return sum(sizes)
        if self.zero_stage == 3:  # each parameter is cut by itself
            return sum(math.ceil(n / self.ranks) for n in sizes)
        whole = sum(sizes)
        aligned = math.ceil(whole / (2 * self.ranks)) * 2  # DeepSpeed aligns each rank's part to two elements
        return aligned if padded else min(aligned, whole)


def collectives(config: Config, slices: Slices, layout: Plan, stage: Stage, device: str) -> Iterator[Collective]:
    """Those of the average after a stage, of the rank that hands over most."""
    slots, codec = layout.num_slots, config.aggregate
    by_codec = compression.codec_of(codec.precision, codec.block_size, codec.sparsity)
    uses_rule = slices.rule is not None and stage.trains_backbone
    if uses_rule:
        yield from _factors(config, slices, layout)
    if slots == 1:
        return
    for snapshot in (False, True)[: 1 + (stage.snapshot is not None)]:
        resting = None if snapshot else stage.resting_factor
        parts = [part for part in stage.parts if not (uses_rule and not snapshot and part == "backbone")]
        if by_codec is None or (uses_rule and not snapshot):
            for part in parts:
                yield _all_reduce(4 * slices.of(part, resting, padded=True), slots)
        else:
            num = sum(slices.of(part, resting, padded=False) for part in parts)
            bucket = compression.BUCKET_ELEMENTS[device]
            for start in range(0, num, bucket):
                yield _encoded(min(bucket, num - start), slots, by_codec)
        for buffer in slices.buffers:
            yield _all_reduce(buffer, slots)


def _all_reduce(num_bytes: int, slots: int) -> Collective:
    """A ring: each rank sends 2 (S − 1) parts of n / S, each in two segments or more."""
    segments = max(_UNDER_WAY, math.ceil(num_bytes / (slots * _SEGMENT)))
    hops = 2 * (slots - 1) * math.ceil(segments / _UNDER_WAY)
    return Collective(num_bytes, on_ring=math.ceil(2 * (slots - 1) * num_bytes / slots), hops=hops)


def _encoded(num: int, slots: int, codec: compression.DeltaCodec) -> Collective:
    """CompressedSum: a chunk to each peer, then the sum of one's own chunk around the ring."""
    row = codec.num_bytes(math.ceil(num / (slots * codec.granularity)) * codec.granularity)
    return Collective(slots * row, on_ring=(slots - 1) * row, to_each=row, hops=1 + (slots - 1))


def _factors(config: Config, slices: Slices, layout: Plan) -> Iterator[Collective]:
    """FactorSum: the factors of all clients of a slot travel whole, to the slot's ranks and to every peer."""
    slots, row = layout.num_slots, 4 * slices.factors
    rows, inside = row * len(layout.clients_of(0)), layout.ranks_per_slot > 1
    if inside and slices.zero_stage > 0:
        yield Collective(rows)
    if slots > 1:
        yield Collective(rows, on_ring=(slots - 1) * rows, hops=slots - 1)
    rule = lora_options.parse(config.model.adapter)
    if rule is not None and rule.aggregation == "product":  # each layer is factored on one rank
        if slots > 1:
            yield _all_reduce(row, slots)
        if inside:
            yield Collective(row)


def seconds_of(part: Collective, link: Link, ring: int, pairs: int) -> float:
    """What a collective takes on the busiest host's link; ring, pairs: as `crossings` counts them."""
    if not ring or not part.hops:
        return 0.0
    crossing, trip = ring * part.on_ring + pairs * part.to_each, 2 * link.latency_s
    wire = crossing / link.bytes_per_s
    burst = (part.on_ring + part.to_each) / part.hops  # what a rank sends to another at a time
    rounds = max(0, math.ceil(math.log2(1 + burst / _FIRST_WINDOW)) - 1)
    return wire + (part.hops + rounds) * trip


def crossings(layout: Plan, hosts: Sequence[str]) -> tuple[int, int]:
    """Of the busiest host: the ranks whose next peer in the ring is elsewhere, and the pairs of peers of which one is.

    hosts: of each rank.
    """
    ring, pairs = dict.fromkeys(hosts, 0), dict.fromkeys(hosts, 0)
    for slot_rank in range(layout.ranks_per_slot):
        where = [hosts[rank] for rank in layout.peers_of(slot_rank)]
        for index, host in enumerate(where):
            ring[host] += host != where[(index + 1) % len(where)]
        for host in set(where):
            pairs[host] += where.count(host) * (len(where) - where.count(host))
    return max(ring.values()), max(pairs.values())


def round_cost(
    config: Config,
    model: DualEncoder,
    layout: Plan,
    hosts: Sequence[str],
    link: Link,
    *,
    rates: Rates | None = None,
    step_factor: int = 1,
    device: str = "cpu",
) -> RoundCost:
    """A round of a config on these hosts (a name for each rank). model: of this config, on the meta device.

    step_factor: Strategy.step_factor. A round is as slow as its slowest slot, which hosts most clients. Raises ConfigError
    where the rates are of slots of another number of ranks.
    """
    strategy = strategies.build(config.strategy, config.dro)
    slices = Slices(config, model, layout.ranks_per_slot)
    ring, pairs = crossings(layout, hosts)
    averages: list[Average] = []
    seconds: dict[str, float] = {}
    stages = stages_of_round(config, 0, step_factor, takes_snapshot=strategy.takes_snapshot)
    for stage in stages:
        if not (stage.averages and strategy.averages):
            continue
        parts = list(collectives(config, slices, layout, stage, device))
        crossing = sum(ring * part.on_ring + pairs * part.to_each for part in parts)
        seconds_on_links = sum(seconds_of(part, link, ring, pairs) for part in parts)
        averages.append(Average(stage.name, sum(part.handed for part in parts), crossing, seconds_on_links))
    if (
        len(set(hosts)) > 1
    ):  # a report and an answer after each stage, and twice at the round's end, each there and back
        seconds["messages"] = 4 * link.latency_s * (len(stages) + 2)
    seconds["averages"] = sum(average.seconds for average in averages)
    if rates is not None:
        seconds = _measured(config, layout, rates, stages) | seconds
    return RoundCost(averages, seconds)


def _measured(config: Config, layout: Plan, rates: Rates, stages: Sequence[Stage]) -> dict[str, float]:
    if rates.ranks_per_slot != layout.ranks_per_slot:
        raise ConfigError(
            [
                f"--measured: that run's slots had {rates.ranks_per_slot} ranks, and these would have "
                f"{layout.ranks_per_slot}; measure a short run with topology.ranks_per_slot={layout.ranks_per_slot}"
            ]
        )
    if missing := [stage.name for stage in stages if stage.name not in rates.pairs_per_s]:
        raise ConfigError([f"--measured: that run had no {missing[0]}; measure one of the same schedule"])
    hosted = len(layout.clients_of(0))
    clients = min(hosted, config.clients.per_round or hosted)  # all that are drawn may be of one slot
    pairs = {stage.name: clients * stage.num_steps * config.data.batch_size for stage in stages}
    seconds = {name: num / rates.pairs_per_s[name] for name, num in pairs.items()}
    return seconds | {"evaluate": hosted * rates.evaluate_s, "checkpoint": rates.checkpoint_s}


def rates_of(run: Path) -> Rates:
    """What a finished run was measured at: the median of its rounds, without the first where there are more.

    Raises ConfigError where the folder is no run's, or has no rounds.
    """
    if not (run / "config.yaml").is_file():
        raise ConfigError([f"--measured: {run} is not the folder of a run; it has no config.yaml"])
    config, lines = load(run / "config.yaml"), read_metrics(run / "metrics.jsonl")
    lines = lines[1:] or lines
    if not lines:
        raise ConfigError([f"--measured: {run} has no rounds yet"])
    strategy, ids = strategies.build(config.strategy, config.dro), lines[-1]["client_ids"]
    layout = plan(len(lines[-1]["peak_memory_bytes"]), len(ids), config.topology.ranks_per_slot)
    clients = len(layout.clients_of(0))
    median = lambda name: statistics.median(line["stage_seconds"][name] for line in lines)
    pairs = {
        stage.name: clients * stage.num_steps * config.data.batch_size
        for stage in stages_of_round(config, 0, strategy.step_factor(len(ids)))
    }
    per_second: dict[str, float] = {name: num / max(median(name), 1e-9) for name, num in pairs.items()}
    return Rates(layout.ranks_per_slot, per_second, median("evaluate") / clients, median("checkpoint"))
