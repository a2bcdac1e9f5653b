"""What is left of a run's speed when its process is killed with -9 again and again, and started again by the same command.

    python benchmarks/bench_goodput.py [--kills 10] [--every 30] [--steps 20,40] [--quick]

Two runs of `feddra-ds train` of one config, each in processes of its own, one rank: an undisturbed one, and one that is
killed each time that so many of the undisturbed rounds would have been done (`--every`), and at once started again. Goodput
is the pairs per second of the second, starts and lost rounds included, over those of the first. The last losses, p and the
model must be equal to the bit. A start costs imports, the build and the resume, a kill on average half a round: what one
kill costs is printed in seconds and in rounds, which says what to expect of rounds of another length. Appends a row to
results/goodput.csv.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _common import append_row
from _runs import QUICK, Sizes, config_tree, discard_results, print_table, write_clients

from feddra_ds.common.files import sha256
from feddra_ds.run.metrics_file import read_metrics

SMALL = Sizes(layers=4, hidden=64, heads=2, image_size=32, text_length=16, batch=16, head_hidden=64, embedding=32)
CLIENTS = 3


def run_to_its_end(config: Path, kill_every: float | None = None) -> tuple[float, int]:
    """Seconds from the first start to the end, and how often the run was killed. kill_every: seconds; None: never."""
    command = [sys.executable, "-m", "feddra_ds", "train", "--config", str(config)]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    began, kills = time.perf_counter(), 0
    while True:
        with open(config.with_suffix(".log"), "a") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            left = None if kill_every is None else max(0.0, began + (kills + 1) * kill_every - time.perf_counter())
            code = process.wait(left)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            continue
        finally:
            if process.poll() is None:
                process.kill()
        if code != 0:
            raise RuntimeError(f"the run ended with {code}: {config.with_suffix('.log').read_text()[-3000:]}")
        return time.perf_counter() - began, kills


def told(run_dir: Path) -> dict[str, Any]:
    """What must not depend on kills: every round's losses and p, and the model's bytes."""
    lines = read_metrics(run_dir / "metrics.jsonl")
    keys = ("round", "client_losses", "client_weights", "next_client_weights")
    files = sorted((run_dir / "model").glob("*.safetensors"))
    return {"lines": [[line[key] for key in keys] for line in lines], "model": [sha256(path) for path in files]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--kills", type=int, default=10, help="about so many; the run has --every × --kills rounds (10)"
    )
    parser.add_argument("--every", type=int, default=30, help="rounds' worth of time between two kills (30)")
    parser.add_argument(
        "--steps", default="20,40", help="local steps of stage 1 and 2, which make a round long (20,40)"
    )
    parser.add_argument("--quick", action="store_true", help="one kill, tiny rounds: does it run")
    args = parser.parse_args()
    sizes, rounds = SMALL, args.kills * args.every
    if args.quick:
        discard_results()
        sizes, rounds, args.steps = QUICK, 40, "1,1"
    stage1, stage2 = (int(steps) for steps in args.steps.split(","))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        root = write_clients(folder / "data", CLIENTS, 2 * sizes.batch, sizes)
        steps = {"schedule__rounds": rounds, "schedule__stage1_steps": stage1, "schedule__stage2_steps": stage2}
        for which in ("undisturbed", "killed"):
            tree = config_tree(root, folder / which, sizes, **steps)
            (folder / f"{which}.yaml").write_text(json.dumps(tree))  # JSON is YAML
        undisturbed, _ = run_to_its_end(folder / "undisturbed.yaml")
        lines = read_metrics(folder / "undisturbed" / "metrics.jsonl")
        a_round = statistics.median(line["seconds"] for line in lines)
        start = undisturbed - sum(line["seconds"] for line in lines)  # imports, the build and the final model
        every = start + rounds * a_round / 2 if args.quick else args.every * a_round
        if every <= start:
            raise SystemExit(
                f"--every: {args.every} rounds take {every:.1f} s, a start takes {start:.1f} s; more --steps"
            )
        killed, kills = run_to_its_end(folder / "killed.yaml", every)
        are_equal = told(folder / "undisturbed") == told(folder / "killed")
        row = {
            "rounds": rounds,
            "kills": kills,
            "every_rounds": every / a_round,
            "round_s": a_round,
            "start_s": start,
            "undisturbed_s": undisturbed,
            "killed_s": killed,
            "goodput": undisturbed / killed,
            "kill_costs_s": (killed - undisturbed) / max(1, kills),
            "kill_costs_rounds": (killed - undisturbed) / max(1, kills) / a_round,
            "checkpoint_waits": sum(line["stage_seconds"]["checkpoint"] for line in lines) / undisturbed,
            "equal": are_equal,
        }
        print_table([row])
        print(
            f"\ngoodput {row['goodput']:.3f} of the undisturbed run's pairs per second (wanted ≥ 0.88 at 30 rounds a kill)"
        )
        print(f"losses, p and model of the last round: {'equal to the bit' if are_equal else 'DIFFERENT'}")
        append_row("goodput", row, "cpu")
    if not are_equal:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
