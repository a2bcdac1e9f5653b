"""The sections of the config and their keys: types, bounds, defaults, and what each means.

The sections `objective`, `strategy` and `dro` are declared beside what they configure; `load.config_class` puts in the
keys of the objective and strategy that a config names. `feddra-ds train --help` prints all of them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, SerializeAsAny

from feddra_ds.common.section import MAY_CHANGE, Section, may_change_in
from feddra_ds.objectives.options import ObjectiveOptions
from feddra_ds.strategies.options import DroOptions, StrategyOptions


class RunConfig(Section):
    output_dir: str = Field("runs/feddra", json_schema_extra=MAY_CHANGE)
    """Folder of the run: config.yaml, metrics.jsonl, events/, checkpoints/, model/, report.html."""
    seed: int = Field(0, ge=0)
    """Seed of everything random: initial weights, order of samples, augmentation, evaluation samples."""
    resume: str = Field("auto", json_schema_extra=MAY_CHANGE)
    """auto (continue from the newest whole checkpoint in output_dir), never, or the path of a checkpoint."""
    device: Literal["auto", "cpu", "cuda"] = Field("auto", json_schema_extra=MAY_CHANGE)
    """Where to train; auto takes CUDA where there is one."""
    trackers: list[str] = Field(["tensorboard"], json_schema_extra=MAY_CHANGE)
    """Who hears each round's numbers beside metrics.jsonl, from rank 0: tensorboard (under output_dir/events), wandb, mlflow,
    trackio, comet_ml, aim, clearml, dvclive, swanlab, or package.module:Class of your own (docs/own_classes.md)."""
    project: str = Field("feddra", min_length=1, json_schema_extra=MAY_CHANGE)
    """The project, or experiment, that trackers file the run under."""
    name: str | None = Field(None, min_length=1, json_schema_extra=MAY_CHANGE)
    """The run's name for trackers; null: the last part of output_dir."""


class EncoderConfig(Section):
    pretrained: str | None = None
    """A Hugging Face id or a local folder with weights; null builds `config` with random weights."""
    num_layers: int | None = Field(None, ge=1)
    """How many of the pretrained encoder's blocks to keep, from the input on; null keeps all."""
    config: dict[str, Any] | None = None
    """Keys of the transformers config when pretrained is null, e.g. {model_type: vit, hidden_size: 192, …}."""
    pooling: Literal["auto", "cls", "mean"] = "auto"
    """One vector of the tokens: auto is the encoder's own habit; mean leaves the start faster from random weights."""


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
    output_norm: Literal["none", "layernorm", "batchnorm"] = "none"
    """Norm of what the head gives, without learned scale or shift. With batchnorm, the release's, random encoders with cls
    pooling leave chance at once; with the other two they stay there for 60 steps and more (docs/concepts.md)."""

    @property
    def batchnorm_key(self) -> str | None:
        """The key that asks for a batchnorm, or None."""
        if self.kind == "mlp" and self.norm == "batchnorm":
            return "model.head.norm"
        return "model.head.output_norm" if self.output_norm == "batchnorm" else None


class ModelConfig(Section):
    pretrained: str | None = None
    """A folder or id of a whole VisionTextDualEncoder/CLIP model, or of a model exported here, to start from."""
    pickled_weights: bool = Field(False, json_schema_extra=MAY_CHANGE)
    """Let pretrained weights be a pickle (pytorch_model.bin) where there are none in safetensors files. torch reads it with
    weights_only=True, which makes tensors alone and runs nothing; false refuses it."""
    vision: EncoderConfig = EncoderConfig()
    text: TextEncoderConfig = TextEncoderConfig()
    embedding_dim: int = Field(128, ge=1)
    """D, the size of the shared embedding (the paper's code: 128)."""
    num_top_blocks: int = Field(1, ge=0)
    """Top transformer blocks of each encoder that belong to the alignment module (trained in stage 1)."""
    num_extra_blocks: int = Field(0, ge=0)
    """Extra transformer blocks put on each encoder for the alignment module (the release's form)."""
    head: HeadConfig = HeadConfig()
    activation_checkpointing: bool = False
    """Keep nothing inside the encoders' blocks for the backward pass, which computes them again: less memory, more time."""
    adapter: dict[str, Any] | None = None
    """null, or {type: lora, r: …, alpha: …, target_modules: […], aggregation: …}: docs/adapters.md."""


class AugmentConfig(Section):
    method: Literal["resized_crop", "pad_crop"] = "resized_crop"
    """resized_crop: a random part, stretched to the square. pad_crop (the release): the longer side to `resize`, black
    borders to a square, and a random crop of data.image_size, nothing stretched. Evaluation stretches the whole image."""
    resize: int = Field(256, ge=8)
    """Side in pixels of pad_crop's square, at least data.image_size."""
    crop_scale: float = Field(0.6, gt=0, le=1)
    """Smallest area fraction of the random resized crop; 1.0 takes the whole image."""
    flip: bool = False
    """Mirror half of the images. Off by default: a mirrored chest has its heart on the wrong side."""
    brightness: float = Field(0.1, ge=0, lt=1)
    """Largest relative change of brightness and of contrast."""


class StreamingConfig(Section):
    shuffle_buffer: int = Field(1000, ge=1)
    """Samples that data.order=streaming mixes at a time, per client of a rank; they are held in memory, encoded."""
    timeout_s: float = Field(60.0, gt=0, json_schema_extra=MAY_CHANGE)
    """Longest time in seconds without a byte from a remote data.root before an attempt is given up."""
    retries: int = Field(5, ge=0, json_schema_extra=MAY_CHANGE)
    """Further attempts at a remote file, with doubling pauses."""
    cache_dir: str | None = Field(None, json_schema_extra=MAY_CHANGE)
    """Where copies of remote shards are kept; null: ~/.cache/feddra_ds."""
    cache_bytes: int = Field(50 << 30, ge=0, json_schema_extra=MAY_CHANGE)
    """Most bytes of that cache, per dataset."""
    allow_pipe: bool = Field(False, json_schema_extra=MAY_CHANGE)
    """Let a `pipe:` data.root run programs on this machine."""


class DataConfig(Section):
    root: str | None = Field(None, json_schema_extra=MAY_CHANGE)
    """Folder with one folder of shards per client (`feddra-ds data convert` or `data synth` writes it), or its address."""
    clients: dict[str, str | list[str]] | None = Field(None, json_schema_extra=MAY_CHANGE)
    """In place of root: each client's shards, a folder of tars or a list of them with webdataset's braces, such as
    {north: "https://host/north/{00000..00127}.tar"}. A shard named after val or test is of that split, others of train."""
    client_field: str | None = None
    """root is then one set of shards, a folder or a list with braces, and this field of a pair's json names its client."""
    text_field: str | None = None
    """Field of a pair's json that is its text (its .txt where the json has none); of a list of texts each epoch draws one."""
    val_fraction: float | None = Field(None, gt=0, lt=1)
    """Share of the training pairs of each client without a val split that are its val split: by a hash of the patient that
    the json names, else of the key, so that a pair stays on its side for ever."""
    batch_size: int = Field(72, ge=1)
    """Pairs in one optimizer step of one client, over all its ranks; the other pairs of a batch are a pair's negatives."""
    micro_batch_size: int | None = Field(None, ge=1, json_schema_extra=MAY_CHANGE)
    """Pairs per rank held with their graph at a time (two-pass gradient caching); null: the rank's whole part."""
    image_size: int = Field(224, ge=8)
    """Side in pixels of the square image that the model sees."""
    image_mean: tuple[float, float, float] | None = None
    """Mean of each colour, in 0 to 1, for the normalisation; null takes that of the pretrained image encoder, else 0.5."""
    image_std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    """Standard deviation of each colour, likewise."""
    text_length: int = Field(112, ge=4)
    """Tokens per text; longer texts are cut."""
    order: Literal["exact", "streaming"] = "exact"
    """exact: a seeded order that knows no ranks, read by offset. streaming: webdataset's, whole shards through a buffer, no
    index; depends on the number of ranks."""
    num_workers: int = Field(0, ge=0, json_schema_extra=MAY_CHANGE)
    """Worker processes that decode, per rank; 0 decodes in a background thread."""
    prefetch: int = Field(2, ge=1, json_schema_extra=MAY_CHANGE)
    """Batches decoded ahead, per worker."""
    streaming: StreamingConfig = StreamingConfig()
    replay_cache_bytes: int = Field(2 << 30, ge=0, json_schema_extra=MAY_CHANGE)
    """Host bytes per rank for stage 2's decoded batches, so that the replay decodes once; beyond it, twice."""
    augment: AugmentConfig = AugmentConfig()
    verify: bool = Field(False, json_schema_extra=MAY_CHANGE)
    """Check every shard's sha256 against index.json before training."""
    max_bad_fraction: float = Field(0.05, ge=0, le=1, json_schema_extra=MAY_CHANGE)
    """A client is excluded when more than this fraction of its samples is unreadable; see clients.minimum."""


class ClientsConfig(Section):
    ids: list[str] | None = None
    """Clients to train on, in this order; null takes all under data.root, sorted."""
    per_round: int | None = Field(None, ge=1)
    """Clients that train in a round, drawn by run.seed for each round; null: all. L_i is measured on all clients. With
    strategy.name = drfa it is the number of draws by p, and null takes as many as there are clients."""
    minimum: int = Field(1, ge=1, json_schema_extra=MAY_CHANGE)
    """The run stops when fewer clients than this give a valid update in a round."""
    timeout_s: float = Field(1800.0, gt=0, json_schema_extra=MAY_CHANGE)
    """Longest wait in seconds for another rank or client, after which the wait ends with its name."""


class ScheduleConfig(Section):
    rounds: int = Field(25, ge=1, json_schema_extra=MAY_CHANGE)
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


class OptimizerConfig(Section):
    name: Literal["adamw", "sgd", "muon"] = "adamw"
    """Local optimizer. muon: Muon for the encoders' matrices, AdamW for embeddings, heads, norms and biases
    (docs/optimizers.md); ZeRO 0 alone."""
    lr: float = Field(2e-5, gt=0)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's averaging constants."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's ε."""
    weight_decay: float = Field(0.05, ge=0)
    """Decoupled weight decay (not on biases, norms and the temperature)."""
    decay_all: bool = False
    """Weight decay on all parameters (the release)."""
    momentum: float = Field(0.0, ge=0, lt=1)
    """SGD's momentum."""
    muon_momentum: float = Field(0.95, ge=0, lt=1)
    """Muon's momentum, of Nesterov's kind."""
    max_skipped_steps: int = Field(5, ge=1)
    """Steps in a row with a non-finite loss or gradient, which are skipped, after which a client's update is excluded. The
    steps in which fp16's loss scaler looks for its scale count too."""


class TopologyConfig(Section):
    ranks_per_slot: int | None = Field(None, ge=1, json_schema_extra=MAY_CHANGE)
    """Ranks of one client slot; null takes as many slots as divide the world, up to one per client."""
    interface: str | None = Field(None, json_schema_extra=MAY_CHANGE)
    """The network interface, by its name on every host (`ip -4 addr` lists them), over which ranks meet and exchange tensors: it
    sets GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, and rank 0 serves the store on it alone. null: as these variables say, else
    as gloo and NCCL choose; a run on one host whose launcher names the loopback is not heard outside."""

    dry_run: bool = Field(False, json_schema_extra=MAY_CHANGE)
    """Only start: check everything, meet, form all groups, log who is where, and end. Builds no model and writes nothing."""


class AggregateConfig(Section):
    precision: Literal["fp32", "bf16", "int8", "int4", "int2"] = "fp32"
    """What travels between peers: fp32 weights, or deltas rounded to bf16 or quantised by blocks, with error feedback; int2
    goes with sparsity alone."""
    block_size: int = Field(256, ge=16)
    """Elements that share one scale in int8 and int4 without sparsity."""
    sparsity: float | None = Field(None, ge=1 / 4096, le=0.25)
    """Share of each block of 4,096 elements that travels, the largest ones, at precision int4 or int2; null: all elements.
    Error feedback sends the others later (docs/compression.md)."""
    ema: float | None = Field(None, gt=0, lt=1)
    """β of an average of the global models of all rounds so far, that of t rounds ago weighted ∝ β^t, kept beside the global
    model: `evaluate --ema` measures it, `export --ema` writes it. Training does not see it. null: none."""
    max_norm_ratio: float | None = Field(100.0, gt=1)
    """An update whose norm is more than this many times the clients' median of the last round is left out of the average, by
    name. Where a first round has such an update, its average is not used. null: any finite update is averaged."""
    after_stage1: bool = True
    """Average the aligners between the stages (the paper); false leaves one synchronisation a round."""


class CheckpointConfig(Section):
    every: int = Field(1, ge=1, json_schema_extra=MAY_CHANGE)
    """Rounds between checkpoints (the last round always has one)."""
    keep: int = Field(3, ge=0, json_schema_extra=MAY_CHANGE)
    """Newest checkpoints kept; 0 keeps all."""
    on_error: Literal["continue", "stop"] = Field("continue", json_schema_extra=MAY_CHANGE)
    """Where a checkpoint cannot be written (a full disk): warn, keep the older ones and try again when the next is due, or end
    the run at the next average. After the last round it always ends, with what to do."""


class EvaluationConfig(Section):
    every: int = Field(1, ge=0, json_schema_extra=MAY_CHANGE)
    """Rounds between retrieval evaluations on `split`; 0 never (the last round is evaluated otherwise)."""
    split: str = Field("val", json_schema_extra=MAY_CHANGE)
    """Split of the shards that retrieval is measured on."""
    max_pairs: int = Field(2048, ge=2, json_schema_extra=MAY_CHANGE)
    """Most pairs per client in the gallery (a fixed, seeded sample)."""
    batch_size: int = Field(64, ge=1, json_schema_extra=MAY_CHANGE)
    """Pairs per rank in one evaluation forward."""


class DebugConfig(Section):
    """For looking into a run; none of it changes what is computed."""

    deterministic: bool = Field(False, json_schema_extra=MAY_CHANGE)
    """Use torch's deterministic algorithms; an operation that has none ends the run with its name."""
    log_steps: bool = Field(False, json_schema_extra=MAY_CHANGE)
    """A line per local step, with its loss and the norms of gradient and update per part, in the log and under debug/."""
    profile_steps: list[Annotated[int, Field(ge=0)]] = Field([], json_schema_extra=MAY_CHANGE)
    """Local steps of each process, counted from 0, that torch's profiler writes to debug/trace-rankK-stepN.json."""


# What of DeepSpeed's config may change on resume: how it lays out, moves and reports, not what it computes.
_FREE_OF_DEEPSPEED = may_change_in(
    "zero_optimization",
    "zero_force_ds_cpu_optimizer",
    "activation_checkpointing",
    "aio",
    "comms_logger",
    "dump_state",
    "flops_profiler",
    "memory_breakdown",
    "steps_per_print",
    "timers",
    "wall_clock_breakdown",
    but=[
        "zero_optimization.zenflow",
        "zero_optimization.zero_quantized_gradients",
        "zero_optimization.zero_quantized_nontrainable_weights",
        "zero_optimization.zero_quantized_weights",
    ],
)


class Config(Section):
    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    clients: ClientsConfig = ClientsConfig()
    objective: SerializeAsAny[ObjectiveOptions] = ObjectiveOptions()
    dro: DroOptions = DroOptions()
    schedule: ScheduleConfig = ScheduleConfig()
    strategy: SerializeAsAny[StrategyOptions] = StrategyOptions()
    optimizer: OptimizerConfig = OptimizerConfig()
    deepspeed: dict[str, Any] = Field({}, json_schema_extra=_FREE_OF_DEEPSPEED)
    """Keys of DeepSpeed's own config, passed through (zero_optimization, bf16, fp16, …), or the path of a JSON file of
    them, in which what is "auto" is left to feddra_ds."""
    topology: TopologyConfig = TopologyConfig()
    aggregate: AggregateConfig = AggregateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    debug: DebugConfig = DebugConfig()
