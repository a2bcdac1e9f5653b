"""PIL images and texts → the tensors that a DualEncoder takes; needs neither torchvision nor a network.

The pixels equal those of the evaluation transform (data/images.py): RGB, resized to a square, bilinear, normalised.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import AutoTokenizer, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from transformers.utils import cached_file

from feddra_ds.common.parse import OBJECT, parse_json
from feddra_ds.common.text import first_line
from feddra_ds.common.trust import OF_PROCESSOR, refuse_code, safely
from feddra_ds.config.schema import ModelConfig
from feddra_ds.data.loading.images import to_rgb
from feddra_ds.model.encoders import local_or_hub

HALF = (0.5, 0.5, 0.5)
_TEXT_INPUTS = ("input_ids", "attention_mask")


class DualEncoderProcessor(ProcessorMixin):
    """`processor(images=[PIL…], text=[str…], return_tensors="pt", padding=True)`; see __call__.

    Attributes: image_processor and tokenizer (transformers'), image_mean and image_std (three numbers each),
    image_size (pixels), text_length (tokens; None: as the tokenizer says).
    """

    def __init__(
        self,
        image_processor: ViTImageProcessorPil,
        tokenizer: PreTrainedTokenizerBase,
        text_length: int | None = None,
    ):
        own = copy.deepcopy(tokenizer)
        if text_length is not None:
            own.model_max_length = text_length
        # what forward takes; the second is written to tokenizer_config.json
        own.model_input_names = own.init_kwargs["model_input_names"] = list(_TEXT_INPUTS)
        super().__init__(image_processor, own)
        self.text_length = int(own.model_max_length)
        self.image_size: int = image_processor.size["height"]
        self.image_mean = tuple(float(v) for v in image_processor.image_mean)
        self.image_std = tuple(float(v) for v in image_processor.image_std)

    def __call__(
        self,
        images: Image.Image | Sequence[Image.Image] | None = None,
        text: str | Sequence[str] | None = None,
        return_tensors: str | None = None,
        padding: bool | str = True,
    ) -> BatchFeature:
        """pixel_values (B, 3, S, S) fp32 of `images`; input_ids and attention_mask (B, T) of `text`.

        Texts are cut at text_length tokens. Either may be left out. Raises ValueError when both are.
        """
        if images is None and text is None:
            raise ValueError("processor: give images, text, or both")
        data: dict[str, Any] = {}
        if images is not None:
            rgb = [to_rgb(image) for image in ([images] if isinstance(images, Image.Image) else images)]
            data["pixel_values"] = self.image_processor(images=rgb, return_tensors=return_tensors)["pixel_values"]
        if text is not None:
            tokens = self.tokenizer(
                [text] if isinstance(text, str) else list(text),
                padding=padding,
                truncation=True,
                max_length=self.text_length,
                return_tensors=return_tensors,
            )
            data |= {name: tokens[name] for name in _TEXT_INPUTS}
        return BatchFeature(data)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write preprocessor_config.json and the tokenizer's files, which transformers reads without feddra_ds."""
        self.image_processor.save_pretrained(save_directory)
        self.tokenizer.save_pretrained(save_directory)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> DualEncoderProcessor:
        """Read what save_pretrained wrote, in a folder or at a hub id, with the image processor that needs no torchvision.

        options: transformers' own, such as revision. Raises ValueError naming the folder where it is not all there.
        """
        refuse_code(folder, "processor", OF_PROCESSOR)
        options = {**safely(folder), **options, "trust_remote_code": False}
        try:
            image_processor = ViTImageProcessorPil.from_pretrained(folder, **options)
            return cls(image_processor, AutoTokenizer.from_pretrained(folder, **options))
        except Exception as error:  # files that are missing, or of wrong types
            raise ValueError(f"{folder} holds no processor: {first_line(error)}") from error


def build_processor(
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    image_size: int,
    text_length: int,
    image_mean: tuple[float, ...] | None = None,
    image_std: tuple[float, ...] | None = None,
) -> DualEncoderProcessor:
    """The processor of a new model: mean and standard deviation as given, else the pretrained vision model's, else 0.5."""
    source, key = config.vision.pretrained, "model.vision.pretrained"
    if config.pretrained is not None:
        source, key = config.pretrained, "model.pretrained"
    mean, std = (HALF, HALF) if source is None else image_statistics(source, key)
    mean, std = image_mean or mean, image_std or std
    size = {"height": image_size, "width": image_size}
    image_processor = ViTImageProcessorPil(size=size, do_convert_rgb=True, image_mean=list(mean), image_std=list(std))
    return DualEncoderProcessor(image_processor, tokenizer, text_length)


def image_statistics(name: str, key: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation in the image processor's config of a folder or hub id; 0.5 where it has none.

    Raises ValueError naming `key` where `name` is no model or its config is not what it should be.
    """
    source = local_or_hub(name, key)
    revision = safely(source)["revision"]
    for file in ("preprocessor_config.json", "processor_config.json"):
        try:
            path = cached_file(source, file, revision=revision, _raise_exceptions_for_missing_entries=False)
            values = parse_json(Path(path).read_bytes(), OBJECT) if path else {}
        except (OSError, ValueError) as error:
            raise ValueError(f"{key}: cannot read {file} of {name}: {first_line(error)}") from error
        values = inner if isinstance(inner := values.get("image_processor"), dict) else values
        if "image_mean" in values and "image_std" in values:
            try:
                mean, std = (tuple(map(float, values[k])) for k in ("image_mean", "image_std"))
            except (TypeError, ValueError, OverflowError):
                mean = std = ()
            if len(mean) != 3 or len(std) != 3 or not min(std) > 0 or not np.isfinite([*mean, *std]).all():
                raise ValueError(f"{key}: {file} of {name}: image_mean and image_std must be three numbers, std > 0")
            return mean, std
    return HALF, HALF
