"""Host memory that it takes to bring a model into its engine: weights that come one by one against a whole model first.

    python benchmarks/bench_loading.py [--hidden 768] [--layers 8] [--ranks 2] [--cases zero3,zero0,…] [--quick]

A ViT and a BERT, fp32, random or from folders, one slot, each rank in a fresh process; nothing is trained. `whole`
builds the model on the host of every rank and lets DeepSpeed partition it, `deferred` is what a run does (weights/deferred.py).
Columns, of the rank that needs most, in multiples of the model's fp32 bytes above what was resident before:
    held     resident when the engine stands
    peak     highest on the way
    excess   peak - held: what loading costs beyond what training holds anyway
Appends a row a case to results/loading.csv.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _common import _status_bytes, append_row
from _runs import print_table

CASES: dict[str, dict[str, Any]] = {
    "zero3": {"zero_optimization": {"stage": 3}},
    "zero3 bf16": {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}},
    "zero2": {"zero_optimization": {"stage": 2}},
    "zero0": {"zero_optimization": {"stage": 0}},
}


def child(argument: dict[str, Any]) -> dict[str, Any]:
    """One rank: bytes above those before the model was built."""
    from feddra_ds.config.load import from_dict
    from feddra_ds.distributed.launch import Launch
    from feddra_ds.distributed.plan import plan
    from feddra_ds.distributed.topology import Topology
    from feddra_ds.engine.bootstrap import import_deepspeed
    from feddra_ds.engine.engine import Engine
    from feddra_ds.model.build import model_of, tokenizer_of
    from feddra_ds.model.weights.deferred import defer
    from feddra_ds.run.build import seed_everything

    torch.set_num_threads(1)
    config = from_dict(argument["tree"])
    launch = Launch.from_environment()
    topology = Topology(plan(launch.world_size, 1, launch.world_size), launch, torch.device("cpu"), 300.0)
    import_deepspeed(topology.device)
    tokenizer = tokenizer_of(config)
    small = from_dict(argument["small"])
    model_of(small, tokenizer)  # what it imports is no part of the model's
    seed_everything(config.run.seed)
    Path("/proc/self/clear_refs").write_text("5")
    before, start = _status_bytes("VmRSS"), time.monotonic()
    if argument["how"] == "whole":
        model, weights = model_of(config, tokenizer), None
    else:
        model, weights = defer(lambda: model_of(config, tokenizer))
        assert weights is not None
    engine = Engine(
        model,
        config,
        device=topology.device,
        slot_rank=topology.slot_rank,
        ranks_per_slot=launch.world_size,
        weights=weights,
    )
    del weights, model
    seconds = time.monotonic() - start
    held, peak = _status_bytes("VmRSS") - before, _status_bytes("VmHWM") - before
    parameters = sum(torch.Size(shape).numel() for shape in engine.shapes.values())
    topology.close()
    return {"held": held, "peak": peak, "parameters": parameters, "seconds": seconds}


def tree(sizes: dict[str, int], folder: str | None, deepspeed: dict[str, Any]) -> dict[str, Any]:
    """A config of two encoders, random or from the folders under `folder`."""
    body = {
        "hidden_size": sizes["hidden"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["hidden"] // 32,
        "intermediate_size": 4 * sizes["hidden"],
    }
    sides = {"vision": {"model_type": "vit", "patch_size": 16, **body}, "text": {"model_type": "bert", **body}}
    model: dict[str, Any] = {side: {"config": config} for side, config in sides.items()}
    if folder is not None:
        model = {side: {"pretrained": f"{folder}/{side}"} for side in sides}
        model["text"]["tokenizer"] = None
    return {
        "run": {"output_dir": "unused", "device": "cpu", "trackers": []},
        "model": model,
        "data": {"root": "unused", "batch_size": 8, "image_size": 64, "text_length": 32},
        "optimizer": {"name": "sgd", "lr": 0.01, "weight_decay": 0.0},  # no moments: what is held is weights
        "deepspeed": deepspeed,
    }


def write_folders(sizes: dict[str, int], folder: Path) -> None:
    """The encoders of `tree` as plain transformers folders."""
    from transformers import AutoConfig, AutoModel

    from feddra_ds.data.loading.tokens import load_tokenizer

    tokenizer = load_tokenizer(None)
    for side, section in tree(sizes, None, {})["model"].items():
        values = dict(section["config"])
        values |= {"image_size": 64} if side == "vision" else {"vocab_size": len(tokenizer)}
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        AutoModel.from_config(config).save_pretrained(folder / side)
    tokenizer.save_pretrained(folder / "text")


def measure(argument: dict[str, Any], ranks: int) -> dict[str, float]:
    """The largest figures of `ranks` fresh processes."""
    from torch.distributed import TCPStore

    probe = TCPStore("127.0.0.1", 0, is_master=True)
    port = probe.port
    del probe
    processes = []
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
        env = os.environ | {key: str(value) for key, value in place.items()}
        env |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--child", json.dumps(argument)]
        processes.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    results = []
    try:
        for process in processes:
            out, _ = process.communicate(timeout=1800)
            if process.returncode != 0:
                raise RuntimeError(f"a rank ended with {process.returncode}")
            results.append(json.loads(out.strip().splitlines()[-1]))
    finally:
        for process in processes:
            process.kill()
    return {key: max(result[key] for result in results) for key in results[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=768, help="width of the encoders (768)")
    parser.add_argument("--layers", type=int, default=6, help="blocks of each encoder (6)")
    parser.add_argument("--ranks", type=int, default=2, help="ranks of the slot (2)")
    parser.add_argument("--cases", help=f"comma-separated, of: {', '.join(CASES)} (all)")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one case: does it run")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(json.loads(args.child))), flush=True)
        return
    sizes = {"hidden": 64, "layers": 2} if args.quick else {"hidden": args.hidden, "layers": args.layers}
    cases = args.cases.split(",") if args.cases else ["zero3"] if args.quick else list(CASES)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        write_folders(sizes, Path(scratch))
        for case in cases:
            for source, folder in (("random", None), ("folders", scratch)):
                for how in ("whole", "deferred"):
                    small = tree({"hidden": 64, "layers": 2}, None, {})
                    argument = {"how": how, "tree": tree(sizes, folder, CASES[case]), "small": small}
                    found = measure(argument, args.ranks)
                    whole = 4 * found["parameters"]
                    row = {"case": case, "ranks": args.ranks, "source": source, "how": how, "model_mb": whole / 1e6}
                    row |= {"held": found["held"] / whole, "peak": found["peak"] / whole}
                    row |= {"excess": row["peak"] - row["held"], "seconds": found["seconds"]}
                    row = {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}
                    rows.append(row)
                    print(row, file=sys.stderr, flush=True)
                    if not args.quick:
                        append_row("loading", row, "cpu")
    print_table(rows)


if __name__ == "__main__":
    main()
