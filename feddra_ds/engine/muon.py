"""Muon for matrices and AdamW for the rest, as one optimizer of one learning rate (Jordan et al. 2024; Liu et al. 2502.16982).

torch's Muon replaces a matrix's momentum by the nearest orthogonal matrix (five Newton-Schulz steps, in bfloat16) and
scales it to the root mean square that AdamW's steps have, 0.2 √max(rows, columns), so that both take `optimizer.lr`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class MuonAndAdamW(torch.optim.Optimizer):
    """Steps the groups with `is_muon` by torch.optim.Muon and the others by torch.optim.AdamW.

    The group dicts and the state are shared with the two, so that a learning rate, a master weight or a moment that is
    changed from outside is theirs as well.
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, lr: float, momentum: float, betas: tuple[float, float], eps: float
    ):
        super().__init__(groups, {"lr": lr})
        muon, rest = self._sorted()
        self._muon, self._adamw = None, None
        if muon:
            self._muon = torch.optim.Muon(muon, lr=lr, momentum=momentum, adjust_lr_fn="match_rms_adamw")
            self._muon.state = self.state
        if rest:
            self._adamw = torch.optim.AdamW(rest, lr=lr, betas=betas, eps=eps, fused=True)
            self._adamw.state = self.state

    def _sorted(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The present groups: those of matrices, and the others."""
        groups = self.param_groups
        return [g for g in groups if g["is_muon"]], [g for g in groups if not g["is_muon"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Tensor | None:  # type: ignore[override]
        """One step of the groups that `param_groups` holds now."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for inner, groups in zip((self._muon, self._adamw), self._sorted(), strict=True):
            if inner is not None and groups:
                inner.param_groups = groups
                inner.step()
        return loss
