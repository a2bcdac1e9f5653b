"""Retrieval and its chance level."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from feddra_ds.federation.validation import Embedded, retrieval


def sample(n: int, num_texts: int, seed: int, noise: float | None) -> Embedded:
    """Unit embeddings; texts repeat where num_texts < n; noise None makes images and texts unrelated."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.arange(n) % num_texts
    text = F.normalize(torch.randn(num_texts, 16, generator=g), dim=-1)[ids]
    image = torch.randn(n, 16, generator=g)
    image = F.normalize(image if noise is None else text + noise * image, dim=-1)
    return Embedded(image, text, ids, 0.07)


@pytest.mark.parametrize("num_texts", [40, 13])
def test_a_perfect_model_recalls_all_and_a_random_one_is_at_chance(num_texts: int) -> None:
    perfect = retrieval(sample(40, num_texts, 0, 0.0))
    assert perfect["i2t_recall@1"] == perfect["t2i_recall@1"] == 1.0
    many = [retrieval(sample(40, num_texts, seed, None)) for seed in range(300)]
    for k in (1, 5, 10):
        found = np.mean([m[f"{way}_recall@{k}"] for m in many for way in ("i2t", "t2i")])
        assert found == pytest.approx(many[0][f"chance@{k}"], abs=0.03)
    assert many[0]["pairs"] == 40
    if num_texts == 40:
        assert many[0]["chance@10"] == pytest.approx(10 / 40)


def test_ties_count_against_the_match_and_small_galleries_leave_k_out() -> None:
    collapsed = Embedded(torch.ones(6, 4) / 2, torch.ones(6, 4) / 2, torch.arange(6), 0.07)
    told = retrieval(collapsed)
    assert told["i2t_recall@1"] == told["t2i_recall@5"] == 0.0
    assert "i2t_recall@10" not in told
    assert "chance@10" not in told
