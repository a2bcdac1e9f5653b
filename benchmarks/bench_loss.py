"""Time and memory of the loss against what people use.

    python benchmarks/bench_loss.py [--device cuda] [--batch 1024,4096] [--dim 512] [--dtype bf16] [--repeats 20] [--quick]

Peers, all on the same normalised embeddings: `reference` (this project's specification), `compiled` (torch.compile of
it), `open_clip` (its ClipLoss where the package is installed, else `open_clip_formula`, the same lines), and
`products`: the four B×B×D matrix products that a loss without a B×B matrix needs (one forward, one recomputed, two
gradients), alone, in the dtype of the inputs. Passes: forward (no graph), backward (of a graph made before the clock),
full (both). Prints a table, and appends a row a case to results/loss.csv. benchmarks/README.md says how to read it.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from _common import append_row, in_fresh_process, interleaved_times, median_ratio, peak_bytes_above_now, quantiles
from torch import Tensor

from feddra_ds.losses.fused import fused_dro_loss
from feddra_ds.losses.reference import reference_loss

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def open_clip_loss() -> tuple[str, Loss]:
    """open_clip's loss of one process, under the name that says where it is from."""
    try:
        from open_clip.loss import ClipLoss
    except ImportError:
        return "open_clip_formula", _open_clip_formula
    loss = ClipLoss()
    return "open_clip", lambda u, v, t: loss(F.normalize(u, dim=1), F.normalize(v, dim=1), (1 / t).to(u.dtype))


def _open_clip_formula(u: Tensor, v: Tensor, t: Tensor) -> Tensor:
    u, v = F.normalize(u, dim=1), F.normalize(v, dim=1)
    scale = (1 / t).to(u.dtype)
    labels = torch.arange(len(u), device=u.device)
    return (F.cross_entropy(scale * u @ v.T, labels) + F.cross_entropy(scale * v @ u.T, labels)) / 2


def losses(names: list[str], anchors: tuple[Tensor | None, Tensor | None]) -> dict[str, Loss]:
    """Loss functions (image, text, temperature) → scalar, by name; peers without anchors leave them out."""
    weight = 0.0 if anchors[0] is None else 1.0

    def ours(impl: Any) -> Loss:
        return lambda u, v, t: (
            fused_dro_loss(
                u, v, *anchors, temperature=t, anchor_weight=weight, direction_reduction="mean", impl=impl
            ).total
        )

    def reference(u: Tensor, v: Tensor, t: Tensor) -> Tensor:
        return reference_loss(u, v, *anchors, None, t, anchor_weight=weight, direction_reduction="mean").total

    clip_name, clip = open_clip_loss()
    known: dict[str, Callable[[], tuple[str, Loss]]] = {
        "triton": lambda: ("triton", ours("triton")),
        "chunked": lambda: ("chunked", ours("chunked")),
        "reference": lambda: ("reference", reference),
        "compiled": lambda: ("compiled", torch.compile(reference)),
        "open_clip": lambda: (clip_name, clip),
    }
    return dict(known[name]() for name in names if name != "products")


class Case:
    """Inputs of one size, and what is timed on them."""

    def __init__(self, batch: int, dim: int, dtype: str, device: str, anchors: bool):
        generator = torch.Generator().manual_seed(0)

        def draw() -> Tensor:
            return torch.randn(batch, dim, generator=generator).to(device, DTYPES[dtype])

        self.image, self.text = draw().requires_grad_(), draw().requires_grad_()
        self.anchors = (draw(), draw()) if anchors else (None, None)
        self.temperature = torch.tensor(0.07, device=device, requires_grad=True)
        self.inputs = (self.image, self.text, self.temperature)

    def forward(self, loss: Loss) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad():
                return loss(*self.inputs)

        return run

    def backward(self, loss: Loss) -> Callable[[], object]:
        total = loss(*self.inputs)
        return lambda: torch.autograd.grad(total, self.inputs, retain_graph=True)

    def full(self, loss: Loss) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(*self.inputs), self.inputs)

    def products(self, num: int) -> Callable[[], object]:
        """`num` products of B×B×D multiply-adds, a strip of 4,096 rows at a time."""
        u, v = self.image.detach(), self.text.detach()
        step = min(4096, len(u))
        g = torch.ones(step, len(v), dtype=u.dtype, device=u.device)
        rows, strip = torch.empty_like(u[:step]), torch.empty_like(g)

        def run() -> None:
            for start in range(0, len(u), step):
                count = min(step, len(u) - start)
                for n in range(num):
                    if n % 2 == 0:
                        torch.mm(u[start : start + count], v.T, out=strip[:count])
                    else:
                        torch.mm(g[:count], v, out=rows[:count])

        return run


def memory_child(argument: dict[str, Any]) -> int:
    """Peak bytes of one full step above its inputs, in this process."""
    name, threads = argument.pop("name"), argument.pop("threads")
    if threads:
        torch.set_num_threads(threads)
    case, small = Case(**argument), Case(**{**argument, "batch": 64})
    warm, loss = losses([name], small.anchors), losses([name], case.anchors)
    next(iter(warm.values()))(*small.inputs).backward()  # libraries and kernels load before the count
    run = case.full(next(iter(loss.values())))
    if argument["device"].startswith("cuda"):
        run()  # kernels are tuned before the count
        gc.collect()
    return peak_bytes_above_now(run, argument["device"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu", help="cpu or cuda")
    parser.add_argument("--batch", default="1024,4096,16384,32768,65536" if cuda else "1024,4096", help="batch sizes")
    parser.add_argument("--dim", default="128,512,1024" if cuda else "512", help="embedding dimensions")
    parser.add_argument("--dtype", default="bf16" if cuda else "fp32", choices=DTYPES, help="dtype of the embeddings")
    default = "triton,chunked,reference,compiled,open_clip" if cuda else "chunked,reference,open_clip"
    parser.add_argument("--impls", default=default, help=f"what to run ({default})")
    parser.add_argument("--passes", default="forward,backward,full", help="of forward, backward, full")
    parser.add_argument("--anchors", action="store_true", help="with the anchor term, where the loss has one")
    parser.add_argument("--repeats", type=int, default=20 if cuda else 5, help="timed runs of each, in turns")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: torch's own number)")
    parser.add_argument("--no_memory", action="store_true", help="leave the memory runs out")
    parser.add_argument("--no_csv", action="store_true", help="print only")
    parser.add_argument("--quick", action="store_true", help="a tiny batch, twice, nothing recorded: does it run")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(memory_child(json.loads(args.child))))
        return
    if args.quick:
        args.batch, args.dim, args.repeats, args.no_csv = "256", "32", 2, True
    if args.threads:
        torch.set_num_threads(args.threads)
    print(f"{'B':>7} {'D':>5} {'pass':9}{'loss':18} {'p50 ms':>9} {'p10':>9} {'p90':>9}", end=" ")
    print(f"{'× ref':>7} {'× CPU':>7} {'peak MiB':>9} {'% B×B':>6}")
    for batch in (int(b) for b in args.batch.split(",")):
        for dim in (int(d) for d in args.dim.split(",")):
            bench_size(args, batch, dim)


def bench_size(args: argparse.Namespace, batch: int, dim: int) -> None:
    """Print and record every pass and peer of one size; a peer that runs out of memory is reported as such."""
    shape = {"batch": batch, "dim": dim, "dtype": args.dtype, "device": args.device, "anchors": args.anchors}
    names = args.impls.split(",")
    peaks = {} if args.no_memory else {n: peak(shape, n, args.threads) for n in names if n != "products"}
    case = Case(**shape)
    functions = losses(names, case.anchors)
    order = dict(zip([n for n in names if n != "products"], functions, strict=True))
    for stage, num_products in (("forward", 1), ("backward", 3), ("full", 4)):
        if stage not in args.passes.split(","):
            continue
        runs: dict[str, Callable[[], object]] = {}
        for name, loss in functions.items():
            try:
                runs[name] = getattr(case, stage)(loss)
                runs[name]()
            except torch.OutOfMemoryError:
                runs.pop(name, None)
                print(f"{batch:7} {dim:5} {stage:9}{name:18} out of memory")
        runs["products"] = case.products(num_products)
        times, cpu = interleaved_times(runs, args.device, args.repeats)
        for name, seconds in times.items():
            peer = "reference" if "reference" in times else None
            ratio = median_ratio(seconds, times[peer]) if peer else float("nan")
            cpu_ratio = median_ratio(cpu[name], cpu[peer]) if peer and args.device == "cpu" else float("nan")
            by_short_name = {functions_name: peaks.get(short) for short, functions_name in order.items()}
            memory = by_short_name.get(name) if stage == "full" else None
            q = {k: 1e3 * v for k, v in quantiles(seconds).items()}
            share = "" if memory is None else f"{memory / (4 * batch * batch):6.1%}"
            shown = "" if memory is None else f"{memory / 2**20:9.1f}"
            print(
                f"{batch:7} {dim:5} {stage:9}{name:18} {q['p50']:9.2f} {q['p10']:9.2f} {q['p90']:9.2f} "
                f"{ratio:7.2f} {cpu_ratio:7.2f} {shown:>9} {share:>6}",
                flush=True,
            )
            if not args.no_csv:
                row = {**shape, "pass": stage, "loss": name, "repeats": len(seconds)}
                row |= {f"{k}_ms": round(v, 4) for k, v in q.items()}
                row |= {"median_ratio_to_reference": round(ratio, 4), "peak_bytes_above_inputs": memory}
                row["median_cpu_ratio_to_reference"] = round(cpu_ratio, 4)
                del row["device"]  # provenance names it
                append_row("loss", row, args.device)


def peak(shape: dict[str, Any], name: str, threads: int) -> int | None:
    """Peak bytes above inputs of a full step; None where it does not fit in memory."""
    argument = {**shape, "name": name, "threads": threads}
    if shape["device"].startswith("cuda"):
        try:
            return memory_child(argument)
        except torch.OutOfMemoryError:
            return None
    return int(in_fresh_process(__file__, argument))


if __name__ == "__main__":
    main()
