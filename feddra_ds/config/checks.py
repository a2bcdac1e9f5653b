"""Contradictions between keys, each valid on its own."""

from __future__ import annotations

import re

from feddra_ds.common.tree import get_path
from feddra_ds.config.schema import Config

# Keys of DeepSpeed's config that would break the federation silently: (path, what to do instead).
REFUSED_DEEPSPEED_KEYS: dict[str, str] = {
    "scheduler": "overwrites the stage's learning rates, unfreezing the backbone; use schedule.warmup_rounds and schedule.decay",
    "optimizer": "set the optimizer section instead: stages need its two parameter groups",
    "zero_optimization.round_robin_gradients": "permutes the partitions that peers average; remove it",
    "tensorboard": "would write once per slot; use run.trackers: [tensorboard]",
    "wandb": "would write once per slot; use run.trackers: [wandb], run.project and run.name",
    "csv_monitor": "would write once per slot; use metrics.jsonl, or run.trackers",
    "comet": "would write once per slot; use run.trackers: [comet_ml], run.project and run.name",
    "train_batch_size": "set data.batch_size",
    "train_micro_batch_size_per_gpu": "set data.batch_size and data.micro_batch_size",
    "gradient_accumulation_steps": "set data.micro_batch_size",
}

# Keys with which DeepSpeed would let a gradient that is not finite into the weights.
NEEDED_DEEPSPEED_KEYS = ("bf16.check_grad_overflow", "zero_optimization.compute_grad_norm")


def contradictions(config: Config) -> list[str]:
    """Problems between keys, each valid on its own. One line each, the key first."""
    c, out = config, []
    out += _where_data_are(c)
    if c.schedule.stage1_steps + c.schedule.stage2_steps == 0:
        out.append("schedule.stage2_steps: both stages have 0 steps, so nothing would train")
    if c.schedule.warmup_rounds >= c.schedule.rounds:
        out.append(
            f"schedule.warmup_rounds: {c.schedule.warmup_rounds} leaves none of the {c.schedule.rounds} rounds after the warm-up"
        )
    if c.clients.ids is not None:
        if not c.clients.ids:
            out.append("clients.ids: is empty; null takes all clients under data.root")
        repeated = sorted({i for i in c.clients.ids if c.clients.ids.count(i) > 1})
        if repeated:
            out.append(f"clients.ids: {', '.join(repeated)} named more than once")
        if c.clients.minimum > max(1, len(c.clients.ids)):
            out.append(
                f"clients.minimum: {c.clients.minimum} is more than the {len(c.clients.ids)} clients in clients.ids"
            )
    if c.clients.per_round is not None and c.clients.per_round < c.aggregate.fewest_clients:
        out.append(few_to_compare(c, c.clients.per_round, "clients.per_round"))
    if c.clients.per_round is not None and c.clients.minimum > c.clients.per_round:
        out.append(f"clients.minimum: {c.clients.minimum} is more than clients.per_round = {c.clients.per_round}")
    if c.data.micro_batch_size is not None and (key := c.model.head.batchnorm_key):
        out.append(f"data.micro_batch_size: splits the batch that {key}=batchnorm takes statistics over; use layernorm")
    weights = c.dro.fixed_weights
    if weights is not None:
        if min(weights, default=-1.0) < 0 or abs(sum(weights) - 1) > 1e-6:
            out.append(f"dro.fixed_weights: must be ≥ 0 and sum to 1, got {weights}")
        if c.clients.ids is not None and len(weights) != len(c.clients.ids):
            out.append(f"dro.fixed_weights: {len(weights)} weights for {len(c.clients.ids)} clients")
    if c.data.batch_size < 2:
        out.append(
            f"data.batch_size: must be 2 or more, as the other pairs of a batch are the negatives (got {c.data.batch_size})"
        )
    if c.dro.evaluation_pairs < c.dro.evaluation_batch_size:
        out.append(
            f"dro.evaluation_pairs: {c.dro.evaluation_pairs} does not fill one batch of dro.evaluation_batch_size = "
            f"{c.dro.evaluation_batch_size}; raise the one, or lower the other"
        )
    if (c.dro.loss == "excess") != (c.dro.reference is not None):
        out.append(
            "dro.reference: goes with dro.loss=excess, which needs it: the folder of a run of strategy.name=local"
        )
    if c.dro.loss == "excess" and c.dro.evaluate_on == "anchors":
        out.append("dro.loss: excess needs losses of the same pairs under two models; use dro.evaluate_on=val")
    if c.dro.evaluate_on == "anchors":
        if c.objective.anchor_weight == 0 or c.schedule.stage1_steps == 0:
            out.append("dro.evaluate_on: anchors needs objective.anchor_weight > 0 and schedule.stage1_steps > 0")
        if not c.aggregate.after_stage1:
            out.append(
                "dro.evaluate_on: anchors moves p at the aggregation after stage 1, so aggregate.after_stage1 must be true"
            )
        if c.data.batch_size < c.dro.evaluation_batch_size:
            out.append(
                f"dro.evaluation_batch_size: {c.dro.evaluation_batch_size} is more than data.batch_size = {c.data.batch_size}, "
                "whose batches dro.evaluate_on=anchors reads the losses off"
            )
        if c.objective.anchor_mode == "train":
            out.append(
                "dro.evaluate_on: anchors needs objective.anchor_mode=eval, the mode in which losses are comparable"
            )
        if c.dro.apply != "aggregate":
            out.append(f"dro.evaluate_on: anchors gives p too late for dro.apply={c.dro.apply}; use val")
    if c.aggregate.holds_updates and c.aggregate.precision != "fp32":
        key = "min_cosine" if c.aggregate.rule == "mean" else f"rule={c.aggregate.rule}"
        out.append(
            f"aggregate.precision: {c.aggregate.precision} rounds the sum of a slot's updates, and aggregate.{key} needs each "
            "client's own; use fp32"
        )
    if c.aggregate.sparsity is not None and c.aggregate.precision not in ("int4", "int2"):
        out.append(
            f"aggregate.precision: {c.aggregate.precision} does not go with aggregate.sparsity; use int2, int4 or no sparsity"
        )
    if c.aggregate.sparsity is None and c.aggregate.precision == "int2":
        out.append("aggregate.precision: int2 needs aggregate.sparsity, as 0.05; without it use int4")
    rule = (c.model.adapter or {}).get("aggregation") or "factors"
    if c.aggregate.ema is not None and rule not in ("factors", "freeze_a"):
        out.append(
            f"aggregate.ema: averages factors, which is no model's average where model.adapter.aggregation={rule}; use factors "
            "or freeze_a, or null"
        )
    both_stages = c.schedule.stage1_steps > 0 and c.schedule.stage2_steps > 0
    if both_stages and c.schedule.stage2_start == "global" and not c.aggregate.after_stage1:
        out.append(
            "schedule.stage2_start: global with aggregate.after_stage1=false would throw stage 1 away, as no average is there "
            "to start from; set one of them back, or schedule.stage1_steps to 0"
        )
    for name, encoder in (("vision", c.model.vision), ("text", c.model.text)):
        if encoder.pretrained is not None and encoder.config is not None:
            out.append(f"model.{name}.config: contradicts model.{name}.pretrained; give one of them")
        if encoder.num_layers is not None and encoder.pretrained is None:
            out.append(
                f"model.{name}.num_layers: cuts the encoder of model.{name}.pretrained, which is null; "
                f"set num_hidden_layers in model.{name}.config"
            )
    augment = c.data.augment
    if augment.method == "pad_crop" and augment.resize < c.data.image_size:
        out.append(f"data.augment.resize: {augment.resize} is less than data.image_size = {c.data.image_size}")
    for path, advice in REFUSED_DEEPSPEED_KEYS.items():
        if get_path(c.deepspeed, path) not in (None, False):
            out.append(f"deepspeed.{path}: {advice}")
    for path in NEEDED_DEEPSPEED_KEYS:
        if get_path(c.deepspeed, path) is False:
            out.append(f"deepspeed.{path}: false would let a gradient that is not finite into the weights; remove it")
    stage = get_path(c.deepspeed, "zero_optimization.stage")
    if stage not in (None, 0, 1, 2, 3):
        out.append(f"deepspeed.zero_optimization.stage: must be 0, 1, 2 or 3, got {stage!r}")
    if c.optimizer.name == "muon" and get_path(c.deepspeed, "zero_optimization.offload_optimizer.device") in (
        "cpu",
        "nvme",
    ):
        out.append(
            "deepspeed.zero_optimization.offload_optimizer: optimizer.name=muon makes whole matrices of the ranks' slices, "
            "which must be on the device; leave it out, or take optimizer.name=adamw"
        )
    if c.optimizer.name == "muon" and stage == 3:
        out += [
            f"deepspeed.{kind}.enabled: optimizer.name=muon at ZeRO 3 is tested in fp32 alone; take "
            "deepspeed.zero_optimization.stage 2, or optimizer.name=adamw"
            for kind in ("bf16", "fp16")
            if get_path(c.deepspeed, f"{kind}.enabled")
        ]
    if c.optimizer.name == "muon" and c.model.adapter is not None:
        out.append(
            "model.adapter: its factors are halves of matrices, and optimizer.name=muon is for whole ones; take adamw"
        )
    if getattr(c.objective, "bf16_products", False) and not get_path(c.deepspeed, "bf16.enabled"):
        out.append("objective.bf16_products: needs a model that computes in bf16; set deepspeed.bf16.enabled, or false")
    if get_path(c.deepspeed, "bf16.enabled") and get_path(c.deepspeed, "fp16.enabled"):
        out.append("deepspeed.fp16.enabled: contradicts deepspeed.bf16.enabled; give one of them")
    return out


def few_to_compare(c: Config, num_clients: int, who: str) -> str:
    """The line for too few clients in a round for the section `aggregate`."""
    a = c.aggregate
    key = "min_cosine" if a.rule == "mean" else "rule"
    why = ", 2 aggregate.num_bad + 3" if a.rule == "krum" else ""
    remedy = "null" if a.rule == "mean" else "mean"
    return f"aggregate.{key}: needs {a.fewest_clients} clients in a round{why}, and {who} gives {num_clients}; use {remedy}"


def _where_data_are(c: Config) -> list[str]:
    """data.root or data.clients, and what goes with it."""
    out = []
    if c.data.root is None and c.data.clients is None:
        out.append("data.root: is needed; a folder that `feddra-ds data convert` or `feddra-ds data synth` wrote; or "
                   "data.clients, for shards made elsewhere")  # fmt: skip
    if c.data.clients is not None:
        for key in ("root", "client_field"):
            if getattr(c.data, key) is not None:
                out.append(f"data.{key}: contradicts data.clients, which names each client's shards; give one of them")
        if not c.data.clients:
            out.append("data.clients: is empty")
        for name in c.data.clients:
            if not re.fullmatch(r"\w[\w .-]*", name):
                out.append(
                    f"data.clients: {name!r} cannot be a client's name: letters, digits, spaces, `_`, `-` and `.` can"
                )
    return out
