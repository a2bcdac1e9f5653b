"""The server average against one raw all-reduce of the same bytes, and against servers that gather whole models.

    python benchmarks/bench_aggregate.py [--slots 2,4] [--zero 0,1] [--hidden 256] [--repeats 5] [--quick]

A dual encoder of 12 + 12 layers, one rank a slot, gloo. Cases, interleaved, each begun together:
    raw            one all-reduce of a flat fp32 tensor of as many bytes as the model
    fp32 … int4    this project's average at aggregate.precision, from the accumulated sums to the new host state
    sparse int2    the same at aggregate.sparsity 0.05 and that precision
    refresh        the average into the masters and the working weights, apart
    gather_rank0   every slot's arrays to rank 0, the weighted mean there, the result to everybody
    flower         Flower's in-memory weighted aggregation of the slots' arrays on rank 0, nothing sent: its own
                   function where flwr is installed, else `flower_formula`, the same lines
Prints a table of ratios to `raw` and of CPU time, and appends a row a case to results/aggregate.csv.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import append_row, interleaved_times, median_ratio, quantiles
from _runs import FULL, QUICK, Sizes, answer, discard_results, launch, make_config, print_table, write_clients

AVERAGES: dict[str, dict[str, Any]] = {  # keys of the section aggregate
    **{precision: {"precision": precision} for precision in ("fp32", "bf16", "int8", "int4")},
    "sparse int2": {"precision": "int2", "sparsity": 0.05},
}


def flower() -> tuple[str, Callable[[list[tuple[list[np.ndarray], int]]], list[np.ndarray]]]:
    """Flower's weighted mean of lists of arrays, under the name that says where it is from."""
    try:
        from flwr.server.strategy.aggregate import aggregate
    except ImportError:
        return "flower_formula", flower_formula
    return "flower", aggregate


def flower_formula(results: list[tuple[list[np.ndarray], int]]) -> list[np.ndarray]:
    total = sum(number for _, number in results)
    weighted = [[layer * number for layer in layers] for layers, number in results]
    return [reduce(np.add, updates) / total for updates in zip(*weighted, strict=True)]


def child(argument: dict[str, Any]) -> dict[str, Any]:
    """One rank: its wall and CPU seconds by case, and the bytes that each case handed to collectives."""
    from feddra_ds import strategies
    from feddra_ds.checkpoint.format import SHARED
    from feddra_ds.distributed.launch import Launch
    from feddra_ds.distributed.topology import Topology
    from feddra_ds.engine.engine import Engine
    from feddra_ds.engine.parts import PARTS
    from feddra_ds.federation.schedule import stages_of_round
    from feddra_ds.federation.server import Server
    from feddra_ds.model.build import model_of, tokenizer_of
    from feddra_ds.run.checks import check

    device = torch.device("cpu")
    place = Launch.from_environment()
    root = Path(argument["root"])
    sizes, zero = Sizes(**argument["sizes"]), {"zero_optimization": {"stage": argument["zero"]}}

    def config_of(case: str) -> Any:
        return make_config(
            root, root.parent, sizes, deepspeed=zero, aggregate=AVERAGES[case], topology__ranks_per_slot=1
        )

    config = config_of("fp32")
    _, _, layout = check(config, place)
    torch.manual_seed(0)
    model = model_of(config, tokenizer_of(config))
    topology = Topology(layout, place, device, 300.0)
    engine = Engine(model, config, device=device, slot_rank=0, ranks_per_slot=1)
    stage = stages_of_round(config, 0)[-1]
    state = {part: engine.snapshot(part) for part in (*PARTS, "buffers")}
    generator = torch.Generator().manual_seed(place.rank)
    for part in PARTS:  # a client's weights: somewhat off the global model
        for tensor in state[part]:
            tensor += 1e-3 * torch.randn(tensor.shape, generator=generator)
    weight, peers = 1 / layout.num_slots, topology.peers
    assert peers is not None
    num_bytes: dict[str, int] = {}

    def together() -> None:
        peers.barrier().wait()

    strategy = strategies.build(config.strategy, config.dro)
    servers = {case: Server(engine, strategy, config_of(case), topology) for case in AVERAGES}

    def average(case: str) -> Callable[[], None]:
        server = servers[case]

        def run() -> None:
            before = server.num_bytes
            server.finish(topology, 1.0)
            num_bytes[case] = server.num_bytes - before
            together()

        return run

    elements = sum(t.numel() for part in PARTS for t in state[part])
    flat = torch.zeros(elements)
    num_bytes["raw"] = 4 * elements

    def raw() -> None:
        peers.allreduce([flat]).wait()
        together()

    arrays = [t.clone() for part in PARTS for t in state[part]]
    name, weighted_mean = flower()
    whole = [[t.numpy().copy() for t in arrays] for _ in range(layout.num_slots)] if topology.rank == 0 else []

    def in_memory() -> None:
        if topology.rank == 0:
            weighted_mean([(layers, 1) for layers in whole])
        together()

    def gather_rank0() -> None:
        received: list[list[torch.Tensor]] = []
        for slot in range(1, layout.num_slots):
            if topology.rank == slot:
                for i, tensor in enumerate(arrays):
                    peers.send([tensor], 0, i).wait()
            elif topology.rank == 0:
                received.append([torch.empty_like(t) for t in arrays])
                for i, tensor in enumerate(received[-1]):
                    peers.recv([tensor], slot, i).wait()
        for i, tensor in enumerate(arrays):
            out = tensor.clone()
            for other in received:
                out += other[i]
            out *= weight
            peers.broadcast([out]).wait()
        together()

    def refresh() -> None:
        engine.write(servers["fp32"].states[SHARED])
        together()

    num_bytes |= {"gather_rank0": 4 * elements, name: 0, "refresh": 0}
    cases = {"raw": raw, **{case: average(case) for case in AVERAGES}, "refresh": refresh}
    cases |= {"gather_rank0": gather_rank0, name: in_memory}

    wall: dict[str, list[float]] = {case: [] for case in cases}
    cpu: dict[str, list[float]] = {case: [] for case in cases}
    for turn in range(argument["repeats"] + 1):
        for case, run in cases.items():
            if case in servers:  # what precedes the average: the clients' weights in the sums
                servers[case].begin(stage)
                servers[case]._sum.add(weight, state, place.rank)
            together()
            seconds, cpu_seconds = interleaved_times({case: run}, "cpu", 1, warmup=0)
            if turn:
                wall[case] += seconds[case]
                cpu[case] += cpu_seconds[case]
    topology.close()
    return {"seconds": wall, "cpu": cpu, "bytes": num_bytes, "elements": elements, "slices": len(arrays)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", default="2,4", help="slots, comma-separated (2,4)")
    parser.add_argument("--zero", default="0,1", help="ZeRO stages: many small slices, or few large ones (0,1)")
    parser.add_argument("--hidden", type=int, default=256, help="width of the encoders (256)")
    parser.add_argument("--repeats", type=int, default=5, help="times each case runs (5)")
    parser.add_argument("--quick", action="store_true", help="a tiny model on 2 slots, twice: does it run")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        answer(child(json.loads(args.child)))
    sizes = QUICK if args.quick else Sizes(**{**vars(FULL), "hidden": args.hidden})
    repeats = 2 if args.quick else args.repeats
    if args.quick:
        discard_results()
    for slots in (int(n) for n in ("2" if args.quick else args.slots).split(",")):
        for zero in (int(n) for n in ("1" if args.quick else args.zero).split(",")):
            with tempfile.TemporaryDirectory() as folder:
                root = write_clients(Path(folder) / "data", slots, sizes.batch, sizes)
                argument = {"root": str(root), "sizes": vars(sizes), "zero": zero, "repeats": repeats}
                ranks = launch(__file__, slots, argument)
            first = ranks[0]
            slowest = {
                c: [max(turn) for turn in zip(*(r["seconds"][c] for r in ranks), strict=True)] for c in first["seconds"]
            }
            most_cpu = {case: max(quantiles(r["cpu"][case])["p50"] for r in ranks) for case in first["cpu"]}
            rows = []
            for case, seconds in slowest.items():
                sent = max(r["bytes"].get(case, 0) for r in ranks)
                rows.append(
                    {
                        "case": case,
                        "ms": 1e3 * quantiles(seconds)["p50"],
                        "ratio_to_raw": median_ratio(seconds, slowest["raw"]),
                        "cpu_ms": 1e3 * most_cpu[case],
                        "bytes_share": sent / first["bytes"]["raw"],
                    }
                )
                about = {"slots": slots, "zero": zero, "parameters": first["elements"], "slices": first["slices"]}
                append_row("aggregate", {**about, **rows[-1]}, "cpu")
            print(f"\n{slots} slots, ZeRO {zero}: {first['elements']:,} parameters in {first['slices']} slices")
            print_table(rows)


if __name__ == "__main__":
    main()
