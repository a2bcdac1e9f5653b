"""Muon and clipping in a real engine: its steps are those of one process on the whole batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import assemble, on_ranks, pieces_of, tree, zero

LR = 0.02


def muon_batches(dtype: Any) -> Iterator[tuple[dict[str, Any], Any, bool]]:
    """Three batches, what their embeddings are drawn to, and whether the backbone rests."""
    import torch

    draw = torch.Generator().manual_seed(5)
    aims = torch.randn(2, 4, 16, generator=draw)
    for step in range(3):
        batch = {
            "pixel_values": torch.randn(4, 3, 32, 32, generator=draw).to(dtype),
            "input_ids": torch.randint(5, 6000, (4, 16), generator=draw),
            "attention_mask": torch.ones(4, 16, dtype=torch.int64),
        }
        yield batch, aims, step == 0


def muon_engine(config_tree: dict[str, Any]) -> dict[str, Any]:
    """The engine's masters before and after three steps: this rank's pieces."""
    from helpers import build_run, finish

    run = build_run(config_tree)
    engine = run.engine
    before = pieces_of(engine)
    engine.train()
    for batch, aims, frozen in muon_batches(engine.dtype):
        engine.set_learning_rates({"aligner": LR, "backbone": 0.0 if frozen else LR})
        out = engine(**batch, freeze_backbone=frozen)
        engine.backward((out.image_embeds * aims[0] + out.text_embeds * aims[1]).sum() / engine.ranks_per_slot)
        assert engine.step()
    after = pieces_of(engine)
    finish(run)
    return {"before": before, "after": after}


def plain_muon(config_tree: dict[str, Any], start: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], set[str]]:
    """The same three steps of a plain model in one process, by torch's own optimizers; and which parameters are Muon's."""
    import torch

    from feddra_ds.config.load import from_dict
    from feddra_ds.model.build import model_of, tokenizer_of

    config = from_dict(config_tree)
    plain = model_of(config, tokenizer_of(config))
    masters = {
        n: torch.nn.Parameter(torch.from_numpy(start[n]).clone().view(p.shape)) for n, p in plain.named_parameters()
    }
    matrices = set(plain.matrix_parameter_names())
    about = {"lr": LR, "weight_decay": config.optimizer.weight_decay}
    optimizers = [
        torch.optim.Muon([masters[n] for n in matrices], momentum=0.95, adjust_lr_fn="match_rms_adamw", **about),
        torch.optim.AdamW([m for n, m in masters.items() if n not in matrices], fused=True, **about),
    ]
    dtype = torch.bfloat16 if "bf16" in config.deepspeed else torch.float32
    plain.to(dtype).train()
    for batch, aims, frozen in muon_batches(dtype):
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                parameter.copy_(masters[name])
        plain.zero_grad()
        out = plain(**batch, freeze_backbone=frozen)
        (out.image_embeds * aims[0] + out.text_embeds * aims[1]).sum().backward()
        for name, parameter in plain.named_parameters():
            masters[name].grad = None if parameter.grad is None else parameter.grad.float()
        for optimizer in optimizers:
            optimizer.step()
    return {n: m.detach().numpy().ravel() for n, m in masters.items()}, matrices


SLOW, REST = pytest.mark.slow, pytest.mark.exhaustive


@pytest.mark.parametrize(
    ("world_size", "stage", "bf16"),
    [
        (1, 0, False),
        pytest.param(2, 0, False, marks=REST),
        pytest.param(1, 0, True, marks=SLOW),
        pytest.param(2, 1, False, marks=REST),
        pytest.param(2, 2, False, marks=SLOW),
        pytest.param(2, 3, False, marks=SLOW),
        pytest.param(2, 2, True, marks=REST),
    ],
)
def test_muon_is_a_plain_muon_at_every_stage(
    dataset: Path, tmp_path: Path, world_size: int, stage: int, bf16: bool
) -> None:
    config = tree(
        dataset, tmp_path / "run", optimizer__name="muon", optimizer__lr=LR, topology__ranks_per_slot=world_size,
        deepspeed=zero(stage, bf16=bf16), evaluation__every=0,
    )  # fmt: skip
    ranks = on_ranks(muon_engine, world_size, config)
    start, got = (
        assemble([seen[when] for seen in ranks[: world_size if stage else 1]]) for when in ("before", "after")
    )
    ((wanted, matrices),) = on_ranks(plain_muon, 1, config, start)
    far = {}
    for name, values in wanted.items():
        gap, way = (float(np.linalg.norm(x.astype(np.float64) - values)) for x in (got[name], start[name]))
        if stage < 3:
            assert gap <= 1e-5 * np.sqrt(values.size), (name, gap, way)
        elif name in matrices:
            far[name] = gap / way
    # ZeRO 3 rounds otherwise, which Newton-Schulz steps enlarge in directions that have no gradient
    assert max(far.values(), default=0.0) <= 0.05, sorted(far.items(), key=lambda x: -x[1])[:12]
    assert any(np.abs(wanted[n] - start[n]).max() > 0.5 * LR for n in matrices)


def clipped_steps(config_tree: dict[str, Any]) -> list[Any]:
    """How far a step of plain gradient descent goes in each stage, over the slot's ranks: squares of this rank's pieces."""
    import torch
    from helpers import build_run, finish

    run = build_run(config_tree)
    engine = run.engine
    engine.train()
    draw = torch.Generator().manual_seed(5)
    batch = {
        "pixel_values": torch.randn(4, 3, 32, 32, generator=draw),
        "input_ids": torch.randint(5, 6000, (4, 16), generator=draw),
        "attention_mask": torch.ones(4, 16, dtype=torch.int64),
    }
    seen = []
    for trains_backbone in (False, True):
        before = pieces_of(engine)
        engine.set_learning_rates({"aligner": 1.0, "backbone": 1.0 if trains_backbone else 0.0})
        out = engine(**batch, freeze_backbone=not trains_backbone)
        engine.backward(100 * (out.image_embeds[:, 0] + out.text_embeds[:, 0]).sum())
        assert engine.step()
        after = pieces_of(engine)
        seen.append([(n, i, v - w) for (n, i, v), (_, _, w) in zip(after, before, strict=True)])
    finish(run)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_clipping_bounds_the_gradient_of_what_trains(dataset: Path, tmp_path: Path, stage: int) -> None:
    config = tree(
        dataset, tmp_path / "run", optimizer__lr=1.0, topology__ranks_per_slot=2, evaluation__every=0,
        deepspeed=zero(stage) | {"gradient_clipping": 0.01},
    )  # fmt: skip
    ranks = on_ranks(clipped_steps, 2, config)
    for number, trains in enumerate(("aligner", "")):
        moved = assemble([seen[number] for seen in ranks])
        assert all((np.abs(v).max() > 0) <= name.startswith(trains) for name, v in moved.items())
        norm = np.sqrt(sum(np.square(v.astype(np.float64)).sum() for v in moved.values()))
        assert norm == pytest.approx(0.01, rel=1e-3)
