"""Proof that a refactor changed nothing: seeded runs of the quickstart on four layouts, compared to the bit.

    python benchmarks/same_losses.py --write before.json      # on the commit before
    python benchmarks/same_losses.py --against before.json    # on the commit after; exit code 1 where anything differs

Compared are client_losses and the weights p of every round and the bytes of the final model. Only runs of one machine
and one set of packages compare: another CPU may add numbers up in another order.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# name: (ranks, options)
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "1 rank": (1, []),
    "2 slots x 1": (2, ["--topology.ranks_per_slot", "1"]),
    "1 x 2, ZeRO 2": (2, ["--topology.ranks_per_slot", "2", "--deepspeed.zero_optimization.stage", "2"]),
    "1 x 2, ZeRO 3": (2, ["--topology.ranks_per_slot", "2", "--deepspeed.zero_optimization.stage", "3"]),
}
COMPARED = ("client_ids", "client_weights", "next_client_weights", "client_losses")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each run (default: %(default)s)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="keep the results here")
    parser.add_argument("--against", type=Path, metavar="FILE", help="compare with the results kept here")
    args = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        synth = "data synth --num-pairs 600 --image-size 64 --seed 0 --out".split()
        run([sys.executable, "-m", "feddra_ds", *synth, str(folder / "data")])
        for index, (layout, (num_ranks, options)) in enumerate(LAYOUTS.items()):
            results[layout] = train(folder / "data", folder / f"run{index}", num_ranks, options, args.rounds)
            print(f"{layout}: last losses {results[layout]['rounds'][-1]['client_losses']}", flush=True)
    if args.write is not None:
        args.write.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if args.against is None:
        return 0
    before = json.loads(args.against.read_text(encoding="utf-8"))
    differing = [layout for layout in LAYOUTS if results[layout] != before.get(layout)]
    print(f"differ: {', '.join(differing)}" if differing else "all layouts are equal to the bit")
    return 1 if differing else 0


def train(data: Path, out: Path, num_ranks: int, options: list[str], rounds: int) -> dict[str, Any]:
    """One run by the real launcher: what is compared of it."""
    config = ["--config", "configs/quickstart.yaml", "--data.root", str(data), "--run.output_dir", str(out)]
    config += ["--schedule.rounds", str(rounds), "--run.device", "cpu", "--run.trackers", "[]", *options]
    if num_ranks == 1:
        run([sys.executable, "-m", "feddra_ds", "train", *config])
    else:
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(num_ranks)]
        run([*launcher, "--master_port", str(free_port()), "launch/train.py", *config])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    weights = hashlib.sha256((out / "model" / "model.safetensors").read_bytes()).hexdigest()
    return {"rounds": [{key: line[key] for key in COMPARED} for line in lines], "model_sha256": weights}


def run(command: list[str]) -> None:
    """Run a command on one thread a rank, quietly; its output is shown where it fails."""
    bin_folder = str(Path(sys.executable).parent)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment["PATH"] = f"{bin_folder}:{os.environ['PATH']}"
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")


def free_port() -> int:
    """A TCP port that nothing listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


if __name__ == "__main__":
    raise SystemExit(main())
