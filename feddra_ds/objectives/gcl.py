"""Global contrastive loss: each pair against all pairs of its client, by moving averages over the batches.

Yuan et al., "Provable Stochastic Optimization for Global Contrastive Learning: Small Batch Does Not Harm Performance"
(SogCLR), ICML 2022, arXiv 2202.12387, and Wei et al., "FastCLIP", arXiv 2407.01445 (version v3 where τ is learned). With
    g_j = mean over the batch's other k of exp((S_jk − S_jj)),  S = u vᵀ / τ,      and g'_j with S_kj
    u_j ← (1 − γ) u_j + γ g_j  of every pair, kept from batch to batch; the first time u_j = g_j
the loss of a pair is (τ/τ₀) (log(ε + u_j) + log(ε + u'_j) + 2ρ), whose gradient is taken through g_j alone, as
∇g_j / (ε + u_j); τ₀ is the initial τ, and ρ is there where τ is learned. It is below 0 for pairs that match.

B pairs of this rank, W ranks, D embedding size.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from feddra_ds import losses
from feddra_ds.objectives.base import Objective, anchor_distance
from feddra_ds.objectives.features import Features
from feddra_ds.objectives.options import ObjectiveOptions

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch import Tensor


class GclOptions(ObjectiveOptions):
    """Keys of `gcl`."""

    moving_average: float = Field(0.9, gt=0, le=1)
    """γ: how much of u the newest batch is; 1 forgets all others."""
    epsilon: float = Field(1e-14, gt=0)
    """ε beside u."""
    rho: float = Field(6.5, ge=0)
    """ρ, which holds a learned temperature up (FastCLIP-v3); without meaning where it is fixed."""


class Gcl(Objective):
    """ℓ = λ₁ (τ/τ₀) (log(ε + u) + log(ε + u') + 2ρ) + λ₂ ANC. L_i is equation (1), which other objectives have too."""

    Options = GclOptions
    options: GclOptions
    num_kept: ClassVar[int] = 2
    """log u and log u' of each pair."""

    def __call__(self, features: Features, anchors: Features | None, group: dist.ProcessGroup | None) -> losses.DroLoss:
        import torch

        from feddra_ds.distributed.collectives import gather

        options = self.options
        found = log_ratios(features, group)
        kept = torch.logaddexp(self._averaged(features, found.detach()), found.new_tensor(options.epsilon).log())
        # its value is log(ε + u), its gradient that of g / (ε + u)
        terms = kept + (found.detach() - kept).exp() * (found - found.detach())
        alignment = terms.sum(1)
        if options.learnable_temperature:
            alignment = alignment + 2 * options.rho
        alignment = alignment * (features.temperature / options.temperature)
        anchor = torch.zeros_like(alignment)
        if anchors is not None:
            anchor = anchor_distance(features, anchors, options.anchor_reduction)
        per_sample = options.alignment_weight * alignment + options.anchor_weight * anchor
        total = gather(per_sample, group, "slice").mean()
        return losses.DroLoss(total, per_sample.detach(), alignment.detach(), anchor.detach())

    def remember(self, features: Features, group: dist.ProcessGroup | None) -> Tensor:
        return self._averaged(features, log_ratios(features, group).detach())

    def _averaged(self, features: Features, newest: Tensor) -> Tensor:
        """(B, 2) log u and log u' after this batch, from its log g and log g'."""
        import torch

        if features.kept is None:
            return newest
        before, share = features.kept.detach().to(newest.dtype), self.options.moving_average
        if share == 1:
            return newest
        mixed = torch.logaddexp(before + math.log1p(-share), newest + math.log(share))
        return torch.where(before.isnan(), newest, mixed)

    def per_pair(self, features: Features, text_ids: Tensor) -> Tensor:
        return losses.alignment_per_pair(features.image, features.text, text_ids, float(features.temperature))

    def chance(self, batch_size: int) -> float:
        return 2 * math.log(batch_size)


def log_ratios(features: Features, group: dist.ProcessGroup | None) -> Tensor:
    """(B, 2) log g and log g' of this rank's pairs against those of all ranks: two panels of B × W·B numbers."""
    import torch

    from feddra_ds.distributed.collectives import gather, group_rank

    image, text, rows = features.image, features.text, len(features.image)
    own = (image * text).sum(1, keepdim=True)
    out = []
    for mine, other in ((image, text), (text, image)):
        every = gather(other, group, "sum")
        ratios = (mine @ every.T - own) / features.temperature
        itself = torch.arange(len(every), device=image.device) == (
            torch.arange(rows, device=image.device)[:, None] + group_rank(group) * rows
        )
        out.append(ratios.masked_fill(itself, -torch.inf).logsumexp(1) - math.log(max(len(every) - 1, 1)))
    return torch.stack(out, 1)
