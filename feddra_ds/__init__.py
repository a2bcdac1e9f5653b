"""Federated distributionally robust vision-language pre-training on DeepSpeed (FedDRA, arXiv 2404.03854)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from feddra_ds.common.after_import import after_import

if TYPE_CHECKING:
    from feddra_ds.evaluation.evaluate import evaluate
    from feddra_ds.model.folder import load_pretrained
    from feddra_ds.run.train import train

__version__ = "0.1.0"
__all__ = ["__version__", "evaluate", "load_pretrained", "train"]

# name: where it is. Imported on demand, so that importing the package stays light.
_HOMES = {
    "evaluate": "feddra_ds.evaluation.evaluate",
    "load_pretrained": "feddra_ds.model.folder",
    "train": "feddra_ds.run.train",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


# AutoModel, AutoProcessor and pipelines take a model of ours once feddra_ds is imported, before or after transformers
after_import(
    "transformers.models.auto.configuration_auto", lambda: import_module("feddra_ds.model.dual_encoder_config")
)
