"""The whole config tree, validated: every problem is found, named by its key, and reported at once.

A config is YAML with `--section.key value` on top. Precedence, low to high: the defaults below, the strategy's
defaults (`STRATEGY_DEFAULTS`), the YAML file, the command line.
"""

from __future__ import annotations

import copy
import difflib
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError


class ConfigError(ValueError):
    """One or more problems of a config, each a line `key: what is wrong and what to do`."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__("\n".join(problems))


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True)


class RunConfig(Section):
    output_dir: str = "runs/feddra"
    """Folder of the run: config.yaml, metrics.jsonl, events/, checkpoints/, model/, report.html."""
    seed: int = Field(0, ge=0)
    """Seed of everything random: initial weights, order of samples, augmentation, evaluation samples."""
    resume: str = "auto"
    """auto (continue from the newest whole checkpoint in output_dir), never, or the path of a checkpoint."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes CUDA where there is one."""
    monitor: list[Literal["tensorboard", "wandb", "csv"]] = ["tensorboard"]
    """Where DeepSpeed's monitor writes the round's scalars (from the coordinator only), under output_dir/events."""


class EncoderConfig(Section):
    pretrained: str | None = None
    """A Hugging Face id or a local folder with weights; null builds `config` with random weights."""
    config: dict[str, Any] | None = None
    """Keys of the transformers config when pretrained is null, e.g. {model_type: vit, hidden_size: 192, …}."""


class TextEncoderConfig(EncoderConfig):
    tokenizer: str | None = None
    """A tokenizer's id or folder; null takes the one beside `pretrained`, else the vocabulary shipped here."""


class HeadConfig(Section):
    kind: Literal["mlp", "linear"] = "mlp"
    """mlp: Linear-norm-ReLU-Linear (the paper's); linear: one Linear."""
    hidden_dim: int = Field(2048, ge=1)
    """Width of the mlp's hidden layer."""
    norm: Literal["layernorm", "batchnorm", "none"] = "layernorm"
    """Norm inside the mlp. batchnorm is the release's; its statistics couple samples and are averaged over clients."""


class ModelConfig(Section):
    pretrained: str | None = None
    """A folder or id of a whole VisionTextDualEncoder/CLIP model, or of a model exported here, to start from."""
    vision: EncoderConfig = EncoderConfig()
    text: TextEncoderConfig = TextEncoderConfig()
    embedding_dim: int = Field(128, ge=1)
    """D, the size of the shared embedding (the paper's code: 128)."""
    num_top_blocks: int = Field(1, ge=0)
    """Top transformer blocks of each encoder that belong to the alignment module (trained in stage 1)."""
    num_extra_blocks: int = Field(0, ge=0)
    """Extra transformer blocks put on each encoder for the alignment module (the release's form)."""
    head: HeadConfig = HeadConfig()
    adapter: dict[str, Any] | None = None
    """null, or {type: lora, r: …, alpha: …, target_modules: […], aggregation: factors|product|freeze_a}."""


class AugmentConfig(Section):
    crop_scale: float = Field(0.6, gt=0, le=1)
    """Smallest area fraction of the random resized crop; 1.0 takes the whole image."""
    flip: bool = False
    """Mirror half of the images. Off by default: a mirrored chest has its heart on the wrong side."""
    brightness: float = Field(0.1, ge=0, lt=1)
    """Largest relative change of brightness and of contrast."""


class DataConfig(Section):
    root: str | None = None
    """Folder with one folder of shards per client (`feddra-ds data convert` or `data synth` writes it)."""
    batch_size: int = Field(72, ge=1)
    """Pairs in one optimizer step of one client, over all its ranks."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Pairs per rank held with their graph at a time (two-pass gradient caching); null: the rank's whole part."""
    image_size: int = Field(224, ge=8)
    """Side in pixels of the square image that the model sees."""
    text_length: int = Field(112, ge=4)
    """Tokens per text; longer texts are cut."""
    order: Literal["exact", "streaming"] = "exact"
    """exact: a seeded order that knows no ranks, read by offset. streaming: webdataset's pipeline, rank-dependent."""
    num_workers: int = Field(0, ge=0)
    """Worker processes that decode, per rank; 0 decodes in a background thread."""
    prefetch: int = Field(2, ge=1)
    """Batches decoded ahead, per worker."""
    augment: AugmentConfig = AugmentConfig()
    verify: bool = False
    """Check every shard's sha256 against index.json before training."""
    max_bad_fraction: float = Field(0.05, ge=0, le=1)
    """The run fails when more than this fraction of a client's samples is unreadable."""


class ClientsConfig(Section):
    ids: list[str] | None = None
    """Clients to train on, in this order; null takes all under data.root, sorted."""
    minimum: int = Field(1, ge=1)
    """The run stops when fewer clients than this give a valid update in a round."""
    timeout_s: float = Field(1800.0, gt=0)
    """Longest wait in seconds for another rank or client, after which the wait ends with its name."""


class ObjectiveConfig(Section):
    name: Literal["ita"] = "ita"
    """Local objective: ita is the image-text alignment of equation (1)."""
    temperature: float = Field(0.07, gt=0)
    """τ of equation (1), or its initial value when it is learned."""
    learnable_temperature: bool = False
    """Train log τ as part of the alignment module."""
    alignment_weight: float = Field(1.0, gt=0)
    """λ₁ of equation (3)."""
    anchor_weight: float = Field(1.0, ge=0)
    """λ₂ of equation (3), stated for direction_reduction = sum; 0 computes no anchors."""
    anchors: Literal["replay", "resident"] = "replay"
    """Stage 2's anchors: replay computes them before the first step, resident keeps a frozen copy of the model."""
    direction_reduction: Literal["sum", "mean"] = "sum"
    """Sum (the release) or mean (the CLIP habit) of the two directions; step_size and anchor_weight are rescaled."""
    impl: Literal["auto", "triton", "chunked", "reference"] = "auto"
    """Which implementation of the loss runs."""


class DroConfig(Section):
    radius: float = Field(1.0, ge=0)
    """ρ of equation (4); 0 pins the weights to the centre, (N − 1)/2 and more allows the whole simplex."""
    step_size: float = Field(0.5, ge=0)
    """η of equation (4), stated for direction_reduction = sum (the release: 0.01 × 50)."""
    apply: Literal["aggregate", "loss", "both"] = "aggregate"
    """Where p acts: the server's average, the client's loss (almost a no-op under Adam), or both."""
    center: Literal["uniform", "samples"] = "uniform"
    """Centre c of the ball: 1/N, or each client's share of the training pairs."""
    fixed_weights: list[float] | None = None
    """Pins p, one weight per client in the order of the clients; null lets it move."""
    evaluation_pairs: int = Field(256, ge=1)
    """Most training pairs per client in the losses that move p; the same number for every client."""
    evaluation_batch_size: int = Field(32, ge=2)
    """Batch size of those losses, the same for every client (chance is 2 log of it)."""
    evaluate_on: Literal["sample", "anchors"] = "sample"
    """sample: a fixed sample after each round. anchors: read off the next round's stage-1 anchor pass, no extra forward."""


class ScheduleConfig(Section):
    rounds: int = Field(25, ge=1)
    """Rounds of the run."""
    stage1_steps: int = Field(20, ge=0)
    """Local steps of stage 1 (backbone frozen); 0 leaves the stage out."""
    stage2_steps: int = Field(50, ge=0)
    """Local steps of stage 2 (everything trains); 0 leaves the stage out."""
    stage2_start: Literal["client", "global"] = "client"
    """Stage 2 starts from the client's own aligner (the release), or from the aggregated one."""
    warmup_rounds: int = Field(0, ge=0)
    """Rounds of linear learning-rate warm-up."""
    decay: Literal["constant", "cosine", "linear"] = "constant"
    """Learning rate over the rounds after the warm-up."""
    min_lr_fraction: float = Field(0.0, ge=0, le=1)
    """Fraction of optimizer.lr at which the decay ends."""


StrategyName = Literal[
    "feddra", "fedavg", "fedprox", "moon", "afl", "drfa", "qffl", "fedadam", "fedyogi", "diloco", "local", "centralized"
]


class StrategyConfig(Section):
    name: StrategyName = "feddra"
    """The federated algorithm; it sets defaults of other keys, which keys given by you override."""
    options: dict[str, float] = {}
    """Numbers of the strategy, e.g. {mu: 0.01} for fedprox; each strategy names its own."""


class OptimizerConfig(Section):
    name: Literal["adamw", "sgd"] = "adamw"
    """Local optimizer."""
    lr: float = Field(2e-5, gt=0)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's averaging constants."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's ε."""
    weight_decay: float = Field(0.05, ge=0)
    """Decoupled weight decay (not on biases, norms and the temperature)."""
    momentum: float = Field(0.0, ge=0, lt=1)
    """SGD's momentum."""
    max_skipped_steps: int = Field(5, ge=1)
    """Steps in a row with a non-finite loss or gradient after which a client's update is excluded."""


class TopologyConfig(Section):
    ranks_per_slot: int | None = Field(None, ge=1)
    """Ranks of one client slot; null takes as many slots as divide the world, up to one per client."""


class CheckpointConfig(Section):
    every: int = Field(1, ge=1)
    """Rounds between checkpoints (the last round always has one)."""
    keep: int = Field(3, ge=0)
    """Newest checkpoints kept; 0 keeps all."""


class EvaluationConfig(Section):
    every: int = Field(1, ge=0)
    """Rounds between retrieval evaluations on `split`; 0 never (the last round is evaluated otherwise)."""
    split: str = "val"
    """Split of the shards that retrieval is measured on."""
    max_pairs: int = Field(2048, ge=2)
    """Most pairs per client in the gallery (a fixed, seeded sample)."""
    batch_size: int = Field(64, ge=1)
    """Pairs per rank in one evaluation forward."""


class Config(Section):
    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    clients: ClientsConfig = ClientsConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    dro: DroConfig = DroConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    strategy: StrategyConfig = StrategyConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    deepspeed: dict[str, Any] = {}
    """A plain DeepSpeed JSON fragment, passed through (zero_optimization, bf16, fp16, …)."""
    topology: TopologyConfig = TopologyConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()


# Config defaults of each strategy; what it *does* differently is in strategies/.
STRATEGY_DEFAULTS: dict[str, dict[str, Any]] = {
    "feddra": {},
    "fedavg": {"dro": {"radius": 0.0}, "objective": {"anchor_weight": 0.0}, "schedule": {"stage1_steps": 0, "stage2_steps": 70}},
    "local": {"dro": {"radius": 0.0}, "objective": {"anchor_weight": 0.0}, "schedule": {"stage1_steps": 0, "stage2_steps": 70}},
    "centralized": {"dro": {"radius": 0.0}, "objective": {"anchor_weight": 0.0}, "schedule": {"stage1_steps": 0, "stage2_steps": 70}},
}

# Fragments that would break the federation silently: (path, what to do instead).
REFUSED_FRAGMENT_KEYS: dict[str, str] = {
    "scheduler": "overwrites the stage's learning rates and unfreezes the backbone; use schedule.warmup_rounds and schedule.decay",
    "optimizer": "set the optimizer section instead: stages need its two parameter groups",
    "zero_optimization.round_robin_gradients": "permutes the partitions that peers average; remove it",
    "tensorboard": "would write once per slot; use run.monitor",
    "wandb": "would write once per slot; use run.monitor",
    "csv_monitor": "would write once per slot; use run.monitor",
    "comet": "would write once per slot; use run.monitor",
    "train_batch_size": "set data.batch_size",
    "train_micro_batch_size_per_gpu": "set data.batch_size and data.micro_batch_size",
    "gradient_accumulation_steps": "set data.micro_batch_size",
}


def get_path(tree: dict[str, Any], dotted: str) -> Any:
    """The value at `a.b.c` of nested dicts, or None."""
    node: Any = tree
    for part in dotted.split("."):
        if not isinstance(node, dict) or part not in node:
            return None
        node = node[part]
    return node


def set_path(tree: dict[str, Any], dotted: str, value: Any) -> None:
    """Set `a.b.c` in nested dicts, creating what lies between."""
    *parents, leaf = dotted.split(".")
    for part in parents:
        if not isinstance(tree.get(part), dict):
            tree[part] = {}
        tree = tree[part]
    tree[leaf] = value


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with `over` on top, section by section; neither is changed."""
    out = copy.deepcopy(base)
    for key, value in over.items():
        out[key] = merge(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else copy.deepcopy(value)
    return out


def from_dict(user: dict[str, Any]) -> Config:
    """Validate a nested dict of what the user gave.

    Raises ConfigError with one line for each problem: unknown keys, bad values and contradictions alike.
    """
    strategy = get_path(user, "strategy.name") or "feddra"
    tree = merge(STRATEGY_DEFAULTS.get(strategy, {}), user)
    problems: list[str] = []
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"])
            given = "" if item["type"] == "extra_forbidden" else f" (got {item['input']!r})"
            message = "unknown key" + _nearest(key) if item["type"] == "extra_forbidden" else item["msg"]
            problems.append(f"{key}: {message}{given}")
            _prune(tree, [str(part) for part in item["loc"]])
        config = Config.model_validate(tree)  # without the bad values, so that contradictions are found as well
    problems += contradictions(config)
    if problems:
        raise ConfigError(problems)
    return config


def load(path: str | Path | None, overrides: dict[str, Any] | None = None) -> Config:
    """Read a YAML file (or none) and put nested `overrides` on top. Raises ConfigError."""
    tree: Any = {}
    if path is not None:
        try:
            tree = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except OSError as error:
            raise ConfigError([f"--config: cannot read {path}: {error.strerror}"]) from error
        except yaml.YAMLError as error:
            raise ConfigError([f"--config: {path} is not YAML: {' '.join(str(error).split())}"]) from error
        if not isinstance(tree, dict):
            raise ConfigError([f"--config: {path} must be sections of keys, got {type(tree).__name__}"])
    return from_dict(merge(tree, overrides or {}))


def dump(config: Config) -> str:
    """The resolved tree as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def contradictions(config: Config) -> list[str]:
    """Problems between keys, each valid on its own. One line each, the key first."""
    c, out = config, []
    if c.data.root is None:
        out.append("data.root: is needed; a folder that `feddra-ds data convert` or `feddra-ds data synth` wrote")
    if c.schedule.stage1_steps + c.schedule.stage2_steps == 0:
        out.append("schedule.stage2_steps: both stages have 0 steps, so nothing would train")
    if c.schedule.warmup_rounds >= c.schedule.rounds:
        out.append(f"schedule.warmup_rounds: {c.schedule.warmup_rounds} leaves none of the {c.schedule.rounds} rounds after the warm-up")
    if c.clients.ids is not None:
        if not c.clients.ids:
            out.append("clients.ids: is empty; null takes all clients under data.root")
        repeated = sorted({i for i in c.clients.ids if c.clients.ids.count(i) > 1})
        if repeated:
            out.append(f"clients.ids: {', '.join(repeated)} named more than once")
        if c.clients.minimum > max(1, len(c.clients.ids)):
            out.append(f"clients.minimum: {c.clients.minimum} is more than the {len(c.clients.ids)} clients in clients.ids")
    weights = c.dro.fixed_weights
    if weights is not None:
        if min(weights, default=-1.0) < 0 or abs(sum(weights) - 1) > 1e-6:
            out.append(f"dro.fixed_weights: must be ≥ 0 and sum to 1, got {weights}")
        if c.clients.ids is not None and len(weights) != len(c.clients.ids):
            out.append(f"dro.fixed_weights: {len(weights)} weights for {len(c.clients.ids)} clients")
    if c.dro.evaluate_on == "anchors":
        if c.objective.anchor_weight == 0 or c.schedule.stage1_steps == 0:
            out.append("dro.evaluate_on: anchors needs objective.anchor_weight > 0 and schedule.stage1_steps > 0")
        if c.dro.apply != "aggregate":
            out.append(f"dro.evaluate_on: anchors gives p too late for dro.apply={c.dro.apply}; use sample")
    for name, encoder in (("vision", c.model.vision), ("text", c.model.text)):
        if encoder.pretrained is not None and encoder.config is not None:
            out.append(f"model.{name}.config: contradicts model.{name}.pretrained; give one of them")
    for path, advice in REFUSED_FRAGMENT_KEYS.items():
        if get_path(c.deepspeed, path) not in (None, False):
            out.append(f"deepspeed.{path}: {advice}")
    stage = get_path(c.deepspeed, "zero_optimization.stage")
    if stage not in (None, 0, 1, 2, 3):
        out.append(f"deepspeed.zero_optimization.stage: must be 0, 1, 2 or 3, got {stage!r}")
    if get_path(c.deepspeed, "bf16.enabled") and get_path(c.deepspeed, "fp16.enabled"):
        out.append("deepspeed.fp16.enabled: contradicts deepspeed.bf16.enabled; give one of them")
    return out


def known_keys(section: type[Section] = Config, prefix: str = "") -> dict[str, Any]:
    """Every key of the tree as `section.key` → its pydantic FieldInfo (type, default, description)."""
    out: dict[str, Any] = {}
    for name, info in section.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            out |= known_keys(info.annotation, f"{prefix}{name}.")
        else:
            out[prefix + name] = info
    return out


def _nearest(key: str) -> str:
    close = difflib.get_close_matches(key, known_keys(), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _prune(tree: dict[str, Any], loc: list[str]) -> None:
    """Remove the deepest dict entry on the way to `loc` (a list's bad item removes the list)."""
    node: Any = tree
    for depth, part in enumerate(loc):
        child = node.get(part) if isinstance(node, dict) else None
        if depth == len(loc) - 1 or not isinstance(child, dict):
            if isinstance(node, dict):
                node.pop(part, None)
            return
        node = child
