"""The fused loss of a client's batch, equations (1) to (3): tensors in, loss out. Usable alone."""

from feddra_ds.losses.fused import fused_dro_loss
from feddra_ds.losses.reference import alignment_with_positives
from feddra_ds.losses.types import DroLoss

__all__ = ["DroLoss", "alignment_with_positives", "fused_dro_loss"]
