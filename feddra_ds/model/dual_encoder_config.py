"""The config of a dual encoder, of transformers' kind. Importing this module makes AutoConfig know it.

It imports nothing of the model, because feddra_ds imports it as soon as transformers' auto classes are imported.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


class DualEncoderConfig(PreTrainedConfig):
    """Everything that rebuilds a DualEncoder; `vision_config` and `text_config` describe the whole encoders."""

    model_type = "feddra_dual_encoder"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="vit"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="bert"),
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    embedding_dim: int = 128
    num_top_blocks: int = 1
    num_extra_blocks: int = 0
    head_kind: str = "mlp"
    head_hidden_dim: int = 2048
    head_norm: str = "layernorm"
    head_output_norm: str = "none"
    head_bias: bool = False  # of a linear head
    vision_pooling: str = "cls"
    text_pooling: str = "cls"
    use_poolers: bool = False
    text_padding: int | None = None  # the token up to the encoder's whole length, read like any other: SigLIP's habit
    temperature: float = 0.07
    learnable_temperature: bool = False
    learned: dict | None = None  # what the objective learns itself: heads.Learned
    image_size: int = 224
    text_length: int = 112
    initializer_range: float = 0.02

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers', and whoever reads such a config is given the classes that go with it: see model/auto.py."""
        import_module("feddra_ds.model.auto").register()
        return super().from_dict(config_dict, **kwargs)


AutoConfig.register(DualEncoderConfig.model_type, DualEncoderConfig, exist_ok=True)
