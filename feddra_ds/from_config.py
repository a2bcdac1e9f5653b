"""What a config alone describes of a model: its tokenizer, its preprocessing, the dual encoder."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from . import adapters
from .config import Config, ConfigError
from .data.tokens import load_tokenizer
from .encoders import local_or_hub
from .model import DualEncoder, build_model, checkpoint_activations
from .processing import DualEncoderProcessor, build_processor


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
        return build_processor(config.model, tokenizer, config.data.image_size, config.data.text_length)
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
        adapters.apply(model, adapters.parse(config.model.adapter))
        if config.model.activation_checkpointing:
            checkpoint_activations(model)
        return model
    except ValueError as error:
        raise ConfigError([str(error)]) from error
