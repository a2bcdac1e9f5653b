"""Everything that needs a GPU, in one command of at most ten minutes.

    python benchmarks/on_gpu.py [--parts parity,mfu] [--dry]

Each part is a process of its own with a limit in seconds; one that fails, or does not end in time, stops no other, is named at
the end, and makes the exit code 1. `--dry` runs the same parts, tiny, on a CPU and records nothing: the kernels by Triton's
interpreter, ranks over gloo, no fp16 (DeepSpeed has none there), and no time or peak has bounds.
    tests      tests/gpu
    parity     the loss and its gradients against open_clip's formula in float64, beside that formula and torch.compile of it
    loss       their speed and memory (bench_loss.py)
    products   what objective.bf16_products costs in digits, and saves in time, from the heads' outputs back to them
    slots      NCCL: a slot a GPU, and one slot over all, against one GPU; where there is one GPU only, it says so
    precision  whole runs in fp32, bf16 and fp16 end alike
    mfu        a local step of ViT-L/16 + BERT-base, in both settings of objective.bf16_products
    memory     ViT-H/14 + BERT-large, trained whole and by LoRA: the peak against `doctor --plan`
Appends a row a value to results/gpu.csv; `loss` and `memory` write to loss.csv and plan.csv.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _common import append_row, interleaved_seconds, median_ratio, provenance
from _runs import QUICK, Sizes, answer, config_tree, discard_results, launch, write_clients
from torch import Tensor

BUDGET = 600.0  # seconds for all parts
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Of the float64 result's norm. Losses are fp32 arithmetic whatever the inputs are; gradients come in the inputs' dtype.
LOSS_ERROR, GRADIENT_ERROR = 1e-5, {"fp32": 1e-4, "bf16": 2e-2, "fp16": 4e-3}
TFLOPS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312}  # dense bf16, by the datasheets

VIT_L = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
VIT_H = {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "intermediate_size": 5120}
BERT_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
BERT_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
REAL = Sizes(image_size=224, text_length=112, batch=64, head_hidden=2048, embedding=512)


class Values:
    """The values that a part has measured, printed and recorded as they come; `end` raises for those beyond their bounds."""

    def __init__(self, part: str, dry: bool):
        self.part, self.dry, self.missed = part, dry, list[str]()
        self.device = "cpu" if dry else "cuda"

    def add(
        self, case: str, quantity: str, value: float, *, at_least: float | None = None, at_most: float | None = None
    ) -> None:
        """Record one; a value that is not a number is beyond any bound."""
        above = at_least is None or value >= at_least
        below = at_most is None or value <= at_most
        bounds = [f"{sign} {bound:g}" for sign, bound in (("≥", at_least), ("≤", at_most)) if bound is not None]
        wanted = " and ".join(bounds)
        print(f"{self.part:10}{case:42} {quantity:34} {value:12.5g}  {wanted}", flush=True)
        row = {"part": self.part, "case": case, "quantity": quantity, "value": f"{value:.6g}", "wanted": wanted}
        append_row("gpu", row, self.device)
        if not (above and below):
            self.missed.append(f"{case}: {quantity} is {value:.5g}, wanted {wanted}")

    def end(self) -> None:
        """Raises SystemExit with what was beyond its bounds."""
        if self.missed:
            raise SystemExit("\n".join(self.missed))


# ---- the loss
def draw(batch: int, dim: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Heads' outputs of images and texts, (B, D), somewhat alike, of norms that differ."""
    generator = torch.Generator().manual_seed(0)
    common = 0.5 * torch.randn(batch, dim, generator=generator)
    norms = 0.5 + 3.5 * torch.rand(2, batch, 1, generator=generator)
    return [((common + torch.randn(batch, dim, generator=generator)) * n).to(device, dtype) for n in norms]


def loss_and_gradient(
    loss: Callable[..., Tensor], inputs: Sequence[Tensor], temperature: float
) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient by all inputs, float64."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    total = loss(*leaves, torch.tensor(temperature, dtype=torch.float32, device=leaves[0].device))
    gradients = torch.autograd.grad(total, leaves)
    return total.detach().double(), torch.cat(gradients).double()


def error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖."""
    return float((found - expected).norm() / expected.norm())


def by_triton(image: Tensor, text: Tensor, temperature: Tensor) -> Tensor:
    """open_clip's loss, by our kernels."""
    from feddra_ds.losses.fused import fused_dro_loss

    return fused_dro_loss(image, text, temperature=temperature, direction_reduction="mean", impl="triton").total


def by_triton_from_unit(image: Tensor, text: Tensor, temperature: Tensor) -> Tensor:
    """The same from what the model hands over without objective.bf16_products: fp32 of unit norm."""
    return by_triton(F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1), temperature)


def parity(values: Values) -> None:
    from bench_loss import _open_clip_formula

    backend = "eager" if values.dry else "inductor"  # a C++ compilation says nothing of a GPU
    losses = {
        "triton": by_triton,
        "open_clip_formula": _open_clip_formula,
        "compiled": torch.compile(_open_clip_formula, backend=backend, dynamic=False),
    }
    for batch, dim in ((33, 17),) if values.dry else ((257, 130), (4096, 512)):
        for name, dtype in DTYPES.items():
            for temperature in (0.07,) if values.dry else (0.07, 0.02):
                inputs = draw(batch, dim, dtype, values.device)
                expected = loss_and_gradient(_open_clip_formula, [x.double() for x in inputs], temperature)
                for who, loss in losses.items():
                    found = loss_and_gradient(loss, inputs, temperature)
                    ours = who == "triton"
                    case = f"{who}, {name}, B {batch}, D {dim}, τ {temperature:g}"
                    values.add(case, "loss: error", error(found[0], expected[0]), at_most=LOSS_ERROR if ours else None)
                    bound = GRADIENT_ERROR[name] if ours else None
                    values.add(case, "gradient: error", error(found[1], expected[1]), at_most=bound)


def products(values: Values) -> None:
    from bench_loss import _open_clip_formula

    losses = {"from fp32": by_triton_from_unit, "from bf16": by_triton}
    for batch, dim in ((33, 17),) if values.dry else ((4096, 512), (16384, 512)):
        inputs = draw(batch, dim, torch.bfloat16, values.device)
        runs: dict[str, Callable[[], object]] = {
            name: functools.partial(loss_and_gradient, loss, inputs, 0.07) for name, loss in losses.items()
        }
        times = interleaved_seconds(runs, values.device, 2 if values.dry else 10)
        case = f"B {batch}, D {dim}"
        for name, seconds in times.items():
            values.add(case, f"{name}: ms", 1e3 * statistics.median(seconds))
        ratio, is_large = (
            median_ratio(times["from bf16"], times["from fp32"]),
            batch > 4096,
        )  # small ones wait for launches
        values.add(case, "time, from bf16 / from fp32", ratio, at_most=1 if is_large else None)
        if batch <= 4096:  # the float64 formula holds matrices of B × B
            expected = loss_and_gradient(_open_clip_formula, [x.double() for x in inputs], 0.07)
            for name, loss in losses.items():
                found = loss_and_gradient(loss, inputs, 0.07)
                values.add(case, f"{name}: error of the loss", error(found[0], expected[0]), at_most=LOSS_ERROR)
                bound = GRADIENT_ERROR["bf16"]
                values.add(case, f"{name}: error of the gradient", error(found[1], expected[1]), at_most=bound)


# ---- runs
def tree_of(folder: Path, values: Values, sizes: Sizes, num_clients: int, **changes: Any) -> dict[str, Any]:
    """The config of a run on this device, whose data lie in `folder`, made where they are not there yet."""
    root = folder / "data"
    if not root.exists():
        write_clients(root, num_clients, 2 * sizes.batch, sizes)
    steps = {"schedule__rounds": 2, "schedule__stage1_steps": 2, "schedule__stage2_steps": 4}
    return config_tree(root, folder / "run", sizes, **{**steps, "run__device": values.device, **changes})


def encoders(vision: Mapping[str, Any], patch: int, text: Mapping[str, Any]) -> dict[str, Any]:
    """Changes of the config for these two encoders."""
    return {
        "model__vision__config": {"model_type": "vit", "patch_size": patch, **vision},
        "model__text__config": {"model_type": "bert", **text},
    }


def deepspeed(stage: int, precision: str = "fp32") -> dict[str, Any]:
    """A ZeRO stage and a precision, for the config's section."""
    fragment: dict[str, Any] = {"zero_optimization": {"stage": stage}}
    if precision != "fp32":
        fragment[precision] = {"enabled": True}
    if precision == "fp16":
        fragment["fp16"]["initial_scale_power"] = 12  # few steps: do not spend them on the search for a scale
    return fragment


def slots(values: Values) -> None:
    gpus = 2 if values.dry else torch.cuda.device_count()
    world = 4 if gpus >= 4 else 2 if gpus >= 2 else 1  # the batch of 4 pairs is divided among them
    layouts: dict[str, tuple[int, dict[str, Any]]] = {"one rank": (1, {})}
    if world > 1:
        layouts[f"{world} slots"] = (world, {"topology__ranks_per_slot": 1})
        layouts[f"one slot of {world}, ZeRO 2"] = (
            world,
            {"topology__ranks_per_slot": world, "deepspeed": deepspeed(2)},
        )
    else:
        print("slots: one GPU is here; NCCL between GPUs needs two, and is not tried", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder, found = Path(name), dict[str, Tensor]()
        for layout, (ranks, changes) in layouts.items():
            out = {"run__output_dir": str(folder / f"run {len(found)}")}
            tree = tree_of(folder, values, QUICK, 4, **changes, **out)
            rounds = launch(__file__, ranks, {"tree": tree})[0]
            found[layout] = torch.tensor([one["client_losses"] for one in rounds], dtype=torch.float64)
            values.add(layout, "mean loss", float(found[layout][-1].mean()))
            values.add(layout, "seconds of the last round", rounds[-1]["seconds"])
        for layout, losses in found.items():
            values.add(layout, "losses against one rank: error", error(losses, found["one rank"]), at_most=1e-3)


def child(tree: dict[str, Any]) -> list[dict[str, Any]]:
    """A rank of a run: the rounds' records."""
    import feddra_ds

    return feddra_ds.train(tree).rounds


def precision(values: Values) -> None:
    names = ["fp32", "bf16"] if values.dry else ["fp32", "bf16", "fp16"]
    losses: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            out = {"run__output_dir": str(Path(folder) / name)}
            tree = tree_of(Path(folder), values, QUICK, 1, deepspeed=deepspeed(1, name), **out)
            rounds = launch(__file__, 1, {"tree": tree})[0]
            losses[name] = rounds[-1]["mean_loss"]
            skipped = sum(sum(stages.values()) for one in rounds for stages in one["skipped_steps"].values())
            values.add(name, "mean loss", losses[name])
            values.add(name, "skipped steps", skipped, at_most=4 if name == "fp16" else 0)
            values.add(name, "loss / fp32's", losses[name] / losses["fp32"], at_least=0.97, at_most=1.03)


def mfu(values: Values) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from feddra_ds.config.load import from_dict
    from feddra_ds.federation.step import model_inputs
    from feddra_ds.run.build import build

    sizes, models = (QUICK, {}) if values.dry else (REAL, encoders(VIT_L, 16, BERT_BASE))
    with tempfile.TemporaryDirectory() as folder:
        more = {"objective__anchor_weight": 0.0, "objective__bf16_products": True, "deepspeed": deepspeed(1, "bf16")}
        run = build(from_dict(tree_of(Path(folder), values, sizes, 1, **models, **more)))
        engine, client = run.engine, run.clients[0]
        (batch,) = client.data.batches(client.position, 1)
        engine.train()
        engine.set_learning_rates({"aligner": 1e-5, "backbone": 1e-5})
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            engine.module(**model_inputs(batch, engine))

        def step(from_bf16: bool) -> None:
            run.objective.takes_head_outputs = from_bf16
            run.trainer.step(batch, lambda *_: None, train_backbone=True, weight=1.0)
            assert run.trainer.step.was_taken, "a step's loss or gradient is not finite"

        runs = {"from fp32": lambda: step(False), "from bf16": lambda: step(True)}
        times = interleaved_seconds(runs, values.device, 2 if values.dry else 10, warmup=1 if values.dry else 3)
        run.engine.close()
        run.topology.close()
    flops, matmul = 3 * counter.get_total_flops(), matmul_flops(values)  # backward is two forwards
    peaks = [1e12 * peak for name, peak in TFLOPS.items() if name in provenance(values.device)["device"]]
    values.add("a bare matmul, bf16", "TFLOP/s", matmul / 1e12)
    for name, seconds in times.items():
        reached = flops / statistics.median(seconds)
        case = f"a step of {sizes.batch} pairs, loss {name}"
        values.add(case, "seconds", statistics.median(seconds))
        values.add(case, "TFLOP/s of the model", reached / 1e12)
        values.add(case, "of a bare matmul's", reached / matmul)
        if peaks:
            values.add(case, "MFU", reached / peaks[0])


def matmul_flops(values: Values) -> float:
    """FLOP/s of a bf16 matrix product alone, large enough to fill the device."""
    size = 64 if values.dry else 8192
    a, b = (torch.randn(size, size, device=values.device, dtype=torch.bfloat16) for _ in range(2))
    seconds = interleaved_seconds({"matmul": lambda: a @ b}, values.device, 10)["matmul"]
    return 2 * size**3 / statistics.median(seconds)


def memory(values: Values) -> None:
    from bench_plan import compare

    sizes, models = (
        (QUICK, {}) if values.dry else (Sizes(**{**vars(REAL), "batch": 16}), encoders(VIT_H, 14, BERT_LARGE))
    )
    name = "tiny" if values.dry else "ViT-H/14 + BERT-large"
    for how, adapter in {"full": None, "LoRA": {"type": "lora", "r": 8}}.items():
        with tempfile.TemporaryDirectory() as folder:
            changes = {"model__adapter": adapter, "schedule__stage1_steps": 1, "schedule__stage2_steps": 2}
            tree = tree_of(Path(folder), values, sizes, 1, **models, **changes, deepspeed=deepspeed(1, "bf16"))
            row = compare(f"{name}, {how}, bf16, ZeRO 1, batch {sizes.batch}", tree, 1)
        append_row("plan", row, values.device)
        case = f"{name}, {how}"
        values.add(case, f"peak in MB ({row['measured phase']})", row["measured"])
        values.add(case, f"predicted ({row['phase']})", row["predicted"])
        values.add(
            case, "predicted / measured", row["ratio"], **({} if values.dry else {"at_least": 0.85, "at_most": 1.15})
        )


# ---- all of it
MEASURES: dict[str, Callable[[Values], None]] = {
    "parity": parity,
    "products": products,
    "slots": slots,
    "precision": precision,
    "mfu": mfu,
    "memory": memory,
}
# Seconds of each part, in this order: what is surest to say something comes first.
LIMITS = {
    "parity": 60, "products": 40, "precision": 60, "slots": 60, "mfu": 80, "memory": 120, "loss": 90, "tests": 90,
}  # fmt: skip


def command_of(part: str, dry: bool) -> list[str]:
    """What runs a part."""
    here = Path(__file__).parent
    if part == "tests":
        return [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(here.parent / "tests" / "gpu")]
    if part == "loss":
        options = ["--batch", "4096,32768", "--dim", "512", "--repeats", "10"]
        if dry:
            options = ["--quick", "--device", "cpu", "--dtype", "fp32", "--impls", "chunked,open_clip", "--no_memory"]
        return [sys.executable, str(here / "bench_loss.py"), *options]
    return [sys.executable, __file__, "--part", part, *(["--dry"] if dry else [])]


def run_parts(commands: Mapping[str, Sequence[str]], limits: Mapping[str, float], budget: float) -> dict[str, str]:
    """Run each command, whatever became of those before; what went wrong, by part.

    A part has its limit in seconds, and all together have the budget; a part that does not end is killed with all its
    processes. Each has a folder for temporary files, which is removed afterwards.
    """
    problems: dict[str, str] = {}
    began = time.monotonic()
    for part, command in commands.items():
        seconds = min(limits[part], budget - (time.monotonic() - began))
        if seconds <= 0:
            problems[part] = f"not started: the {budget:g} s for all parts were spent"
            continue
        print(f"== {part} (at most {seconds:.0f} s)", flush=True)
        with tempfile.TemporaryDirectory(prefix=f"gpu-{part}-", ignore_cleanup_errors=True) as folder:
            problem = _run(command, seconds, {**os.environ, "TMPDIR": folder})
        if problem is not None:
            problems[part] = problem
    return problems


def _run(command: Sequence[str], seconds: float, environment: Mapping[str, str]) -> str | None:
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        code = process.wait(seconds)
        return None if code == 0 else f"ended with {code}"
    except subprocess.TimeoutExpired:
        return f"did not end within {seconds:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):  # its ranks too, whether it has ended or not
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(LIMITS), help=f"of {', '.join(LIMITS)} (all)")
    parser.add_argument("--dry", action="store_true", help="tiny, on a CPU, nothing recorded: does it run")
    parser.add_argument("--part", choices=MEASURES, help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        answer(child(json.loads(args.child)["tree"]))
    if not args.dry and not torch.cuda.is_available():
        print(
            "on_gpu.py: torch sees no CUDA device here; --dry (make gpu DRY=1) tries the script on a CPU",
            file=sys.stderr,
        )
        return 2
    if args.dry:
        discard_results()
        os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if args.part:
        values = Values(args.part, args.dry)
        MEASURES[args.part](values)
        values.end()
        return 0
    parts = args.parts.split(",")
    if unknown := [part for part in parts if part not in LIMITS]:
        parser.error(f"--parts: there is no {', '.join(unknown)}; there are {', '.join(LIMITS)}")
    slower = 10 if args.dry else 1  # a busy CPU is no GPU
    limits = {part: slower * seconds for part, seconds in LIMITS.items()}
    problems = run_parts({part: command_of(part, args.dry) for part in parts}, limits, slower * BUDGET)
    for part in parts:
        print(f"{part:10}{problems.get(part, 'ok')}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
