"""An objective that looks at regions and words, for the tests: each text's words find their best region in an image."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from feddra_ds.losses import DroLoss
from feddra_ds.objectives import Features, Objective
from feddra_ds.objectives.base import anchor_distance
from feddra_ds.objectives.features import TOKENS


class TokenMatch(Objective):
    """Image-text matching by the mean over a text's words of their nearest region; anchors on embeddings and regions."""

    needs: ClassVar[frozenset[str]] = frozenset({TOKENS})

    def __call__(self, features: Features, anchors: Features | None, group: torch.distributed.ProcessGroup) -> DroLoss:
        whole = features.gathered(group)
        assert whole.image_tokens is not None
        assert whole.text_tokens is not None
        assert whole.text_mask is not None
        assert whole.text_ids is not None
        assert whole.text_ids.shape == whole.image.shape[:1]
        words = torch.einsum("ird,jtd->ijtr", whole.image_tokens, whole.text_tokens).amax(dim=-1)
        mask = whole.text_mask.float()
        scores = (words * mask).sum(dim=-1) / mask.sum(dim=-1) / whole.temperature
        target = torch.arange(len(scores))
        alignment = cross_entropy(scores, target, reduction="none") + cross_entropy(scores.T, target, reduction="none")
        anchor = None
        if anchors is not None:
            theirs = anchors.gathered(group)
            assert theirs.image_tokens is not None
            assert torch.allclose(theirs.image.norm(dim=-1), torch.ones(len(theirs.image)), atol=1e-4)
            regions = (whole.image_tokens - theirs.image_tokens).square().mean(dim=(1, 2))
            anchor = anchor_distance(whole, theirs) + regions
        return self.equation_3(alignment, anchor)

    def per_pair(self, features: Features, text_ids: Tensor) -> Tensor:
        scores = features.image @ features.text.T / features.temperature
        target = torch.arange(len(scores))
        return cross_entropy(scores, target, reduction="none") + cross_entropy(scores.T, target, reduction="none")

    def chance(self, batch_size: int) -> float:
        return 2 * math.log(batch_size)
