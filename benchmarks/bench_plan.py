"""What `feddra-ds doctor --plan` predicts beside what a run takes: peak resident bytes of a rank.

    python benchmarks/bench_plan.py [--cases "fp32 zero 0; lora"] [--quick]

Each case is a whole run of two rounds in fresh processes, one slot; the highest resident memory of rank 0 from the first
import to the end is divided into the prediction. The plan knows the config alone: no case has numbers of its own. Wanted:
between 0.85 and 1.15. Columns in MB; `phase` is where the plan expects the peak, `measured phase` where it was.
Appends a row a case to results/plan.csv.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from _common import _status_bytes, append_row
from _runs import QUICK, Sizes, answer, config_tree, discard_results, launch, print_table, write_clients

WIDE = Sizes(layers=8, hidden=512, heads=8, batch=16)


def zero(stage: int, **more: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage}, **more}


BF16 = {"bf16": {"enabled": True}}
# name: (ranks, changes of the sizes, changes of the config)
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "fp32 zero 0": (1, {}, {}),
    "bf16 zero 0": (1, {}, {"deepspeed": BF16}),
    "fp32 zero 1": (1, {}, {"deepspeed": zero(1)}),
    "bf16 zero 2 x2": (2, {}, {"deepspeed": zero(2, **BF16)}),
    "fp32 zero 3 x2": (2, {}, {"deepspeed": zero(3)}),
    "batch 48": (1, {"batch": 48}, {}),
    "batch 48, micro 8": (1, {"batch": 48}, {"data__micro_batch_size": 8}),
    "lora": (1, {"hidden": 768, "batch": 8}, {"model__adapter": {"type": "lora", "r": 8}}),
}


def child(argument: dict[str, Any]) -> dict[str, Any]:
    """One rank of a run: its highest bytes by phase, of what torch holds on the GPU where it trains on one, else resident."""
    from feddra_ds.config.load import from_dict
    from feddra_ds.run.build import build

    peaks: dict[str, int] = {}
    config = from_dict(argument["tree"])
    on_gpu = config.run.device == "cuda"
    if not on_gpu:
        torch.set_num_threads(1)

    def note(phase: str) -> None:  # the next phase's peak starts from the present size
        if on_gpu:
            now = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        else:
            now = _status_bytes("VmHWM")
            Path("/proc/self/clear_refs").write_text("5")
        peaks[phase] = max(peaks.get(phase, 0), now)

    run = build(config)
    note("build")
    timed = run.timed

    @contextmanager
    def watched(name: str) -> Iterator[None]:
        note("between")
        with timed(name):
            yield
        note(name)

    run.timed = watched  # type: ignore[method-assign]
    run.rounds()
    run.topology.close()
    return peaks


def predict(tree: dict[str, Any], ranks: int) -> Any:
    """The plan of a config, as doctor makes it."""
    from feddra_ds.config.load import from_dict
    from feddra_ds.doctor.memory.plan import plan_memory
    from feddra_ds.model.build import model_of, tokenizer_of

    config = from_dict(tree)
    tokenizer = tokenizer_of(config)
    with torch.device("meta"):
        model = model_of(config, tokenizer)
    return plan_memory(config, model, ranks_per_slot=ranks, device=config.run.device)


def compare(case: str, tree: dict[str, Any], ranks: int) -> dict[str, Any]:
    """Run a config on `ranks` ranks of this host, and put its peak beside the plan's: of the GPU where it trains on one."""
    plan = predict(tree, ranks)
    peaks = launch(__file__, ranks, {"tree": tree})[0]
    expected, where = plan.peak("host" if plan.one_memory else "device"), max(peaks, key=lambda phase: peaks[phase])
    return {
        "case": case,
        "ranks": ranks,
        "parameters": sum(plan.parameters.values()),
        "predicted": expected.total / 1e6,
        "measured": peaks[where] / 1e6,
        "ratio": expected.total / peaks[where],
        "phase": expected.phase,
        "measured phase": where,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", help=f"names or numbers from 0, with semicolons, of: {'; '.join(CASES)} (all)")
    parser.add_argument("--quick", action="store_true", help="a tiny model, two cases: does it run")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        answer(child(json.loads(args.child)))
    names = list(CASES) if args.cases is None else [_name(word) for word in args.cases.split(";")]
    if args.quick:
        discard_results()
        names = ["fp32 zero 0", "bf16 zero 2 x2"]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            ranks, other_sizes, changes = CASES[name]
            sizes = QUICK if args.quick else Sizes(**{**vars(WIDE), **other_sizes})
            place = Path(folder) / str(len(rows))
            root = write_clients(place / "data", 1, sizes.batch, sizes)
            schedule = {"schedule__rounds": 2, "schedule__stage1_steps": 1, "schedule__stage2_steps": 2}
            tree = config_tree(root, place / "run", sizes, topology__ranks_per_slot=ranks, **schedule, **changes)
            row = compare(name, tree, ranks)
            rows.append(row)
            append_row("plan", row, "cpu")
            print(f"{name}: {row['ratio']:.2f}", file=sys.stderr, flush=True)
    print_table(rows)


def _name(word: str) -> str:
    return list(CASES)[int(word)] if word.isdigit() else word.strip()


if __name__ == "__main__":
    main()
