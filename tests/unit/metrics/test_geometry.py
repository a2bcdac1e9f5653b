"""Alignment, uniformity and the modality gap against torch's distances."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from feddra_ds.metrics.geometry import geometry


def test_geometry_is_that_of_plain_distances() -> None:
    rng = np.random.default_rng(0)
    x, y = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in rng.standard_normal((2, 700, 5)))
    found = geometry(np.vstack([x, np.full((1, 5), np.nan)]), np.vstack([y, y[:1]]))
    assert found is not None
    assert found["alignment"] == pytest.approx(np.mean([np.sum((a - b) ** 2) for a, b in zip(x, y, strict=True)]))
    for name, z in (("image_uniformity", x), ("text_uniformity", y)):
        expected = torch.pdist(torch.from_numpy(z)).pow(2).mul(-2).exp().mean().log()  # the paper's own code
        assert found[name] == pytest.approx(float(expected), abs=1e-9)
    assert found["modality_gap"] == pytest.approx(np.linalg.norm(x.mean(0) - y.mean(0)))
    assert geometry(x[:1], y[:1]) is None
