"""A run directory as training leaves it, without training: config.yaml, metrics.jsonl, model/, beside a small dataset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from data_helpers import encoded

from feddra_ds.config.load import dump, from_dict
from feddra_ds.config.schema import Config
from feddra_ds.data.format.writer import DatasetWriter
from feddra_ds.model.build import model_of, tokenizer_of
from feddra_ds.model.folder import save_model
from feddra_ds.model.processor import build_processor

CLIENTS = ["north", "south_and_the_islands", "west"]
HELD_OUT = "beyond"
BODY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


def make_data(root: Path) -> Path:
    """Three clients of 12 + 8 pairs and a held-out one of 9 test pairs; two pairs share a text, the third client's
    val has none. Labels: odd (0/1), view (three values)."""
    with DatasetWriter(root) as writer:
        for client in CLIENTS:
            for split, count in (("train", 12), ("val", 0 if client == "west" else 8)):
                _write(writer, client, split, count)
        _write(writer, HELD_OUT, "test", 9)
    info = json.loads((root / "dataset.json").read_text())
    (root / "dataset.json").write_text(json.dumps(info | {"held_out": [HELD_OUT], "clients": CLIENTS}))
    return root


def _write(writer: DatasetWriter, client: str, split: str, count: int) -> None:
    for number in range(count):
        text = f"<b>report</b> {number // 2 if number < 2 else number} & {client}"
        labels = {"odd": number % 2, "view": ("PA", "AP", "lateral")[number % 3]}
        info = {"labels": labels, "site": client, "patient": f"p{number // 2}"}
        writer.add(client, split, f"{split}{number:04d}", image=encoded(7 * number + len(client)), text=text, info=info)


def make_config(run: Path, data: Path, rounds: int = 3, **sections: Any) -> Config:
    """The config of a tiny run."""
    tree: dict[str, Any] = {
        "run": {"output_dir": str(run), "trackers": [], "device": "cpu"},
        "data": {"root": str(data), "batch_size": 4, "image_size": 16, "text_length": 16},
        "model": {
            "vision": {"config": {"model_type": "vit", "patch_size": 8, **BODY}},
            "text": {"config": {"model_type": "bert", **BODY}},
            "embedding_dim": 8,
            "head": {"hidden_dim": 16},
        },
        "dro": {"evaluation_pairs": 8, "evaluation_batch_size": 4},
        "schedule": {"rounds": rounds, "stage1_steps": 1, "stage2_steps": 2},
    }
    return from_dict({key: {**tree.get(key, {}), **sections.get(key, {})} for key in tree.keys() | sections.keys()})


def make_line(round_index: int, ids: list[str] = CLIENTS, **changes: Any) -> dict[str, Any]:
    """A line of metrics.jsonl: the last client's loss stays high and its weight grows; it has no val."""
    n = len(ids)
    tilt = 0.05 * round_index
    p = [(1 - tilt) / n] * (n - 1)
    following = [(1 - tilt - 0.05) / n] * (n - 1)
    losses = [2.5 - 0.3 * round_index + 0.1 * i for i in range(n - 1)] + [2.7]
    table = lambda r: {f"{way}_recall@{k}": min(1.0, r * k) for way in ("i2t", "t2i") for k in (1, 5)}
    gallery = lambda r, pairs: {**table(r), "chance@1": 1 / pairs, "chance@5": 5 / pairs, "pairs": pairs}
    line = {
        "round": round_index,
        "client_ids": ids,
        "client_weights": [*p, 1 - sum(p)],
        "next_client_weights": [*following, 1 - sum(following)],
        "client_losses": losses,
        "mean_loss": sum(losses) / n,
        "worst_loss": max(losses),
        "excluded_clients": [],
        "skipped_samples": {i: {} for i in ids},
        "samples": 36,
        "bytes_sent_per_rank": 1234567,
        "peak_memory_bytes": [5 * 10**8],
        "val": {**{i: gallery(0.1 + 0.02 * round_index, 8) for i in ids[:-1]}, "all": gallery(0.08, 16)},
        "seconds": 6.0,
        "stage_seconds": {"stage1": 1.0, "stage2": 3.5, "aggregate": 0.1, "evaluate": 1.2, "checkpoint": 0.2},
    }
    return line | changes


def robust_columns(round_index: int, n: int = 3) -> dict[str, Any]:
    """What a line has beside make_line's since the robust weights are measured; the lines of older runs lack it."""
    return {
        "client_train_losses": [1.5 + 0.1 * i for i in range(n)],
        "client_losses_se": [0.05 + 0.01 * i for i in range(n)],
        "clipped_losses": [{"id": "west", "reported": 1e30, "used": 2.7726}] if round_index else [],
        "skipped_steps": {"north": {"stage1": 0, "stage2": 2}},
        "robust_gain": {"mixture": 2.3, "mean": 2.2, "best": 2.45, "share": 0.4},
    }


def make_run(run: Path, config: Config, lines: list[dict[str, Any]], progress: dict[str, Any] | None = None) -> Path:
    """Write a run directory without a model."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(dump(config), encoding="utf-8")
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "progress.json").unlink(missing_ok=True)
    if progress is not None:
        (run / "progress.json").write_text(json.dumps(progress))
    return run


def add_model(folder: Path, config: Config, seed: int = 0) -> Path:
    """Write an untrained model as a run's end does."""
    torch.manual_seed(seed)
    tokenizer = tokenizer_of(config)
    model = model_of(config, tokenizer)
    processor = build_processor(config.model, tokenizer, config.data.image_size, config.data.text_length)
    return save_model(model.state_dict(), model.config, processor, folder)
