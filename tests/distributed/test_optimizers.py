"""Muon and clipping in a real engine: its steps are those of one process on the whole batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import assemble, on_ranks, pieces_of, tree, zero

LR = 0.02


def muon_steps(config_tree: dict[str, Any]) -> dict[str, Any]:
    """Three steps of the engine, and the same of a plain model in this process; the largest gap by kind of parameter."""
    import torch
    from helpers import build_run, finish

    from feddra_ds.config.load import from_dict
    from feddra_ds.model.build import model_of, tokenizer_of

    run = build_run(config_tree)
    engine, config = run.engine, from_dict(config_tree)
    plain = model_of(config, tokenizer_of(config))
    masters = {n: torch.nn.Parameter(p.detach().clone()) for n, p in plain.named_parameters()}
    with torch.no_grad():
        for name, _, values in pieces_of(engine):  # ZeRO 0: every rank holds all
            masters[name].view(-1).copy_(torch.from_numpy(values))
    start = {n: m.detach().clone().numpy().ravel() for n, m in masters.items()}
    matrices = set(plain.matrix_parameter_names())
    optimizers = [
        torch.optim.Muon(
            [masters[n] for n in matrices], lr=LR, momentum=0.95, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW([m for n, m in masters.items() if n not in matrices], lr=LR, weight_decay=0.0, fused=True),
    ]
    plain.to(engine.dtype).train()
    engine.train()
    draw = torch.Generator().manual_seed(5)
    aims = torch.randn(2, 4, 16, generator=draw)
    for step in range(3):
        batch = {
            "pixel_values": torch.randn(4, 3, 32, 32, generator=draw).to(engine.dtype),
            "input_ids": torch.randint(5, 6000, (4, 16), generator=draw),
            "attention_mask": torch.ones(4, 16, dtype=torch.int64),
        }
        engine.set_learning_rates({"aligner": LR, "backbone": 0.0 if step == 0 else LR})
        out = engine(**batch, freeze_backbone=step == 0)
        engine.backward((out.image_embeds * aims[0] + out.text_embeds * aims[1]).sum() / engine.ranks_per_slot)
        assert engine.step()
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                parameter.copy_(masters[name])
        plain.zero_grad()
        out = plain(**batch, freeze_backbone=step == 0)
        (out.image_embeds * aims[0] + out.text_embeds * aims[1]).sum().backward()
        for name, parameter in plain.named_parameters():
            masters[name].grad = None if parameter.grad is None else parameter.grad.float()
        for optimizer in optimizers:
            optimizer.step()
    got = pieces_of(engine)
    finish(run)
    wanted = {n: m.detach().numpy().ravel() for n, m in masters.items()}
    return {"pieces": got, "wanted": wanted, "start": start, "matrices": matrices}


@pytest.mark.parametrize(
    ("world_size", "bf16"),
    [(1, False), pytest.param(2, False, marks=pytest.mark.slow), pytest.param(1, True, marks=pytest.mark.slow)],
)
def test_muon_at_zero_0_is_a_plain_muon(dataset: Path, tmp_path: Path, world_size: int, bf16: bool) -> None:
    config = tree(
        dataset, tmp_path / "run", optimizer__name="muon", optimizer__lr=LR, topology__ranks_per_slot=world_size,
        deepspeed=zero(0, bf16=bf16), evaluation__every=0,
    )  # fmt: skip
    for seen in on_ranks(muon_steps, world_size, config):
        got = assemble([seen["pieces"]])
        for name, wanted in seen["wanted"].items():
            assert np.allclose(got[name], wanted, atol=1e-5), (name, np.abs(got[name] - wanted).max())
        assert any(np.abs(seen["wanted"][n] - seen["start"][n]).max() > 0.5 * LR for n in seen["matrices"])


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
