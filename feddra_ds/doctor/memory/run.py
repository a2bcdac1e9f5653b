"""The run in miniature behind `plan_memory`: build, stages, evaluation and final model, as amounts in two ledgers.

Legend: P elements of the model, T of them trained, W ranks of a slot, b bytes of a working weight, m pairs of a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from feddra_ds.common.tree import get_path
from feddra_ds.config.schema import Config
from feddra_ds.doctor.memory.layout import Layout
from feddra_ds.doctor.memory.ledger import Blocks, Ledger, blocks
from feddra_ds.doctor.memory.trace import Event, Pass, Sizes, StepTracer
from feddra_ds.engine.optimizer import bucket_elements
from feddra_ds.engine.parts import PARTS
from feddra_ds.federation.schedule import Stage, stages_of_round
from feddra_ds.strategies import build as build_strategy

ZERO_0_BUCKET = 500_000_000  # elements; DeepSpeed's own constant, no key changes it


class Miniature:
    """Runs once; `host` and `device` then hold the highest points by phase. On a CPU they are one ledger."""

    def __init__(self, config: Config, layout: Layout, tracer: StepTracer, step_factor: int, baseline: int):
        self.config, self.layout, self.tracer, self.step_factor = config, layout, tracer, step_factor
        self.host = Ledger(keeps=True)
        self.device = self.host if layout.device == "cpu" else Ledger(keeps=False)
        self.optimizer = self.host if layout.offloads_optimizer else self.device
        self.strategy = build_strategy(config.strategy, config.dro)
        self.has_anchors = config.objective.anchor_weight > 0 or self.strategy.adds_loss
        zero = config.deepspeed.get("zero_optimization") or {}
        self.bucket = bucket_elements(config.deepspeed, layout.trained)
        self.prefetch = int(float(zero.get("stage3_prefetch_bucket_size", 5e7)))
        self.max_live = int(float(zero.get("stage3_max_live_parameters", 1e9)))
        self.persistent = int(float(zero.get("stage3_param_persistence_threshold", 1e5)))
        self.overlaps = bool(zero.get("overlap_comm", layout.zero_stage == 3))
        accumulated = get_path(config.deepspeed, "data_types.grad_accum_dtype")
        self.accumulated_width = {"fp32": 4, "bf16": 2, "fp16": 2}.get(str(accumulated), layout.width)
        per_rank = max(1, config.data.batch_size // layout.ranks)
        self.rows = min(per_rank, config.data.micro_batch_size or per_rank)
        self.per_rank, self.micro_batches = per_rank, math.ceil(per_rank / self.rows)
        self.saved = Blocks()  # what a checkpoint of this rank holds
        self._passes: dict[tuple[str, int], list[Event]] = {}
        self._has_moments: set[str] = set()
        self.begin("build")
        self.host.hold("python, torch, deepspeed", Blocks(0, baseline))

    def begin(self, phase: str) -> None:
        self.host.begin(phase)
        if self.device is not self.host:
            self.device.begin(phase)

    def run(self) -> None:
        """Build, two rounds (the next ones are like the second), evaluation, the final model."""
        self.build()
        for round_index in range(2):  # the second round starts with what the first one left behind
            for stage in stages_of_round(self.config, 0, self.step_factor):
                self.begin(stage.name)
                self.stage(stage)
            if round_index == 0:  # on a slow disk it is there for the whole of the next round
                self.host.hold("checkpoint that is being written", self.saved)
        self.host.drop("checkpoint that is being written")
        self.begin("evaluate")
        self.embed(self.evaluation_rows())
        self.begin("model")
        self.final_model()

    # ---- building
    def build(self) -> None:
        """As run/build.py does: weights come one by one into the engine, then the server takes its copy."""
        lay = self.layout
        self.weights()
        self.masters()
        if lay.zero_stage == 0 and lay.width < 4:  # DeepSpeed's constructor takes an optimizer step
            self.moments(PARTS)
            self.optimizer.pulse("gradients of DeepSpeed's own first step", lay.each(PARTS, 4 + lay.width))
        if self.has_anchors:
            self.hold_twin("frozen aligner (θ_g)", lay.aligner)
            if self.config.objective.anchors == "resident":
                self.hold_twin("frozen model (anchors=resident)", lay.every)
        for _ in range(1 if self.strategy.averages else lay.clients):
            self.hold_saved("server: global model", lay.state(PARTS))
        self.hold_saved("server: frozen weights that it moves", lay.moved_frozen())
        if self.config.aggregate.precision != "fp32" and self.strategy.averages:
            self.hold_saved("server: residuals", lay.state(PARTS))
        if self.config.aggregate.ema is not None:
            self.hold_saved("server: average over rounds", lay.state(PARTS))
        for _ in range(self.strategy.num_outer):
            self.hold_saved("server: what the strategy keeps", lay.state(PARTS))
        for _ in range(self.strategy.num_kept * lay.clients):
            self.hold_saved("clients: what the strategy keeps", lay.state(PARTS))

    def hold_saved(self, name: str, amount: Blocks) -> None:
        """What lies on the host from here on, and in every checkpoint."""
        self.host.hold(name, amount)
        self.saved += amount

    def hold_twin(self, name: str, sizes: Iterable[int]) -> None:
        self.device.hold(name, blocks(n * self.layout.width for n in sizes))

    def weights(self) -> None:
        """The working weights. ZeRO 1 and 2 flatten what trains, and hold both for a moment."""
        lay = self.layout
        whole = blocks(n * lay.width for n in lay.every)
        if lay.zero_stage == 3:
            place = self.host if lay.offloads_weights else self.device
            place.hold("weights", blocks([math.ceil(lay.total / lay.ranks) * lay.width]))
            self.device.hold("weights", blocks(n * lay.width for n in lay.every if n <= self.persistent))
        elif lay.zero_stage:
            frozen = lay.total - lay.trained
            self.device.hold("weights before they are flattened", whole)
            self.device.hold(
                "weights", blocks(sum(sizes) * lay.width for _, sizes in lay.groups) + Blocks(frozen * lay.width, 0)
            )
            self.device.drop("weights before they are flattened")
        else:
            self.device.hold("weights", whole)

    def masters(self) -> None:
        """fp32 masters, where they are not the weights themselves, and what ZeRO 3 keeps from the start."""
        lay = self.layout
        if lay.zero_stage in (1, 2) or lay.width < 4 or (lay.zero_stage == 3 and lay.offloads_optimizer):
            self.optimizer.hold("fp32 masters", lay.state(PARTS))
        if lay.offloads_optimizer:
            self.host.hold("offload: gradients", lay.flat(PARTS, 4))
            if lay.zero_stage < 3:
                self.host.hold("offload: weights on their way", lay.flat(PARTS, lay.width))
        if lay.zero_stage == 3:
            self.optimizer.hold(
                "gradient partitions", blocks([math.ceil(lay.trained / lay.ranks) * self.accumulated_width])
            )
            self.reserve_bucket()
            if not lay.offloads_optimizer:
                self.device.pulse("gradient buffer of the first step", blocks([lay.largest_group * 4]))

    def reserve_bucket(self) -> None:
        """The flat buffer of gradients on their way; a CPU's is counted as it is filled, see Gradients."""
        if self.device is not self.host:
            twice = 2 if self.overlaps and self.layout.zero_stage < 3 else 1
            self.device.hold("gradient bucket", blocks([self.bucket * self.layout.width] * twice))

    # ---- a round
    def stage(self, stage: Stage) -> None:
        """One stage of every client of the slot, and the average."""
        c, lay, host = self.config, self.layout, self.host
        has_own_aligners = any(one.hands_on_aligner for one in stages_of_round(c, 0))
        if stage.averages and self.strategy.averages:
            host.hold("server: running sum", lay.state(stage.parts))
            if self.strategy.takes_snapshot:  # the sum of the clients', and that of the client that trains
                host.hold("snapshot", lay.state(stage.parts))
                host.hold("snapshot", lay.state(stage.parts))
        for _ in range(lay.clients):
            host.hold(
                "data: batches decoded ahead", blocks([self.pixels(c.data.prefetch * max(1, c.data.num_workers))])
            )
            if stage.trains_backbone and has_own_aligners:
                host.shrink("clients' own aligners", lay.state(["aligner"]))
            self.replay(stage)
            self.steps(stage)
            if stage.keeps_aligner:
                host.hold("clients' own aligners", lay.state(["aligner"]))
            host.drop("data: batches decoded ahead", "data: batches kept for the replay")
        host.drop("server: running sum", "snapshot")
        if not has_own_aligners:
            host.drop("clients' own aligners")  # they waited for p alone

    def pixels(self, batches: int) -> int:
        return batches * self.per_rank * 3 * self.config.data.image_size**2

    def replay(self, stage: Stage) -> None:
        """Batches that are embedded before a stage's steps: for anchors, or under a client's own last model."""
        replays_anchors = stage.trains_backbone and self.has_anchors and self.config.objective.anchors == "replay"
        if replays_anchors or self.strategy.adds_loss:
            kept = min(self.pixels(stage.num_steps), self.config.data.replay_cache_bytes)
            self.host.hold("data: batches kept for the replay", blocks([kept]))
            self.embed(self.rows)

    def evaluation_rows(self) -> int:
        c = self.config
        pairs = max(c.dro.evaluation_pairs, c.evaluation.max_pairs if c.evaluation.every > 0 else 0)
        return min(c.evaluation.batch_size, math.ceil(pairs / self.layout.ranks))

    def embed(self, rows: int) -> None:
        """A forward without graph."""
        self.gather()
        self.device.replay(self.events("embed", rows))
        self.device.drop("gathered parameters", "gather buffer")

    def steps(self, stage: Stage) -> None:
        """A stage's steps. Two are enough: the second one starts with all that the first one left in memory."""
        which: Pass = "stage2" if stage.trains_backbone else "stage1"
        for _ in range(min(2, stage.num_steps)):
            self.gather()
            if self.micro_batches > 1:
                self.device.replay(self.events("embed", self.rows))
            loss = self.loss()
            self.device.hold("loss", loss)
            gradients = Gradients(self)
            for _ in range(min(2, self.micro_batches)):
                gradients.begin()
                self.device.replay(self.events(which, self.rows), gradients.produced)
                gradients.reduce()
            self.device.drop("loss", "gathered parameters", "gather buffer")
            self.moments(stage.parts)
            gradients.step()

    def events(self, which: Pass, rows: int) -> list[Event]:
        if (which, rows) not in self._passes:
            data = self.config.data
            sizes = Sizes(rows, data.image_size, data.text_length)
            self._passes[which, rows] = self.tracer.run(which, sizes, anchors=self.has_anchors)
        return self._passes[which, rows]

    def gather(self) -> None:
        """ZeRO 3: whole parameters while they are used. DeepSpeed keeps them up to stage3_max_live_parameters."""
        lay = self.layout
        if lay.zero_stage < 3 or lay.ranks == 1:
            return
        live = min(lay.total, self.max_live) / lay.total
        held = blocks(n * lay.width for n in lay.every)
        self.device.hold("gathered parameters", Blocks(int(held.small * live), int(held.large * live)))
        copies = 2 if self.device is self.host else 1  # gloo gathers into a buffer of its own
        self.device.hold("gather buffer", blocks([min(self.prefetch, lay.total) * lay.width] * copies))

    def loss(self) -> Blocks:
        """Embeddings, anchors and gradients of the whole batch, the other ranks' texts, and the tiles of the loss."""
        dim, whole = self.config.model.embedding_dim, self.per_rank * self.layout.ranks
        tile = 4 * min(512, self.per_rank) * min(2048, self.per_rank) * 4
        return Blocks(4 * dim * (8 * self.per_rank + 2 * whole) + tile, 0)

    def moments(self, parts: Iterable[str]) -> None:
        """The optimizer's state, which comes with a part's first step and stays."""
        new = set(parts) - self._has_moments
        self._has_moments |= new
        options = self.config.optimizer
        copies = int(options.momentum > 0) if options.name == "sgd" else 2  # muon has one of matrices: a bound
        for _ in range(copies):
            self.optimizer.hold("optimizer state", self.layout.state(new))

    def final_model(self) -> None:
        """The coordinator writes model/ tensor by tensor, out of the checkpoint's file, which is mapped into memory."""
        self.host.hold("checkpoint file, mapped", Blocks(0, 4 * self.layout.trained))
        self.host.hold("one tensor on its way", blocks([4 * max(self.layout.every)]))


class Gradients:
    """Where the gradients of one optimizer step are, from the backward pass to the step."""

    def __init__(self, run: Miniature):
        self.run, self.layout, self.device = run, run.layout, run.device
        self.produced_bytes = 0
        self.passes = 0

    def begin(self) -> None:
        """A backward pass begins."""
        if self.layout.zero_stage in (1, 2):
            self.run.reserve_bucket()

    def produced(self, num_bytes: int) -> None:
        """One parameter's gradient is done."""
        if self.layout.zero_stage < 2:  # it stays with its parameter until the backward pass is over
            if self.passes == 0:
                self.device.hold("gradients", blocks([num_bytes]))
            return
        self._fill(num_bytes)

    def _fill(self, num_bytes: int) -> None:
        limit = self.run.bucket * self.layout.width
        self.produced_bytes = min(limit, self.produced_bytes + num_bytes)
        grown = self.produced_bytes - self.device.held("gradient bucket")
        if self.device is self.run.host and grown > 0:
            self.device.hold("gradient bucket", Blocks(0, grown))

    def reduce(self) -> None:
        """The backward pass is over: gradients are summed over the ranks, each keeps its share."""
        lay, device = self.layout, self.device
        self.passes += 1
        last = self.passes == min(2, self.run.micro_batches)
        if lay.zero_stage == 0:
            if last:
                device.drop("gradients")
                device.hold("gradients", lay.each(PARTS, lay.width))  # zeros for what did not train
                device.pulse("all-reduce buffer", blocks([min(lay.trained, ZERO_0_BUCKET) * lay.width]))
            return
        if lay.zero_stage == 1 and last:
            self._fill(lay.trained * lay.width)
            device.drop("gradients")
        if lay.ranks > 1 and (lay.zero_stage > 1 or last):
            device.pulse("all-reduce buffer", blocks([min(lay.trained, self.run.bucket) * lay.width]))
        if lay.zero_stage < 3 and not lay.offloads_optimizer and not device.held("gradients"):
            device.hold("gradients", lay.flat(PARTS, self.run.accumulated_width))
        if lay.zero_stage < 3:
            device.drop("gradient bucket")
        self.produced_bytes = 0

    def step(self) -> None:
        """The optimizer's step, and the gradients gone."""
        lay = self.layout
        group = math.ceil(lay.largest_group / lay.ranks)
        if lay.zero_stage == 0:
            if lay.width < 4:
                self.device.hold("fp32 gradients", lay.each(PARTS, 4))
        elif not lay.offloads_optimizer:
            sizes = [group * lay.width] + ([group * 4] if lay.width < 4 else [])
            self.device.hold("fp32 gradients", blocks(sizes))
        self.device.drop("fp32 gradients", "gradients")
