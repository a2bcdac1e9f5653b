"""Transformers encoders from a config or from weights, whole: towers.py cuts them.

Everything a user can get wrong here is a ValueError that starts with the config key.
"""

from __future__ import annotations

import contextlib
import difflib
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, MODEL_MAPPING, AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from feddra_ds.common.text import first_line
from feddra_ds.common.trust import find_weights, refuse_code, safely
from feddra_ds.config.schema import EncoderConfig
from feddra_ds.model.image_size import check_patches, resize_images
from feddra_ds.model.towers import ENCODERS_OF_TWO, check_config
from feddra_ds.model.weights.deferred import recording
from feddra_ds.model.weights.pretrained import load_deferred
from feddra_ds.model.weights.tape import CannotDefer

# Text encoders whose position ids start behind the padding id.
_OFFSET_POSITIONS = frozenset({"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "data2vec-text"})
_POOLINGS = {
    "clip_text_model": "last", "siglip_text_model": "mean", "siglip2_text_model": "mean", "t5": "mean", "mt5": "mean",
    "umt5": "mean",
}  # fmt: skip
_CLS_TYPES = frozenset(
    {"bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra", "modernbert", "mpnet", "albert", "deberta",
     "deberta-v2"}
)  # fmt: skip
# Classes that AutoModel does not give: halves of a model, and encoders whose type stands for one with a decoder.
_WITHOUT_AUTO = {
    "siglip_text_model": "SiglipTextModel", "siglip2_text_model": "Siglip2TextModel", **ENCODERS_OF_TWO,
}  # fmt: skip


def local_or_hub(name: str, key: str) -> str:
    """The model folder that `name` is or, a run's, holds; `name` itself if it could be a hub id. ValueError names `key`."""
    path = Path(name).expanduser()
    if (path / "model" / "config.json").is_file():
        return str(path / "model")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{key}: {name} has no config.json, so it is not a model folder")
        return str(path)
    if path.exists():
        raise ValueError(f"{key}: {name} is a file; give the folder that holds config.json and the weights")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise ValueError(f"{key}: there is no folder {name}")
    return name


def load_config(name: str, key: str) -> PreTrainedConfig:
    """The transformers config of a folder or hub id. Raises ValueError naming `key`."""
    source = local_or_hub(name, key)
    refuse_code(source, key)
    try:
        return AutoConfig.from_pretrained(source, **safely(source))
    except Exception as error:  # a config of wrong types: each class of transformers raises what it happens to
        raise ValueError(f"{key}: {_why(name, error)}") from error


def load_model(name: str, config: PreTrainedConfig, key: str, pickled: bool = False) -> PreTrainedModel:
    """A transformers model with its weights, fp32, on the CPU, without dropout. pickled: its weights may be a pickle.

    Raises ValueError naming `key`.
    """
    source = local_or_hub(name, key)
    with quiet():
        folder, are_pickled = find_weights(source, key, pickled)
    for part in (config, getattr(config, "vision_config", None), getattr(config, "text_config", None)):
        if part is not None:
            set_dropout(part, 0.0, set())
    options: dict[str, Any] = {"trust_remote_code": False, "attn_implementation": attention_of(config)}
    try:
        with quiet():
            recorder = recording()
            kind: Any = _class_of(config)
            if recorder is not None:
                kind = MODEL_MAPPING[type(config)] if kind is AutoModel else kind
                model = load_deferred(recorder, folder, kind, config, options)
            else:
                options |= {"use_safetensors": not are_pickled, "weights_only": True}
                model = kind.from_pretrained(folder, config=config, dtype=torch.float32, **options)
        model.config.name_or_path = source
        return _encoder_alone(model)
    except CannotDefer:
        raise
    except pickle.UnpicklingError as error:  # of weights_only=True
        raise ValueError(
            f"{key}: the pickled weights of {name} hold more than tensors, so they are never read"
        ) from error
    except Exception as error:  # of sizes and weights that do not fit: transformers and torch raise many types
        raise ValueError(f"{key}: {_why(name, error)}") from error


def _why(name: str, error: Exception) -> str:
    first = first_line(error)
    if Path(name).expanduser().is_dir():
        return f"cannot load {name}: {first}"
    return f"{name} is not a folder here and could not be fetched from the Hugging Face hub: {first}"


def new_config(section: EncoderConfig, default_type: str, key: str) -> PreTrainedConfig:
    """A transformers config from `section.config`; keys that are left out take the defaults of its model type."""
    given = dict(section.config or {})
    kind = given.pop("model_type", default_type)
    if kind not in CONFIG_MAPPING:
        close = difflib.get_close_matches(str(kind), CONFIG_MAPPING.keys(), n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"{key}.config.model_type: transformers knows no {kind!r}{hint}")
    try:
        config = AutoConfig.for_model(kind, **given)
    except Exception as error:  # transformers validates with several error classes of its own
        raise ValueError(f"{key}.config: {' '.join(str(error).split())[:300]}") from error
    names = set(type(config).default_config_fields()) | set(type(config).attribute_map)
    unknown = sorted(set(given) - names)
    if unknown:
        raise ValueError(f"{key}.config: a {kind} config has no {', '.join(unknown)}")
    return config


def set_dropout(config: PreTrainedConfig, value: float, keep: set[str]) -> None:
    """Set every dropout and drop-path rate but those in `keep`: a run must not depend on how its batch is cut."""
    for name, old in config.to_dict().items():
        if "drop" in name and isinstance(old, (int, float)) and not isinstance(old, bool) and name not in keep:
            setattr(config, name, value)


def vision_encoder(
    section: EncoderConfig, image_size: int, num_top_blocks: int = 0, key: str = "model.vision", pickled: bool = False
) -> PreTrainedModel:
    """The image encoder, whole, fp32, for square images of `image_size` pixels. pickled: its weights may be a pickle.

    Raises ValueError naming `key`.
    """
    if section.pretrained is None:
        config = new_config(section, "vit", key)
        check_config(config, num_top_blocks, key)
        given = set(section.config or {})
        if "image_size" in given and config.image_size != image_size:
            raise ValueError(f"{key}.config.image_size: {config.image_size} contradicts data.image_size = {image_size}")
        if hasattr(config, "image_size"):
            config.image_size = image_size
        check_patches(config, image_size, f"{key}.config.patch_size")
        set_dropout(config, 0.0, given)
        return new_encoder(config, key)
    encoder = half(section.pretrained, "vision", key, section.num_layers, num_top_blocks, pickled)
    return resize_images(encoder, image_size, f"{key}.pretrained")


def text_encoder(
    section: EncoderConfig,
    vocab_size: int,
    pad_token_id: int,
    max_text_length: int,
    num_top_blocks: int = 0,
    key: str = "model.text",
    pickled: bool = False,
) -> PreTrainedModel:
    """The text encoder, whole, fp32, for max_text_length tokens out of vocab_size. pickled: its weights may be a pickle.

    Raises ValueError naming `key`.
    """
    if section.pretrained is None:
        config = new_config(section, "bert", key)
        check_config(config, num_top_blocks, key)
        given = set(section.config or {})
        config.pad_token_id = pad_token_id
        positions = max_text_length + (pad_token_id + 1 if config.model_type in _OFFSET_POSITIONS else 0)
        for name, value in (("vocab_size", vocab_size), ("max_position_embeddings", positions)):
            if name in given and getattr(config, name) < value:
                raise ValueError(f"{key}.config.{name}: {getattr(config, name)} is too small, {value} are needed")
            if name not in given:
                setattr(config, name, value)
        set_dropout(config, 0.0, given)
        config.use_cache = False
        return new_encoder(config, key)
    encoder = half(section.pretrained, "text", key, section.num_layers, num_top_blocks, pickled)
    check_text(encoder.config, vocab_size, max_text_length, f"{key}.pretrained")
    return encoder


def check_text(config: PreTrainedConfig, vocab_size: int, max_text_length: int, key: str) -> None:
    """Raises ValueError where a text encoder is too small for the tokenizer or the texts."""
    config.use_cache = False
    if config.vocab_size < vocab_size:
        raise ValueError(
            f"{key}: its {config.vocab_size} tokens are fewer than the tokenizer's {vocab_size}; "
            "model.text.tokenizer must be the tokenizer that this encoder was trained with"
        )
    positions = getattr(config, "max_position_embeddings", max_text_length)
    if config.model_type in _OFFSET_POSITIONS:
        positions -= (config.pad_token_id or 0) + 1
    if positions < max_text_length:
        raise ValueError(f"data.text_length: {max_text_length} is more than the {positions} tokens that {key} can read")


def new_encoder(config: PreTrainedConfig, key: str) -> PreTrainedModel:
    """An encoder with random weights, fp32, on the current default device. Raises ValueError naming `key`."""
    attention = {"attn_implementation": attention_of(config)}
    kind: Any = _class_of(config)
    build = kind.from_config if kind is AutoModel else kind._from_config
    try:
        return _encoder_alone(build(config, dtype=torch.float32, **attention))
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{key}.config: {' '.join(str(error).split())[:300]}") from error


def _class_of(config: PreTrainedConfig) -> Any:
    name = _WITHOUT_AUTO.get(config.model_type)
    return AutoModel if name is None else getattr(transformers, name)


def _encoder_alone(model: PreTrainedModel) -> PreTrainedModel:
    """T5's stack without the embeddings that it shares with a decoder, which are its own too; another model as it is."""
    return model.encoder if type(model).__name__.endswith("T5EncoderModel") else model


def attention_of(config: PreTrainedConfig) -> str:
    """sdpa, or eager for a type that has no other: masks are made for the one or the other."""
    has_sdpa = getattr(MODEL_MAPPING.get(type(config), None), "_supports_sdpa", True)
    return "sdpa" if has_sdpa else "eager"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of transformers: every rank would print its own."""
    was = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if was:
            transformers.utils.logging.enable_progress_bar()


def half(
    name: str,
    side: str,
    section: str,
    num_layers: int | None = None,
    num_top_blocks: int = 0,
    pickled: bool = False,
) -> PreTrainedModel:
    """An encoder from weights; from a model with both encoders (CLIP, SigLIP, …) its `side`, vision or text.

    num_layers: keep so many of its blocks, from the input on. pickled: its weights may be a pickle.
    Raises ValueError naming a key of `section`.
    """
    key = f"{section}.pretrained"
    config = load_config(name, key)
    own = getattr(config, f"{side}_config", config)
    check_config(own, num_top_blocks, key)
    if num_layers is not None:
        if hasattr(own, "depths") or not isinstance(getattr(own, "num_hidden_layers", None), int):
            raise ValueError(
                f"{section}.num_layers: a {own.model_type} encoder has no one list of blocks; set it to null"
            )
        if num_layers > own.num_hidden_layers:
            raise ValueError(
                f"{section}.num_layers: {num_layers} is more than the {own.num_hidden_layers} blocks of {name}"
            )
        own.num_hidden_layers = num_layers
    model = load_model(name, config, key, pickled)
    part = getattr(model, f"{side}_model", None)
    if part is not None:
        return part
    wanted = "pixel_values" if side == "vision" else "input_ids"
    if model.main_input_name != wanted:
        reads = model.main_input_name
        raise ValueError(f"{key}: {name} is a {config.model_type} model, which reads {reads}, not {wanted}")
    return model


def pooling_of(encoder: PreTrainedModel, side: str) -> str:
    """cls | mean | last: how the encoder's states become one vector. `last` is for texts read from left to right."""
    if side == "vision":
        if getattr(encoder.config, "use_mean_pooling", False):  # BEiT
            return "mean"
        tokens = ("cls_token", "class_embedding")
        return "cls" if any(hasattr(m, t) for m in encoder.modules() for t in tokens) else "mean"
    kind = encoder.config.model_type
    if kind in _CLS_TYPES and not getattr(encoder.config, "is_decoder", False):
        return "cls"
    return _POOLINGS.get(kind) or ("last" if reads_left_to_right(encoder) else "cls")


@torch.no_grad()
def reads_left_to_right(encoder: PreTrainedModel) -> bool:
    """Whether a text encoder's first state ignores later tokens."""
    training = encoder.training
    inputs = probe_inputs(encoder.config, "text", 4)
    ids, mask = inputs["input_ids"][:1], torch.ones(1, 4, dtype=torch.long)
    other = ids.clone()
    other[0, -1] = (other[0, -1] + 1) % encoder.config.vocab_size
    encoder.eval()
    states = [encoder(input_ids=i, attention_mask=mask, return_dict=True).last_hidden_state[0, 0] for i in (ids, other)]
    encoder.train(training)
    return bool(torch.equal(*states))


def width(config: PreTrainedConfig, key: str) -> int:
    """H, the size of an encoder's states. Raises ValueError naming `key` where its config does not say."""
    sizes = getattr(config, "hidden_sizes", None)
    found = getattr(config, "hidden_size", sizes[-1] if sizes else None)
    if not isinstance(found, int):
        raise ValueError(f"{key}: the config of a {config.model_type} encoder has no hidden_size; use another encoder")
    return found


def num_heads(config: PreTrainedConfig, dim: int) -> int:
    """Attention heads of an extra block: as many as the encoder's blocks have, where all have the same, else of size 64."""
    own = getattr(config, "num_attention_heads", None)
    if isinstance(own, int) and dim % own == 0:
        return own
    return next(heads for heads in range(max(1, dim // 64), 0, -1) if dim % heads == 0)


def count_parameters(module: nn.Module) -> int:
    """Number of parameters, partitioned or not."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())


def image_inputs(config: Any, pixel_values: Tensor) -> dict[str, Tensor]:
    """The arguments of an image encoder for images (B, C, S, S): the images or, for SigLIP 2's of any shape, patches."""
    if config.model_type != "siglip2_vision_model":
        return {"pixel_values": pixel_values}
    b, channels, side, _ = pixel_values.shape
    grid, patch = side // config.patch_size, config.patch_size
    patches = pixel_values.view(b, channels, grid, patch, grid, patch).permute(0, 2, 4, 3, 5, 1)
    return {
        "pixel_values": patches.reshape(b, grid * grid, -1),
        "pixel_attention_mask": torch.ones(b, grid * grid, dtype=torch.long, device=pixel_values.device),
        "spatial_shapes": torch.full((b, 2), grid, device=pixel_values.device),
    }


def probe_inputs(config: Any, side: str, length: int = 6) -> dict[str, Tensor]:
    """A fixed tiny input of an encoder, for `towers.check_cut`: one image, or three texts with padding."""
    if side == "vision":
        size = getattr(config, "image_size", 4 * getattr(config, "patch_size", 16))
        size = size if isinstance(size, int) else size[0]
        pixels = torch.linspace(-1, 1, getattr(config, "num_channels", 3) * size * size)
        return image_inputs(config, pixels.sin().view(1, -1, size, size))
    ids = torch.arange(3 * length).view(3, length) % max(2, config.vocab_size - 1)
    mask = torch.ones_like(ids)
    mask[1, length - 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}
