"""Federated distributionally robust vision-language pre-training on DeepSpeed (FedDRA, arXiv 2404.03854)."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "load_pretrained"]


def __getattr__(name: str) -> Any:
    if name == "load_pretrained":  # on demand: importing the package stays light
        from feddra_ds.model.folder import load_pretrained

        return load_pretrained
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
