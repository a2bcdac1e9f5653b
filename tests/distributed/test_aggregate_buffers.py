"""Buffers in the server's average: floating ones are averaged, integers are the first client's or stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import build_run, finish, on_each, on_ranks, tree


def average_by_hand(config: dict[str, Any], included: list[int]) -> dict[str, Any]:
    """Clients of this one slot whose every float is index + 1 and every integer 10 · (index + 1), averaged uniformly."""
    from feddra_ds.checkpoint.format import SHARED
    from feddra_ds.config.load import from_dict
    from feddra_ds.federation.schedule import stages_of_round
    from feddra_ds.run.build import build

    run = build(from_dict(config))
    server = run.server
    before = [b.clone() for b in server.states[SHARED]["buffers"]]
    stage = stages_of_round(run.config, 0)[-1]
    server.begin(stage)
    for client in run.clients:
        if client.index in included:
            value = client.index + 1
            state = {
                part: [torch.full_like(t, value if t.is_floating_point() else 10 * value) for t in tensors]
                for part, tensors in server.states[SHARED].items()
            }
            server.add(client, 0.5, state)
    server.finish(run.topology, 0.5 * len(included))
    after = server.states[SHARED]["buffers"]
    out = {
        "floats": sorted({float(v) for b in after if b.is_floating_point() for v in b}),
        "integers": [b.tolist() for b in after if not b.is_floating_point()],
        "integers before": [b.tolist() for b in before if not b.is_floating_point()],
        "weights": sorted({float(v) for t in server.states[SHARED]["aligner"] for v in t}),
    }
    finish(run)
    return out


@pytest.mark.parametrize(("place", "precision"), [("norm", "fp32"), ("norm", "int8"), ("output_norm", "fp32")], ids=str)
def test_buffers(dataset: Path, tmp_path: Path, place: str, precision: str) -> None:
    settings = {f"model__head__{place}": "batchnorm", "aggregate__precision": precision}
    jobs = [(tree(dataset, tmp_path / str(first), **settings), [first, 2]) for first in (0, 1)]
    (both,), (others,) = on_each(average_by_hand, jobs)
    assert both["integers before"]  # there are counters
    assert all(value == [0] for value in both["integers before"])
    assert both["floats"] == both["weights"] == [2.0]  # (1 + 3) / 2
    assert all(value == [10] for value in both["integers"])  # the first client's
    assert others["floats"] == others["weights"] == [2.5]  # (2 + 3) / 2
    assert others["integers"] == others["integers before"]  # the first client is left out


def refusal(config: dict[str, Any]) -> list[str]:
    """What a build says is wrong with a config."""
    from feddra_ds.common.errors import ConfigError

    with pytest.raises(ConfigError) as caught:
        build_run(config)
    return caught.value.problems


@pytest.mark.parametrize("place", ["norm", "output_norm"])
def test_batchnorm_over_two_ranks_of_a_client_needs_cuda(dataset: Path, tmp_path: Path, place: str) -> None:
    config = tree(dataset, tmp_path, **{f"model__head__{place}": "batchnorm", "topology__ranks_per_slot": 2})
    for (problem,) in on_ranks(refusal, 2, config):
        assert problem.startswith(f"model.head.{place}: batchnorm over several ranks of a client needs CUDA")
