"""Building the dual encoder that a config describes, from random or pretrained weights, or from a whole model."""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from feddra_ds import objectives
from feddra_ds.common.errors import ConfigError
from feddra_ds.config.schema import Config, EncoderConfig, ModelConfig
from feddra_ds.data.loading.tokens import load_tokenizer
from feddra_ds.model import SIDES, encoders, lora, lora_options, towers
from feddra_ds.model.dual_encoder import DualEncoder
from feddra_ds.model.dual_encoder_config import DualEncoderConfig
from feddra_ds.model.encoders import local_or_hub
from feddra_ds.model.image_size import resize_images
from feddra_ds.model.processor import DualEncoderProcessor, build_processor
from feddra_ds.objectives import ObjectiveOptions

log = logging.getLogger("feddra_ds")
_SIGLIP = ("siglip", "siglip2")


def build_model(
    config: ModelConfig,
    objective: ObjectiveOptions,
    *,
    image_size: int,
    vocab_size: int,
    pad_token_id: int,
    max_text_length: int,
) -> DualEncoder:
    """The dual encoder that a config describes: fp32, CPU, deterministic under torch.manual_seed.

    With `config.pretrained` the encoders, extra blocks and heads are those of that model, and only `num_top_blocks`
    and the temperature are read from here. Dropout is 0 unless `.config` sets it.
    Raises ValueError naming the key of what cannot be built.
    """
    if config.pretrained is not None:
        return _from_whole(config, objective, image_size, vocab_size, pad_token_id, max_text_length)
    about: dict[str, Any] = {"num_top_blocks": config.num_top_blocks, "pickled": config.pickled_weights}
    vision = encoders.vision_encoder(config.vision, image_size, **about)
    text = encoders.text_encoder(config.text, vocab_size, pad_token_id, max_text_length, **about)
    full = DualEncoderConfig(
        vision_config=vision.config,
        text_config=text.config,
        embedding_dim=config.embedding_dim,
        num_top_blocks=config.num_top_blocks,
        num_extra_blocks=config.num_extra_blocks,
        head_kind=config.head.kind,
        head_hidden_dim=config.head.hidden_dim,
        head_norm=config.head.norm,
        head_output_norm=config.head.output_norm,
        vision_pooling=_pooling(config.vision, vision, "vision"),
        text_pooling=_pooling(config.text, text, "text"),
        temperature=objective.temperature,
        learnable_temperature=objective.learnable_temperature,
        learned=_learned(objective, config.embedding_dim),
        image_size=image_size,
        text_length=max_text_length,
    )
    full._attn_implementation = "sdpa"  # a new composite config sets its encoders' to None
    return DualEncoder(full, vision, text)


def checkpoint_activations(model: DualEncoder) -> None:
    """Have the encoders' blocks compute their activations again in the backward pass. Raises ValueError naming the key."""
    # transformers 5 renamed it on the way
    enable: Any = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise ValueError(f"model.activation_checkpointing: {error}; set it to false") from error


def _pooling(section: EncoderConfig, encoder: Any, side: str) -> str:
    return encoders.pooling_of(encoder, side) if section.pooling == "auto" else section.pooling


def _from_whole(
    config: ModelConfig,
    objective: ObjectiveOptions,
    image_size: int,
    vocab_size: int,
    pad_token_id: int,
    max_text_length: int,
) -> DualEncoder:
    """A DualEncoder from a model exported here, a CLIPModel, SiglipModel, Siglip2Model or VisionTextDualEncoderModel."""
    key, name = "model.pretrained", str(config.pretrained)
    old = encoders.load_config(name, key)
    for encoder_config in (getattr(old, "vision_config", None), getattr(old, "text_config", None)):
        if encoder_config is not None:
            towers.check_config(encoder_config, config.num_top_blocks, key)
    source: Any = encoders.load_model(name, old, key, config.pickled_weights)
    whole, heads, values = _halves(source, old, pad_token_id, key)
    _say_what_is_ignored(config, values)
    encoders.check_text(whole["text"].config, vocab_size, max_text_length, key)
    whole["vision"] = resize_images(whole["vision"], image_size, key)
    values |= {
        "vision_config": whole["vision"].config, "text_config": whole["text"].config,
        "num_top_blocks": config.num_top_blocks, "temperature": objective.temperature,
        "learnable_temperature": objective.learnable_temperature,
        "learned": _learned(objective, values["embedding_dim"]),
        "image_size": image_size, "text_length": max_text_length,
    }  # fmt: skip
    full = DualEncoderConfig(**{k: v for k, v in values.items() if k in DualEncoderConfig.__annotations__})
    full._attn_implementation = "sdpa"
    model = DualEncoder(full, whole["vision"], whole["text"])
    for side in SIDES:
        taken = {k: v for k, v in heads[side].items() if k.startswith(("head.", "extra.", "extra_norm."))}
        unexpected = getattr(model.aligner, side).load_state_dict(taken, strict=False).unexpected_keys
        assert not unexpected, unexpected
    return model


def _halves(
    source: Any, old: Any, pad_token_id: int, key: str
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """By side the encoders and the weights above them, and keys of the DualEncoderConfig under which those are kept."""
    if isinstance(source, DualEncoder):
        heads = {side: getattr(source.aligner, side).state_dict() for side in SIDES}
        return {side: source.whole_encoder(side) for side in SIDES}, heads, old.to_dict()
    if old.model_type not in ("clip", "vision-text-dual-encoder", *_SIGLIP):
        raise ValueError(
            f"{key}: {old.name_or_path} is a {old.model_type} model; give a CLIP, SigLIP or VisionTextDualEncoder model, "
            "or one exported here (an encoder alone goes into model.vision.pretrained or model.text.pretrained)"
        )
    whole = {side: getattr(source, f"{side}_model") for side in SIDES}
    values = {
        "num_extra_blocks": 0, "head_kind": "linear", "use_poolers": old.model_type != "clip",
        **{f"{side}_pooling": encoders.pooling_of(whole[side], side) for side in SIDES},
    }  # fmt: skip
    if old.model_type in _SIGLIP:
        # The image embedding is what the pooler gives; that of a text is the last position of all that the encoder can
        # read, padded, through a projection.
        dim = old.text_config.projection_size
        weights = {
            "vision": (torch.eye(dim), torch.zeros(dim)),
            "text": (whole["text"].head.weight, whole["text"].head.bias),
        }
        values |= {"embedding_dim": dim, "head_bias": True, "text_pooling": "last", "text_padding": pad_token_id}
    else:
        projections = {"vision": source.visual_projection, "text": source.text_projection}
        weights = {side: (p.weight, None) for side, p in projections.items()}
        values |= {"embedding_dim": old.projection_dim}
    heads = {
        side: {"head.layers.0.weight": weight} | ({} if bias is None else {"head.layers.0.bias": bias})
        for side, (weight, bias) in weights.items()
    }
    return whole, heads, values


def _learned(objective: ObjectiveOptions, embedding_dim: int) -> dict[str, Any] | None:
    """What the objective learns itself, as JSON has it, or None."""
    about = objectives.find(objective.name).learned(objective, embedding_dim)
    return {name: [list(x.shape), x.start, x.std] for name, x in about.items()} or None


def _say_what_is_ignored(config: ModelConfig, values: dict[str, Any]) -> None:
    asked = {
        "model.embedding_dim": (config.embedding_dim, values["embedding_dim"]),
        "model.num_extra_blocks": (config.num_extra_blocks, values["num_extra_blocks"]),
        "model.head.kind": (config.head.kind, values["head_kind"]),
        "model.head.output_norm": (config.head.output_norm, values.get("head_output_norm", "none")),
    }
    for key, (given, found) in asked.items():
        if given != found:
            log.warning("%s = %s is not used: model.pretrained has %s", key, given, found)


def tokenizer_of(config: Config) -> PreTrainedTokenizerBase:
    """model.text.tokenizer, else the one beside the pretrained weights, else the shipped vocabulary. Raises ConfigError."""
    text, whole = config.model.text, config.model.pretrained
    try:
        beside = text.tokenizer or text.pretrained or (local_or_hub(whole, "model.pretrained") if whole else None)
        return load_tokenizer(beside)
    except ValueError as error:
        raise ConfigError([str(error)]) from error


def processor_of(config: Config, tokenizer: PreTrainedTokenizerBase) -> DualEncoderProcessor:
    """Image and text preprocessing of the model. Raises ConfigError."""
    try:
        data = config.data
        return build_processor(
            config.model, tokenizer, data.image_size, data.text_length, data.image_mean, data.image_std
        )
    except ValueError as error:
        raise ConfigError([str(error)]) from error


def model_of(config: Config, tokenizer: PreTrainedTokenizerBase) -> DualEncoder:
    """The dual encoder with its adapters, fp32 on the host. Raises ConfigError."""
    try:
        model = build_model(
            config.model,
            config.objective,
            image_size=config.data.image_size,
            vocab_size=len(tokenizer),
            pad_token_id=int(tokenizer.pad_token_id or 0),
            max_text_length=config.data.text_length,
        )
        if config.data.micro_batch_size is not None and (key := model.encoder_with_batchnorm()):
            raise ValueError(
                f"data.micro_batch_size: splits the batch that {key}'s batchnorms take statistics over; set it to null"
            )
        lora.apply(model, lora_options.parse(config.model.adapter))
        if config.model.activation_checkpointing:
            checkpoint_activations(model)
        return model
    except ValueError as error:
        raise ConfigError([str(error)]) from error
