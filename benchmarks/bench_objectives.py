"""What a step of each objective costs beside ita's, and what chunks spare the losses of regions and words.

    python benchmarks/bench_objectives.py [--device cuda] [--batch 16,64] [--repeats 5] [--quick]

A dual encoder of 12 + 12 layers, 64 regions an image and 46 words a text, on drawn batches. Times, in turns:
    loss    the loss alone, from features to their gradients
    step    the model's forward and backward with it, and AdamW's step
Memory of one loss and its gradients, each in a fresh process: in chunks of `objective.chunk_bytes` (256 MiB by default, and
16 MiB), and `plain`: the same formula on all pairs at once, nothing computed again in the backward pass, as the released
codes of GLoRIA and MGCA have it. Prints two tables, and appends a row a case to results/objectives.csv.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _common import append_row, in_fresh_process, interleaved_times, median_ratio, peak_bytes_above_now, quantiles
from _runs import FULL, QUICK, Sizes, discard_results, make_config, print_table
from torch.nn.functional import normalize

from feddra_ds.config.schema import Config
from feddra_ds.federation.step import features_of
from feddra_ds.model.build import model_of, tokenizer_of
from feddra_ds.objectives import OBJECTIVES, Features, Objective, build
from feddra_ds.objectives import gloria as gloria_module
from feddra_ds.objectives import mgca as mgca_module
from feddra_ds.objectives.features import TOKENS

OF_TOKENS = ("gloria", "mgca")
FORMS: dict[str, int] = {"256 MiB": 2**28, "16 MiB": 2**24, "plain": 2**62}  # chunk_bytes


def config_of(name: str, sizes: Sizes, **changes: Any) -> Config:
    """The config of a run with this objective, no files behind it."""
    return make_config(Path("data"), Path("runs"), sizes, objective__name=name, **changes)


def words_of(sizes: Sizes) -> torch.Tensor:
    """(B, T) which word each piece belongs to: one each between [CLS] and [SEP]."""
    words = torch.arange(-1, sizes.text_length - 1).repeat(sizes.batch, 1)
    words[:, -1] = -1
    return words


def drawn(objective: Objective, sizes: Sizes, device: str) -> Features:
    """Features as a model gives them, leaves with a gradient."""
    draw = torch.Generator().manual_seed(0)
    dim, num_regions = sizes.embedding, (sizes.image_size // sizes.patch) ** 2

    def unit(*shape: int) -> torch.Tensor:
        return normalize(torch.randn(*shape, dim, generator=draw), dim=-1).to(device).requires_grad_()

    learned = tuple(
        torch.full(about.shape, about.start, device=device).add_(0.1).requires_grad_()
        for _, about in sorted(type(objective).learned(objective.options, dim).items())
    )
    tokens: dict[str, Any] = {}
    if TOKENS in objective.needs:
        tokens = {"image_tokens": unit(sizes.batch, num_regions), "text_tokens": unit(sizes.batch, sizes.text_length)}
    ids = torch.arange(sizes.batch, device=device)
    image, text = unit(sizes.batch), unit(sizes.batch)
    return Features(image, text, text_ids=ids, words=words_of(sizes).to(device), learned=learned, **tokens)


def loss_of(objective: Objective, features: Features) -> Callable[[], object]:
    """The loss and its gradients by everything that has one."""
    leaves = [x for x in features.tensors().values() if x.requires_grad]
    return lambda: torch.autograd.grad(objective(features, None, None).total, leaves, allow_unused=True)


def step_of(name: str, sizes: Sizes, device: str) -> Callable[[], object]:
    """A local step of a model of its own."""
    config = config_of(name, sizes)
    tokenizer, objective = tokenizer_of(config), build(config.objective)
    torch.manual_seed(0)
    model = model_of(config, tokenizer).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    inputs = {
        "pixel_values": torch.randn(sizes.batch, 3, sizes.image_size, sizes.image_size, device=device),
        "input_ids": torch.randint(5, len(tokenizer), (sizes.batch, sizes.text_length), device=device),
        "attention_mask": torch.ones(sizes.batch, sizes.text_length, dtype=torch.int64, device=device),
    }
    about: dict[str, Any] = {"words": words_of(sizes).to(device), "text_ids": torch.arange(sizes.batch, device=device)}

    def run() -> None:
        out = model(**inputs, return_tokens=TOKENS in objective.needs)
        objective(features_of(out, objective)._replace(**about), None, None).total.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def at_once(compute: Callable[..., Any], length: int, _each: int, _bytes: int, cut: Callable[[slice], Any]) -> Any:
    """In the place of `in_chunks`: all rows in one piece, whose graph is kept."""
    return compute(*cut(slice(0, length)))


def memory_child(argument: dict[str, Any]) -> int:
    """Peak bytes of a loss and its gradients above its inputs, in this process."""
    device, form, name = argument["device"], argument["form"], argument["name"]
    sizes = Sizes(**argument["sizes"])
    if form == "plain":
        gloria_module.in_chunks = mgca_module.in_chunks = at_once  # type: ignore[assignment]
    objective = build(config_of(name, sizes, objective__chunk_bytes=FORMS[form]).objective)
    loss_of(objective, drawn(objective, replace(sizes, batch=2), device))()  # libraries load before the count
    return peak_bytes_above_now(loss_of(objective, drawn(objective, sizes, device)), device)


def bench_batch(sizes: Sizes, device: str, repeats: int) -> None:
    """Both tables of one batch size."""
    objectives = {name: build(config_of(name, sizes).objective) for name in OBJECTIVES}
    cases = {
        "loss": {name: loss_of(one, drawn(one, sizes, device)) for name, one in objectives.items()},
        "step": {name: step_of(name, sizes, device) for name in objectives},
    }
    about = {"batch": sizes.batch, "dim": sizes.embedding, "hidden": sizes.hidden}
    rows = []
    for kind, runs in cases.items():
        seconds, cpu = interleaved_times(runs, device, repeats)
        for name, values in seconds.items():
            row = {"objective": name, "what": kind, "ms": 1e3 * quantiles(values)["p50"]}
            row["ratio_to_ita"] = median_ratio(values, seconds["ita"])
            row["cpu_ratio_to_ita"] = median_ratio(cpu[name], cpu["ita"]) if device == "cpu" else None
            rows.append(row)
            append_row("objectives", {**about, **row}, device)
    print(f"\n{sizes.batch} pairs")
    print_table(rows)
    rows = []
    for name in OF_TOKENS:
        argument = {"sizes": vars(sizes), "device": device, "name": name}
        peaks = {form: int(in_fresh_process(__file__, argument | {"form": form})) for form in FORMS}
        for form, peak in peaks.items():
            row = {"objective": name, "what": f"memory, {form}", "peak_bytes_above_inputs": peak}
            row["ratio_to_plain"] = peak / peaks["plain"] if peaks["plain"] else None  # a tiny one fits what was held
            rows.append(row)
            append_row("objectives", {**about, **row}, device)
    print_table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--batch", default="16,64", help="pairs, comma-separated (16,64)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each, in turns (5)")
    parser.add_argument("--quick", action="store_true", help="a tiny model, twice, nothing recorded: does it run")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(memory_child(json.loads(args.child))))
        return
    if args.quick:
        discard_results()
    base, repeats = (QUICK, 2) if args.quick else (FULL, args.repeats)
    for batch in [base.batch] if args.quick else [int(n) for n in args.batch.split(",")]:
        bench_batch(replace(base, batch=batch), args.device, repeats)


if __name__ == "__main__":
    main()
