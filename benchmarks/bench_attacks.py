"""What bad clients do to a run under each rule of aggregation: its final loss against that of a run without an attack.

    python benchmarks/bench_attacks.py [--rounds 10] [--steps 20] [--rules mean,median,…] [--attacks "sign flip;ALIE;…"] [--quick]

The quickstart's five synthetic hospitals and model on one slot. The second hospital attacks in every average
(benchmarks/_attacks.py): it sees all updates, and the norm check does not see what it sends. The loss is the mean of the
other four's L_i on val pairs after the last round, `ratio` that over the clean run's of the mean; `named` says how often the
bad one was left out of an average, `good_named` how often a good one was. Appends rows to results/attacks.csv.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

from _attacks import ATTACKS, LABEL_FLIP, attacked
from _common import append_row
from _runs import Sizes, answer, config_tree, discard_results, launch, print_table

RULES: dict[str, dict[str, Any]] = {  # keys of the section aggregate; -1: the updates are held, and nobody is left out
    "mean": {"min_cosine": -1.0},
    "cosine": {"min_cosine": 0.0},
    "median": {"rule": "median"},
    "trimmed_mean": {"rule": "trimmed_mean"},
    "krum": {"rule": "krum"},
}
BAD = 1  # the index of the client that attacks
QUICKSTART = Sizes(layers=2, hidden=96, heads=4, image_size=64, patch=16, text_length=64, batch=32, head_hidden=192)
TINY = Sizes(
    layers=2, hidden=32, heads=2, image_size=32, patch=16, text_length=16, batch=4, head_hidden=32, embedding=16
)


def child(argument: dict[str, Any]) -> list[dict[str, Any]]:
    """One rank: a run for each case, one after another."""
    return [run_one(argument["tree"], *case) for case in argument["cases"]]


def run_one(tree: dict[str, Any], rule: str, attack: str | None) -> dict[str, Any]:
    """A run under a rule and an attack; its folder is named after them."""
    from feddra_ds.config.load import from_dict
    from feddra_ds.distributed import meeting
    from feddra_ds.engine.bootstrap import leave_groups
    from feddra_ds.run.build import build
    from feddra_ds.run.metrics_file import read_metrics

    out = Path(tree["run"]["output_dir"]) / f"{rule} {attack}"
    run = build(from_dict(tree | {"run": tree["run"] | {"output_dir": str(out)}, "aggregate": RULES[rule]}))
    with attacked(run, attack, [BAD]):
        run.rounds()
    bad = run.client_ids[BAD]
    run.engine.close()
    run.topology.close()
    leave_groups()
    meeting._stores.clear()
    lines = read_metrics(out / "metrics.jsonl")
    losses = [loss for i, loss in enumerate(lines[-1]["client_losses"]) if i != BAD]
    named = [item["id"] for line in lines for item in line["excluded_clients"]]
    row = {
        "rule": rule,
        "attack": attack or "none",
        "loss": sum(math.nan if x is None else x for x in losses) / len(losses),
        "named": named.count(bad),
        "good_named": len(named) - named.count(bad),
        "averages": len(lines),
    }
    print(row, file=sys.stderr, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="of each run (10)")
    parser.add_argument("--steps", type=int, default=20, help="local steps of a round, in one stage (20)")
    parser.add_argument("--rules", default=",".join(RULES), help="by name")
    parser.add_argument("--attacks", default=";".join((*ATTACKS, LABEL_FLIP)), help="by name, separated by ;")
    parser.add_argument("--quick", action="store_true", help="one attack, one round, a tiny model: does it run")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        answer(child(json.loads(args.child)))
    sizes, pairs = QUICKSTART, 2400
    if args.quick:
        discard_results()
        sizes, pairs, args.rounds, args.steps, args.rules, args.attacks = TINY, 320, 1, 2, "median", "ALIE"
    rules, attacks = args.rules.split(","), args.attacks.split(";")
    cases = [("mean", None), *((rule, attack) for attack in (None, *attacks) for rule in rules)]
    with tempfile.TemporaryDirectory() as name:
        tree = setting(Path(name), sizes, pairs, args.rounds, args.steps)
        (rows,) = launch(__file__, 1, {"tree": tree, "cases": list(dict.fromkeys(cases))}, timeout=36000)
    for row in rows:
        row["ratio"] = row["loss"] / rows[0]["loss"]
        append_row("attacks", row, "cpu")
    print_table(rows)


def setting(folder: Path, sizes: Sizes, num_pairs: int, rounds: int, steps: int) -> dict[str, Any]:
    """The synthetic hospitals in a folder, and the config of a run of one stage a round on them."""
    from feddra_ds.data.synthetic.hospitals import SynthOptions, synthesize

    root = folder / "data"
    synthesize(root, SynthOptions(num_pairs=num_pairs, image_size=sizes.image_size))
    changes = {
        "schedule__rounds": rounds, "schedule__stage1_steps": 0, "schedule__stage2_steps": steps, "schedule__decay": "cosine",
        "optimizer__lr": 5e-4,
        "checkpoint__every": 10**6, "strategy__name": "fedavg", "dro__evaluation_pairs": 64, "model__vision__pooling": "mean",
        "model__text__pooling": "mean", "model__vision__config__initializer_range": 0.08,
        "model__text__config__initializer_range": 0.08,
    }  # fmt: skip
    return config_tree(root, folder / "runs", sizes, **changes)


if __name__ == "__main__":
    main()
