"""An image encoder for another image size than its own: its position embeddings are interpolated."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel


def check_patches(config: PreTrainedConfig, image_size: int, key: str) -> None:
    """Raises ValueError unless the patches tile the image."""
    patch = getattr(config, "patch_size", 1)
    patch = patch[0] if isinstance(patch, (list, tuple)) else patch
    if isinstance(patch, int) and patch > 0 and image_size % patch:
        raise ValueError(f"{key}: {patch} does not divide data.image_size = {image_size}")


@torch.no_grad()
def resize_images(encoder: PreTrainedModel, image_size: int, key: str) -> PreTrainedModel:
    """The encoder for another image size: position embeddings interpolated (bicubic), all else unchanged.

    Raises ValueError naming `key` where something else depends on the size.
    """
    check_patches(encoder.config, image_size, key)
    old = getattr(encoder.config, "image_size", image_size)
    old = old[0] if isinstance(old, (list, tuple)) else old
    if old == image_size:
        return encoder
    config = type(encoder.config).from_dict({**encoder.config.to_dict(), "image_size": image_size})
    config._attn_implementation = encoder.config._attn_implementation
    resized = type(encoder)(config)
    target = resized.state_dict()
    for name, tensor in encoder.state_dict().items():
        if name not in target:
            continue  # a part that this size does not have
        if target[name].shape != tensor.shape:
            grids = old // config.patch_size, image_size // config.patch_size
            if "position_embedding" not in name:
                raise ValueError(f"{key}: {name} depends on the image size {old}; set data.image_size to {old}")
            tensor = interpolate_positions(tensor, *grids, key=f"{key}: {name}")
        target[name].copy_(tensor)
    return resized.eval()


def interpolate_positions(table: Tensor, old_grid: int, new_grid: int, key: str) -> Tensor:
    """Position embeddings (…, prefix + old_grid², H) → (…, prefix + new_grid², H); prefix rows (CLS) are kept."""
    prefix = table.shape[-2] - old_grid**2
    if prefix < 0 or table.ndim > 3:
        raise ValueError(f"{key} does not hold one row per patch, so it cannot be interpolated")
    rows = table.reshape(-1, table.shape[-1])
    grid = rows[prefix:].T.reshape(1, -1, old_grid, old_grid).float()
    grid = F.interpolate(grid, size=(new_grid, new_grid), mode="bicubic", align_corners=False)
    out = torch.cat([rows[:prefix], grid.flatten(2)[0].T.to(rows.dtype)])
    return out.reshape(*table.shape[:-2], *out.shape)
