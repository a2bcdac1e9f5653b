"""A federated round against plain DeepSpeed training of the same samples and as many steps, stage by stage.

    python benchmarks/bench_round.py [--steps 20,50] [--repeats 5] [--zero 0] [--quick]

One client on one rank. A ViT and a BERT of 12 layers each (sizes: FULL in _runs.py), the top block of each and an mlp
head as alignment module. The run is `feddra-ds train`'s own loop; after each of its rounds, plain DeepSpeed trains
stage 2's number of steps on the same client's samples, so that a slow moment of the machine meets both. The first
round warms up. Where others use the machine too, read the ratios of CPU time (this process's, all threads), which
waiting does not enter. Medians over the rounds; ratios are taken within a round, then their median:
    stage1 / plain      a step of stage 1, anchors included. In theory 15/36: of 12 blocks, each 1 forward and 2 backward,
                        11 + 1 forward, 1 forward of the frozen aligner, 1 backward
    stage2 / plain      a step of stage 2 with its share of the replay. In theory 48/36. The replay keeps the decoded batches,
                        so nothing is decoded twice; `--decode-twice` shows that too
    anchors' losses     what dro.evaluate_on = anchors adds to a round
    federation          aggregation, coordination and metrics of a round, over the round; evaluation and checkpoint apart
Appends a row to results/round.csv.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from _common import append_row, median_ratio
from _runs import FULL, QUICK, config_tree, discard_results, print_table, write_clients

from feddra_ds.config.load import from_dict
from feddra_ds.config.schema import Config
from feddra_ds.data.loading.order import Position
from feddra_ds.federation.record import RoundRecord
from feddra_ds.federation.step import features_of
from feddra_ds.model.build import model_of, tokenizer_of
from feddra_ds.run.build import build
from feddra_ds.run.rounds import Run


class PlainTraining:
    """DeepSpeed as one would use it without a federation: the same model, objective (no anchors), optimizer and data."""

    def __init__(self, config: Config, run: Run):
        import deepspeed

        torch.manual_seed(config.run.seed)
        model = model_of(config, tokenizer_of(config))
        decays = set(model.decay_parameter_names())
        groups = [
            {"params": [p for n, p in model.named_parameters() if n in decays], "weight_decay": 0.05},
            {"params": [p for n, p in model.named_parameters() if n not in decays], "weight_decay": 0.0},
        ]
        fragment = {
            "train_micro_batch_size_per_gpu": config.data.batch_size,
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
            **config.deepspeed,
        }
        optimizer = torch.optim.AdamW(groups, lr=config.optimizer.lr, fused=True)
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=fragment, dist_init_required=False
        )
        self.objective, self.data, self.position = run.trainer.objective, run.clients[0].data, Position(0, 0)

    def train(self, num_steps: int) -> None:
        self.engine.train()
        for batch in self.data.batches(self.position, num_steps):
            out = self.engine(
                pixel_values=batch.pixel_values, input_ids=batch.input_ids, attention_mask=batch.attention_mask
            )
            losses = self.objective(features_of(out, self.objective), None, None)
            self.engine.backward(losses.total)
            self.engine.step()
        self.position = self.data.advance(self.position, num_steps)


def measure(tree: dict[str, Any], steps: tuple[int, int]) -> dict[str, list[float]]:
    """Seconds by name, an entry a round, the first left out; steps are those of a stage."""
    config = from_dict(tree)
    run = build(config)
    plain = PlainTraining(config, run)
    times: dict[str, list[float]] = defaultdict(list)
    write, anchor_losses, run_stage = run.record, run.trainer._anchor_losses, run.trainer.run_stage
    added = [0.0]

    def timed_stage(client: Any, stage: Any, *rest: Any, **options: Any) -> Any:
        began = time.process_time()
        result = run_stage(client, stage, *rest, **options)
        name = "stage 2 step, CPU" if stage.trains_backbone else "stage 1 step, CPU"
        times[name].append((time.process_time() - began) / stage.num_steps)
        return result

    def timed_losses(batch: Any) -> torch.Tensor:
        began = time.perf_counter()
        losses = anchor_losses(batch)
        added[0] += time.perf_counter() - began
        return losses

    def after_round(record: RoundRecord, seconds: float) -> None:
        began = time.monotonic()
        write(record, seconds)
        parts = record["stage_seconds"]
        metrics = time.monotonic() - began
        began, began_cpu = time.perf_counter(), time.process_time()
        plain.train(steps[1])
        times["plain step"].append((time.perf_counter() - began) / steps[1])
        times["plain step, CPU"].append((time.process_time() - began_cpu) / steps[1])
        times["stage 1 step"].append(parts["stage1"] / steps[0])
        times["stage 2 step"].append(parts["stage2"] / steps[1])
        times["aggregation, coordination, metrics"].append(seconds - sum(parts.values()) + parts["aggregate"] + metrics)
        times["evaluation"].append(parts["evaluate"])
        times["checkpoint"].append(parts["checkpoint"])
        times["losses read off the anchors"].append(added[0])
        times["round"].append(seconds + metrics)
        added[0] = 0.0

    run.record, run.trainer._anchor_losses = after_round, timed_losses  # type: ignore[method-assign]
    run.trainer.run_stage = timed_stage  # type: ignore[method-assign]
    run.rounds()
    run.topology.close()
    return {name: values[1:] for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", default="20,50", help="of stage 1 and stage 2 (20,50)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count (5)")
    parser.add_argument("--zero", type=int, default=0, help="ZeRO stage of both (0)")
    parser.add_argument("--decode-twice", action="store_true", help="keep no decoded batches in the replay")
    parser.add_argument("--quick", action="store_true", help="a tiny model, 2 + 3 steps, twice: does it run")
    args = parser.parse_args()
    sizes = FULL
    steps = tuple(int(n) for n in args.steps.split(","))
    repeats = args.repeats
    if args.quick:
        discard_results()
        sizes, steps, repeats = QUICK, (2, 3), 2
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with tempfile.TemporaryDirectory() as folder:
        root = write_clients(Path(folder) / "data", 1, max(256, 4 * sizes.batch), sizes)
        changes = {
            "schedule__rounds": repeats + 1,
            "schedule__stage1_steps": steps[0],
            "schedule__stage2_steps": steps[1],
            "deepspeed": {"zero_optimization": {"stage": args.zero}},
            "dro__evaluate_on": "anchors",
            "checkpoint__every": 10**6,
            **({"data__replay_cache_bytes": 0} if args.decode_twice else {}),
        }
        times = measure(config_tree(root, Path(folder) / "run", sizes, **changes), steps)  # type: ignore[arg-type]
    middle = {name: statistics.median(values) for name, values in times.items()}
    print_table([{"": name, "median s": middle[name], "least": min(v), "most": max(v)} for name, v in times.items()])
    ratios = {
        "stage1_over_plain": median_ratio(times["stage 1 step"], times["plain step"]),
        "stage1_over_plain_cpu": median_ratio(times["stage 1 step, CPU"], times["plain step, CPU"]),
        "stage2_over_plain": median_ratio(times["stage 2 step"], times["plain step"]),
        "stage2_over_plain_cpu": median_ratio(times["stage 2 step, CPU"], times["plain step, CPU"]),
        "federation_share": median_ratio(times["aggregation, coordination, metrics"], times["round"]),
        "anchor_losses_share": median_ratio(times["losses read off the anchors"], times["round"]),
    }
    limits = {
        "stage1_over_plain": 0.48,
        "stage2_over_plain": 1.42,
        "federation_share": 0.03,
        "anchor_losses_share": 0.01,
    }
    print()
    wanted = {name: limits[name.removesuffix("_cpu")] for name in ratios}
    print_table([{"": name, "measured": value, "wanted, at most": wanted[name]} for name, value in ratios.items()])
    about = {"zero": args.zero, "steps": args.steps, "repeats": repeats, "decode_twice": args.decode_twice}
    append_row("round", {**about, **middle, **ratios}, "cpu")


if __name__ == "__main__":
    main()
