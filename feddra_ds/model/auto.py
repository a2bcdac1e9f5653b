"""What transformers' auto classes and pipelines know of a dual encoder."""

from __future__ import annotations

from transformers import AutoModel, AutoModelForZeroShotImageClassification, AutoProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES

from feddra_ds.model.dual_encoder import DualEncoder
from feddra_ds.model.dual_encoder_config import DualEncoderConfig
from feddra_ds.model.processor import DualEncoderProcessor


def register() -> None:
    """Make AutoModel, AutoModelForZeroShotImageClassification and AutoProcessor know the dual encoder."""
    for auto in (AutoModel, AutoModelForZeroShotImageClassification):
        auto.register(DualEncoderConfig, DualEncoder, exist_ok=True)
    AutoProcessor.register(DualEncoderConfig, DualEncoderProcessor, exist_ok=True)
    # the pipeline looks for names alone before it says that a model is not supported
    MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES[DualEncoderConfig.model_type] = DualEncoder.__name__
