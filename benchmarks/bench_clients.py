"""How a round's time and memory grow with the clients of a slot, over the rounds, and with the slots.

    python benchmarks/bench_clients.py [--clients 1,2,4,8,16,32,64] [--slots 1,2,4] [--rounds 11] [--quick]

Whole runs of `feddra-ds train`'s loop, each in fresh processes, one rank a slot, a small dual encoder (SMALL below):
    clients of a slot   time of a round over 1 … 64 clients: a straight line (R²), and what a client adds to memory
    memory over rounds  resident memory after round 3 and after the last one (`--rounds`), 4 clients: flat
    slots               8 clients on 1, 2 and 4 slots: the time of a round (no more slots than cores say anything)
Times are CPU seconds of the slot's process where a slot is alone (waiting does not enter), the least of the rounds after
the first, as what others do only adds; and median wall seconds over slots.
Memory is resident (RSS), sampled after each round. Appends rows to results/clients.csv.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _common import _status_bytes, append_row
from _runs import QUICK, Sizes, answer, config_tree, discard_results, launch, linear_fit, print_table, write_clients

SMALL = Sizes(layers=2, hidden=64, heads=2, image_size=32, text_length=16, batch=8, head_hidden=64, embedding=32)
STEPS = {"schedule__stage1_steps": 2, "schedule__stage2_steps": 4}


def child(argument: dict[str, Any]) -> dict[str, Any]:
    """One rank of a run: per round its CPU and wall seconds and resident bytes afterwards."""
    from feddra_ds.config.load import from_dict
    from feddra_ds.federation.record import RoundRecord
    from feddra_ds.run.build import build

    torch.set_num_threads(1)
    run = build(from_dict(argument["tree"]))
    out: dict[str, Any] = {"cpu": [], "wall": [], "resident": []}
    write = run.record
    clocks = [time.process_time(), time.perf_counter()]

    def after_round(record: RoundRecord, seconds: float) -> None:
        write(record, seconds)
        now = [time.process_time(), time.perf_counter()]
        out["cpu"].append(now[0] - clocks[0])
        out["wall"].append(now[1] - clocks[1])
        out["resident"].append(_status_bytes("VmRSS"))
        clocks[:] = now

    run.record = after_round  # type: ignore[method-assign]
    run.rounds()
    out["model_bytes"] = sum(s.nbytes for part in ("aligner", "backbone") for s in run.engine.slices(part))
    out["aligner_bytes"] = sum(s.nbytes for s in run.engine.slices("aligner"))
    run.topology.close()
    return out


def run_one(folder: Path, sizes: Sizes, num_clients: int, num_slots: int, rounds: int) -> list[dict[str, Any]]:
    """A run in fresh processes: what each rank measured."""
    folder = Path(tempfile.mkdtemp(dir=folder))
    root = write_clients(folder / "data", num_clients, 2 * sizes.batch, sizes)
    changes = {"schedule__rounds": rounds, "checkpoint__every": 10**6, "topology__ranks_per_slot": 1, **STEPS}
    return launch(__file__, num_slots, {"tree": config_tree(root, folder / "run", sizes, **changes)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", default="1,2,4,8,16,32,64", help="clients of one slot (1,2,4,8,16,32,64)")
    parser.add_argument("--slots", default="1,2,4", help="slots for 8 clients; empty leaves them out (1,2,4)")
    parser.add_argument("--rounds", type=int, default=11, help="of the run whose memory is followed (11)")
    parser.add_argument("--quick", action="store_true", help="1 and 2 clients, 2 slots, a tiny model: does it run")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        answer(child(json.loads(args.child)))
    sizes, rounds, followed, shared = SMALL, 4, 4, 8
    if args.quick:
        discard_results()
        args.clients, args.slots, args.rounds = "1,2", "2", 5
        sizes, rounds, followed, shared = QUICK, 2, 2, 2
    counts = [int(n) for n in args.clients.split(",")]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = []
        for count in counts:
            (rank,) = run_one(folder, sizes, count, 1, rounds)
            rows.append({"clients": count, "cpu_s": min(rank["cpu"][1:]), "resident": rank["resident"][-1]})
            print(f"{count} clients: {rows[-1]['cpu_s']:.2f} s a round", file=sys.stderr)
        per_model = rank["model_bytes"]
        _, seconds, r2 = linear_fit(counts, [row["cpu_s"] for row in rows])
        _, growth, _ = linear_fit(counts, [float(row["resident"]) for row in rows])
        print_table(
            [{"clients": r["clients"], "cpu_s": r["cpu_s"], "resident_MiB": r["resident"] / 2**20} for r in rows]
        )
        print(f"\na client adds {seconds:.3f} s a round, R² = {r2:.4f} (wanted ≥ 0.99), and {growth / 1024:.0f} KiB")
        print(
            f"of memory: {growth / per_model:.2f} models; its aligner and buffers are {rank['aligner_bytes'] / 1024:.0f} KiB"
        )
        for row in rows:
            append_row("clients", {"what": "clients", "slots": 1, **row, "r2": r2, "model_bytes": per_model}, "cpu")

        (rank,) = run_one(folder, sizes, followed, 1, args.rounds)
        early, late = rank["resident"][2], rank["resident"][-1]
        ratio = late / early
        print(f"\nresident memory after round {args.rounds}: {ratio:.4f} × that after round 3 (wanted ≤ 1.02)")
        row = {"what": "rounds", "slots": 1, "clients": followed, "resident": late, "resident_ratio": ratio}
        append_row("clients", row, "cpu")

        slots_rows = []
        for slots in (int(n) for n in args.slots.split(",") if n):
            ranks = run_one(folder, sizes, shared, slots, rounds)
            wall = statistics.median(ranks[0]["wall"][1:])
            slots_rows.append({"slots": slots, "clients": shared, "wall_s": wall})
            append_row("clients", {"what": "slots", **slots_rows[-1]}, "cpu")
        if slots_rows:
            print(f"\n{shared} clients over slots, {os.cpu_count()} cores:")
            print_table(slots_rows)


if __name__ == "__main__":
    main()
