"""A round against the pattern of FedDRA's released code: its resident second model, its rebuilt optimizers, its copies.

    python benchmarks/bench_released_pattern.py [--steps 4,10] [--clients 3] [--repeats 5] [--quick]

The pattern is written here from its description, in plain torch and with this project's model, loss and data, so that
only the pattern differs: every client trains a whole model beside a second, frozen one,
whose image and text encoders run at every step, in stage 1 too; the optimizer is built anew for each client and stage;
whole state dicts of all N clients and of the global model (N + 1) lie on the host and are averaged name by name.
Stages and averages of a round are timed, interleaved, in CPU seconds too (others may use the machine); memory is the peak
of a fresh process over the one before its model was built. Of 12 blocks a step costs, forward 1 and backward 2 each:
stage 1 15 here and 26 there, stage 2 48 in both. Appends a row to results/released_pattern.csv.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from _common import _status_bytes, append_row, median_ratio
from _runs import FULL, QUICK, answer, config_tree, discard_results, launch, print_table, write_clients
from torch import Tensor

from feddra_ds import strategies
from feddra_ds.config.load import from_dict
from feddra_ds.config.schema import Config
from feddra_ds.data.loading.batch import Batch
from feddra_ds.data.loading.client_data import ClientData
from feddra_ds.data.loading.order import Position
from feddra_ds.distributed.launch import Launch
from feddra_ds.federation.schedule import Stage, stages_of_round
from feddra_ds.federation.step import features_of
from feddra_ds.model.build import model_of, tokenizer_of
from feddra_ds.model.processor import build_processor
from feddra_ds.objectives import Features
from feddra_ds.objectives import build as build_objective
from feddra_ds.run.build import build, build_clients
from feddra_ds.run.checks import check


class ReleasedPattern:
    """N clients of one process, trained as the release does."""

    def __init__(self, config: Config):
        torch.manual_seed(config.run.seed)
        self.config, self.objective = config, build_objective(config.objective)
        self.data = client_data(config)
        self.positions = [Position(0, 0) for _ in self.data]
        self.model = model_of(config, tokenizer_of(config))
        self.frozen = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.shared = self._state()
        self.clients = [copy.deepcopy(self.shared) for _ in self.data]

    def _state(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    def round(self, stages: list[Stage]) -> None:
        for stage in stages:
            for index in range(len(self.data)):
                self.train(index, stage)
            self.average(stage)

    def train(self, index: int, stage: Stage) -> None:
        start = {name: self.clients[index][name] if stage.trains_backbone else v for name, v in self.shared.items()}
        self.model.load_state_dict(start)
        self.frozen.load_state_dict(self.shared)
        self.model.requires_grad_(True).train()
        self.model.backbone.requires_grad_(stage.trains_backbone)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        options = self.config.optimizer
        optimizer = torch.optim.AdamW(trained, lr=stage.lr, weight_decay=options.weight_decay, fused=True)
        for batch in self.data[index].batches(self.positions[index], stage.num_steps):
            out = self.model(**inputs(batch))
            with torch.no_grad():
                seen = self.frozen(**inputs(batch))
            anchors = Features(seen.image_embeds, seen.text_embeds)
            losses = self.objective(features_of(out, self.objective), anchors, None)
            optimizer.zero_grad()
            losses.total.backward()
            optimizer.step()
        self.positions[index] = self.data[index].advance(self.positions[index], stage.num_steps)
        self.clients[index] = self._state()

    def average(self, stage: Stage) -> None:
        for name, value in self.shared.items():
            if stage.trains_backbone or name.startswith("aligner."):
                mean = sum(state[name] / len(self.clients) for state in self.clients)
                self.shared[name] = mean.to(value.dtype)  # type: ignore[union-attr]


def inputs(batch: Batch) -> dict[str, Tensor]:
    return {
        "pixel_values": batch.pixel_values,
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
    }


def client_data(config: Config) -> list[ClientData]:
    """The training data of all clients, on one rank."""
    dataset, ids, layout = check(config, Launch.from_environment())
    tokenizer = tokenizer_of(config)
    processor = build_processor(config.model, tokenizer, config.data.image_size, config.data.text_length)
    place: Any = SimpleNamespace(plan=layout, slot=0, slot_rank=0)
    strategy = strategies.build(config.strategy, config.dro)
    clients, *_ = build_clients(config, dataset, ids, strategy, place, tokenizer, processor)
    return [client.data for client in clients]


class Ours:
    """The same stages in a run of this project."""

    def __init__(self, config: Config):
        self.run, self.num_rounds = build(config), 0

    def round(self, stages: list[Stage]) -> None:
        for stage in stages:
            self.run.run_stage(self.num_rounds, stage)
        self.num_rounds += 1


def child(argument: dict[str, Any]) -> dict[str, Any]:
    """Seconds of both, interleaved, or the peak memory of one of them."""
    import deepspeed  # noqa: F401 (its own memory counts for neither)

    torch.set_num_threads(1)
    config = from_dict(argument["tree"])
    stages = stages_of_round(config, 0)
    before = _status_bytes("VmRSS")
    cases = {name: CASES[name](config) for name in argument["cases"]}
    out: dict[str, Any] = {"wall": {name: [] for name in cases}, "cpu": {name: [] for name in cases}}
    for turn in range(argument["repeats"] + 1):
        for name, case in cases.items():
            began = time.perf_counter(), time.process_time()
            case.round(stages)
            if turn:
                out["wall"][name].append(time.perf_counter() - began[0])
                out["cpu"][name].append(time.process_time() - began[1])
    return out | {"peak": _status_bytes("VmHWM") - before}


CASES: dict[str, Any] = {"ours": Ours, "released": ReleasedPattern}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", default="4,10", help="of stage 1 and stage 2 (4,10: the paper's 20 + 50, shortened)")
    parser.add_argument("--clients", type=int, default=3, help="clients (3)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count (5)")
    parser.add_argument("--quick", action="store_true", help="a tiny model, 1 + 2 steps, twice: does it run")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        answer(child(json.loads(args.child)))
    sizes, repeats = FULL, args.repeats
    steps = [int(n) for n in args.steps.split(",")]
    if args.quick:
        discard_results()
        sizes, steps, repeats, args.clients = QUICK, [1, 2], 2, 2
    with tempfile.TemporaryDirectory() as folder:
        root = write_clients(Path(folder) / "data", args.clients, 4 * sizes.batch, sizes)
        schedule = {"schedule__stage1_steps": steps[0], "schedule__stage2_steps": steps[1]}

        def measure(cases: list[str], repeats: int) -> dict[str, Any]:
            tree = config_tree(root, Path(folder) / "-".join(cases), sizes, **schedule)
            return launch(__file__, 1, {"tree": tree, "cases": cases, "repeats": repeats})[0]

        both = measure(list(CASES), repeats)
        peaks = {name: measure([name], 1)["peak"] for name in CASES}
    rows = [
        {
            "": name,
            "s a round": statistics.median(both["wall"][name]),
            "CPU s": statistics.median(both["cpu"][name]),
            "peak MiB": peaks[name] / 2**20,
        }
        for name in CASES
    ]
    print_table(rows)
    ratios = {
        "time_ratio": median_ratio(both["wall"]["ours"], both["wall"]["released"]),
        "cpu_ratio": median_ratio(both["cpu"]["ours"], both["cpu"]["released"]),
        "memory_ratio": peaks["ours"] / peaks["released"],
    }
    theory = (15 * steps[0] + 48 * steps[1]) / (26 * steps[0] + 48 * steps[1])
    print("\nours over released: " + ", ".join(f"{name} {value:.3f}" for name, value in ratios.items()))
    print(f"forwards and backwards alone: {theory:.3f}; wanted: time below 1")
    seconds = {f"{name}_s": row["s a round"] for name, row in zip(CASES, rows, strict=True)}
    about = {"steps": args.steps, "clients": args.clients, "repeats": repeats}
    append_row("released_pattern", {**about, **seconds, **ratios, "theory": theory}, "cpu")


if __name__ == "__main__":
    main()
