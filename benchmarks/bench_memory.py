"""Bytes per parameter, by what they are for, over layouts and levers.

    python benchmarks/bench_memory.py [--hidden 256] [--cases zero0,zero3x2,…] [--quick]

Each case is a whole run of two rounds in fresh processes, one slot; rank 0 is looked at before the last optimizer
step of its first client in stage 2. Columns, all in bytes per parameter of the whole model:
    engine   weights (what the forward uses), masters (fp32, where they are not the weights), moments (Adam's), gradients
             and what else DeepSpeed keeps; on a GPU this is what lies on the device, with offload partly on the host
    server   the global model's slices, the running sum, the clients' own aligners (one a client that waits), residuals: on
             the host, shared by all clients of the slot
    peak     resident memory at its highest, above what was resident before the model was built: activations too
Appends a row a case to results/memory.csv. A case that cannot run here (a missing compiler, say) says so and is left out.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from _common import _status_bytes, append_row
from _runs import FULL, QUICK, Sizes, answer, config_tree, discard_results, launch, print_table, write_clients
from torch import Tensor


def zero(stage: int, **more: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage}, **more}


BF16 = {"bf16": {"enabled": True}}
OFFLOAD = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
OFFLOAD_ALL = {
    "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
}
SMALL_BUCKETS = {"zero_optimization": {"stage": 3, "reduce_bucket_size": 10**6, "stage3_prefetch_bucket_size": 10**6}}

# name: (ranks, changes of the config)
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "zero0": (1, {}),
    "zero0 x2": (2, {}),
    "zero1 x2": (2, {"deepspeed": zero(1)}),
    "zero2 x2": (2, {"deepspeed": zero(2)}),
    "zero3 x2": (2, {"deepspeed": zero(3)}),
    "zero3 x2, small buckets": (2, {"deepspeed": SMALL_BUCKETS}),
    "zero1 bf16": (1, {"deepspeed": zero(1, **BF16)}),
    "zero1 bf16 x2": (2, {"deepspeed": zero(1, **BF16)}),
    "zero3 bf16 x2": (2, {"deepspeed": zero(3, **BF16)}),
    "zero2 offload": (1, {"deepspeed": OFFLOAD}),
    "zero3 offload all": (1, {"deepspeed": OFFLOAD_ALL}),
    "resident anchors": (1, {"objective__anchors": "resident"}),
    "micro-batches of 1/4": (1, {"data__micro_batch_size": -4}),  # resolved below
    "activation checkpointing": (1, {"model__activation_checkpointing": True}),
    "lora": (1, {"model__adapter": {"type": "lora", "r": 8}}),
    "4 clients": (1, {}),
    "one sync a round": (1, {"aggregate__after_stage1": False}),
    "int8 deltas": (1, {"aggregate__precision": "int8"}),
}


class Ledger:
    """Bytes of storages, each counted once, under the first name that claims it."""

    def __init__(self) -> None:
        self.seen: set[int] = set()
        self.bytes: dict[str, int] = {}

    def claim(self, name: str, tensors: Iterable[Any]) -> None:
        for tensor in tensors:
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in self.seen:
                self.seen.add(storage.data_ptr())
                self.bytes[name] = self.bytes.get(name, 0) + storage.nbytes()
            self.bytes.setdefault(name, 0)


def account(run: Any) -> dict[str, int]:
    """Live bytes of this rank by purpose."""
    ledger, server, engine = Ledger(), run.server, run.engine
    ledger.claim("server: global", (t for state in server.states.values() for part in state.values() for t in part))
    ledger.claim("server: sum", (t for part in server._sum.sums.values() for t in part))
    aligners = [c.aligner for c in run.clients if c.aligner is not None]
    ledger.claim("server: aligners", (t for state in aligners for part in state.values() for t in part))
    ledger.claim("server: residuals", (t for part in (server.residuals or {}).values() for t in part))
    trainer = run.trainer
    frozen = [m for m in (trainer.frozen_aligner, trainer.frozen_model) if m is not None]
    ledger.claim("engine: frozen copies", (t for m in frozen for t in (*m.parameters(), *m.buffers())))
    parameters = list(engine.module.parameters())
    ledger.claim("engine: weights", [*parameters, *engine.module.buffers()])
    ledger.claim("engine: weights", (getattr(p, "ds_tensor", None) for p in parameters))
    ledger.claim("engine: masters", (s for part in ("aligner", "backbone") for s in engine.slices(part)))
    inner = getattr(engine._ds.optimizer, "optimizer", engine._ds.optimizer)
    ledger.claim("engine: moments", (t for state in inner.state.values() for t in state.values()))
    gradients = [p.grad for p in parameters] + [p.grad for group in inner.param_groups for p in group["params"]]
    ledger.claim("engine: gradients", gradients)
    gc.collect()
    known = set(ledger.seen)
    everything = [t for t in gc.get_objects() if isinstance(t, Tensor) and t.device.type != "meta"]
    ledger.claim("engine: else", everything)
    assert known <= ledger.seen
    return ledger.bytes


def child(argument: dict[str, Any]) -> dict[str, Any]:
    """One rank of a run: its bytes by purpose, and its peak above the bytes before the model was built."""
    import deepspeed  # noqa: F401 (its own memory is no part of the model's)

    from feddra_ds.config.load import from_dict
    from feddra_ds.run.build import build

    torch.set_num_threads(1)
    config = from_dict(argument["tree"])
    before = _status_bytes("VmRSS")
    run = build(config)
    found: dict[str, int] = {}
    run_stage, step = run.trainer.run_stage, run.engine.step
    steps_left = [0]

    def watched(client: Any, stage: Any, *rest: Any, **options: Any) -> Any:
        steps_left[0] = stage.num_steps * run.engine.num_micro_batches if stage.trains_backbone else 0
        return run_stage(client, stage, *rest, **options)

    def step_after_a_look() -> bool:
        steps_left[0] -= 1
        if steps_left[0] == 0 and not found:  # gradients are there, and moments of the step before
            found.update(account(run))
        return step()

    run.trainer.run_stage, run.engine.step = watched, step_after_a_look  # type: ignore[method-assign]
    Path("/proc/self/clear_refs").write_text("5")  # building may have peaked: that is `doctor`'s business
    run.rounds()
    parameters = sum(torch.Size(shape).numel() for shape in run.engine.shapes.values())
    peak = _status_bytes("VmHWM") - before
    run.topology.close()
    return {"bytes": found, "peak": peak, "parameters": parameters}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256, help="width of the encoders (256)")
    parser.add_argument("--cases", help=f"comma-separated, of: {', '.join(CASES)} (all)")
    parser.add_argument("--quick", action="store_true", help="a tiny model, four cases: does it run")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        answer(child(json.loads(args.child)))
    sizes = QUICK if args.quick else Sizes(**{**vars(FULL), "hidden": args.hidden})
    names = list(CASES) if args.cases is None else args.cases.split(",")
    if args.quick:
        discard_results()
        names = ["zero0", "zero3 x2", "4 clients", "int8 deltas"]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            ranks, changes = CASES[name]
            changes = dict(changes)
            if "data__micro_batch_size" in changes:
                changes["data__micro_batch_size"] = sizes.batch // 4
            place = Path(folder) / name.replace(" ", "-").replace("/", "-")
            root = write_clients(place / "data", 4 if name == "4 clients" else 1, 2 * sizes.batch, sizes)
            schedule = {"schedule__rounds": 2, "schedule__stage1_steps": 1, "schedule__stage2_steps": 2}
            tree = config_tree(root, place / "run", sizes, topology__ranks_per_slot=ranks, **schedule, **changes)
            try:
                first = launch(__file__, ranks, {"tree": tree})[0]
            except RuntimeError as error:
                if args.quick:
                    raise
                print(f"{name} cannot run here: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
                continue
            per = {key: value / first["parameters"] for key, value in first["bytes"].items()}
            row: dict[str, Any] = {"case": name}
            for side in ("engine", "server"):
                row[side] = sum(value for key, value in per.items() if key.startswith(side))
            row |= {key: per.get(key, 0.0) for key in sorted(per)} | {"peak": first["peak"] / first["parameters"]}
            rows.append(row)
            append_row("memory", {"ranks": ranks, "parameters": first["parameters"], **row}, "cpu")
            print(f"{name}: {row['engine']:.1f} + {row['server']:.1f} bytes a parameter", file=sys.stderr)
    if rows:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        short = {c: c.replace("engine: ", "e: ").replace("server: ", "s: ") for c in columns}
        print_table([{short[c]: row.get(c, 0.0) for c in columns} for row in rows])


if __name__ == "__main__":
    main()
