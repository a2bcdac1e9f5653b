"""Small real datasets and configs, and a pool of ranks that runs many cases over one launch.

A case is a module-level function; `on_ranks(case, world_size, *args)` runs it on that many processes which see the
environment of a launch (RANK, WORLD_SIZE, MASTER_PORT, …) and no process group: it makes its own, as a run does. The
processes are kept, so that importing torch and deepspeed is paid once; between cases all groups are taken down.
"""

from __future__ import annotations

import io
import itertools
import math
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from PIL import Image
from spawn import RankPool, free_port

NUM_PROCESSES = 4
CLIENTS = {"north": 24, "south": 20, "west": 28}  # training pairs; none is a multiple of the batch of 8 but north's
NUM_VAL = 6
# Initial weights 15 times larger than usual: embeddings that differ, losses away from chance, p away from uniform.
BODY = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "initializer_range": 0.3,
}
PLACES = ("left apex", "left base", "right apex", "right base")
KINDS = ("opacity", "effusion", "nodule")


# ---- data
def write_dataset(root: Path, clients: Mapping[str, int] | None = None, *, num_val: int = NUM_VAL) -> Path:
    """A dataset of 40 px PNG and JPEG images with short reports: kinds in a corner, differently mixed per client."""
    from feddra_ds.data.format.writer import DatasetWriter

    with DatasetWriter(root) as writer:
        for number, (client, num_train) in enumerate((clients or CLIENTS).items()):
            draw = random.Random(f"data {client}")
            for index in range(num_train + num_val):
                kind = KINDS[(number + (draw.random() < 0.4)) % len(KINDS)]
                place = draw.choice(PLACES)
                suffix = ("png", "jpg")[index % 2]
                writer.add(
                    client,
                    "train" if index < num_train else "val",
                    f"{client}-{index:04d}",
                    image=_image(kind, place, draw, suffix),
                    suffix=suffix,
                    text=f"{kind} at the {place}, {draw.randint(2, 60)} mm in size",
                    info={"labels": {"kind": kind}, "site": client},
                )
    return root


def _image(kind: str, place: str, draw: random.Random, suffix: str) -> bytes:
    pixels = np.random.default_rng(draw.getrandbits(32)).normal(90, 25, (40, 40, 3))
    y, x = 20 * place.endswith("base"), 20 * place.startswith("right")
    pixels[y : y + 20, x : x + 20, KINDS.index(kind)] += 120
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, format={"png": "PNG", "jpg": "JPEG"}[suffix])
    return file.getvalue()


# ---- configs
def tree(root: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """A nested config of a small dual encoder; `changes` are dotted keys with `__` for the dot.

    It differs from the shipped defaults in sizes, in the place and number of what it writes, and in plain SGD, under
    which a gradient of the wrong scale shows. What a test needs beyond that it says itself.
    """
    from feddra_ds.common.tree import set_path

    config: dict[str, Any] = {
        "run": {"output_dir": str(out), "device": "cpu", "trackers": [], "seed": 3},
        "model": {
            "vision": {"config": {"model_type": "vit", "patch_size": 8, **BODY}},
            "text": {"config": {"model_type": "bert", **BODY}},
            "embedding_dim": 16,
            "head": {"hidden_dim": 24},
        },
        "data": {"root": str(root), "batch_size": 8, "image_size": 32, "text_length": 24},
        "clients": {"timeout_s": 150.0},
        "dro": {"evaluation_pairs": 12, "evaluation_batch_size": NUM_VAL},
        "schedule": {"rounds": 2, "stage1_steps": 2, "stage2_steps": 3},
        "optimizer": {"name": "sgd", "lr": 0.01, "weight_decay": 0.0},
        "checkpoint": {"keep": 0},
        "evaluation": {"batch_size": 8},
    }
    for key, value in changes.items():
        set_path(config, key.replace("__", "."), value)
    return config


def make_config(root: Path, out: Path, **changes: Any) -> Any:
    """The validated config of `tree`."""
    from feddra_ds.config.load import from_dict

    return from_dict(tree(root, out, **changes))


def zero(stage: int, *, bf16: bool = False, **more: Any) -> dict[str, Any]:
    """A deepspeed fragment."""
    fragment: dict[str, Any] = {"zero_optimization": {"stage": stage, **more}}
    if bf16:
        fragment["bf16"] = {"enabled": True}
    return fragment


# ---- ranks
def on_ranks(case: Callable[..., Any], world_size: int, *args: Any, timeout: float = 300.0) -> list[Any]:
    """`case(*args)` on ranks 0 … world_size − 1; its results by rank. Raises RankError when a rank fails."""
    assert world_size <= NUM_PROCESSES
    return _pool().run(_one_world, case, world_size, free_port(), args, timeout=timeout)[:world_size]


def on_each(
    case: Callable[..., Any], arguments: Iterable[Sequence[Any]], *, world_size: int = 1, timeout: float = 300.0
) -> list[list[Any]]:
    """`on_ranks(case, world_size, *args)` for each `args`, as many worlds at a time as there are processes for."""
    jobs = [(tuple(args), free_port()) for args in arguments]
    by_process = _pool().run(_many_worlds, case, world_size, jobs, timeout=timeout)
    teams = NUM_PROCESSES // world_size
    first = [(index % teams) * world_size for index in range(len(jobs))]
    return [[by_process[first[j] + r][j // teams] for r in range(world_size)] for j in range(len(jobs))]


def _one_world(process: int, _: int, case: Callable[..., Any], world_size: int, port: int, args: Sequence[Any]) -> Any:
    return _in_world(case, args, process, world_size, port) if process < world_size else None


def _many_worlds(
    process: int, _: int, case: Callable[..., Any], world_size: int, jobs: Sequence[tuple[Sequence[Any], int]]
) -> Any:
    team, rank = divmod(process, world_size)
    teams = NUM_PROCESSES // world_size
    return [_in_world(case, args, rank, world_size, port) for args, port in jobs[team::teams]]


def _in_world(case: Callable[..., Any], args: Sequence[Any], rank: int, world_size: int, port: int) -> Any:
    """Run a case as a rank of a launch, then take down whatever process group it made."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in place.items()})
    from feddra_ds.distributed import meeting
    from feddra_ds.engine.bootstrap import leave_groups

    try:
        return case(*args)
    finally:
        leave_groups()
        meeting._stores.clear()  # a process keeps its launch's store, and each case is a launch of its own


_pools: list[RankPool] = []


def _pool() -> RankPool:
    if not _pools or not _pools[0].alive:
        _pools[:] = [RankPool(NUM_PROCESSES, init_group=False)]
    return _pools[0]


# ---- inside a rank
def run_all(config_tree: dict[str, Any], clips: bool = False) -> dict[str, Any]:
    """Build and run all rounds, as `feddra-ds train` does; returns what a test may want to know of this rank.

    clips: see build_run; True where the run stands beside one of the command.
    """
    run = build_run(config_tree, clips=clips)
    run.rounds()
    finish(run)
    return {"rank": run.topology.rank, "first_round": run.next_round}


def predicted_bytes(config_tree: dict[str, Any], world_size: int, num_clients: int = len(CLIENTS)) -> int:
    """bytes_sent_per_rank of a round by the cost model."""
    from feddra_ds.config.load import from_dict
    from feddra_ds.distributed.plan import plan
    from feddra_ds.doctor.cost import Link, round_cost
    from feddra_ds.doctor.memory.verdict import meta_model

    config = from_dict(config_tree)
    layout = plan(world_size, num_clients, config.topology.ranks_per_slot)
    return round_cost(config, meta_model(config), layout, ["here"] * world_size, Link(1.0, 0.0)).bytes_sent_per_rank


def build_run(config_tree: dict[str, Any], *, clips: bool = False) -> Any:
    """The `Run` of this rank.

    clips: losses above chance count as chance, as in every real run. Most of those of the tests' young models are, and
    p, for which they would be equal, would stand still.
    """
    from feddra_ds.config.load import from_dict
    from feddra_ds.run.build import build

    run = build(from_dict(config_tree))
    if run.coordinator is not None and not clips:
        run.coordinator.chance = math.inf
    return run


def watched(config_tree: dict[str, Any], faults: Sequence[Fault] = ()) -> dict[str, Any]:
    """All rounds of a run, seen from inside, with faults put in where they are asked for.

    stages: per client and stage its masters before the first step and after the last one, its buffers and its result;
    error: the message of TooFewClients where the run ended with it, else None.
    """
    from feddra_ds.common.errors import TooFewClients

    run = build_run(config_tree)
    stages: list[dict[str, Any]] = []
    reset, run_stage, all_clients = run.engine.reset_optimizer, run.trainer.run_stage, run.run_stage
    before: list[Any] = []
    now = {"round": -1}

    def first_step_is_next() -> None:  # the last thing that a stage does before its steps
        reset()
        before[:] = [pieces_of(run.engine)]

    def watch(client: Any, stage: Any, *args: Any, **kwargs: Any) -> Any:
        active = [f for f in faults if (f.client, f.round, f.stage) == (client.id, now["round"], stage.name)]
        with inject(active, run, client):
            result = run_stage(client, stage, *args, **kwargs)
        stages.append(
            {
                "client": client.id,
                "round": now["round"],
                "stage": stage.name,
                "before": before[0],
                "after": pieces_of(run.engine),
                "buffers": {name: buffer.clone().numpy() for name, buffer in run.engine.buffers().items()},
                "loss": result.mean_loss,
                "pairs": result.num_pairs,
                "problem": result.problem,
            }
        )
        return result

    def count(round_index: int, stage: Any) -> Any:
        now["round"] = round_index
        return all_clients(round_index, stage)

    run.engine.reset_optimizer, run.trainer.run_stage, run.run_stage = first_step_is_next, watch, count
    error = None
    try:
        run.rounds()
        finish(run)
    except TooFewClients as stopped:
        error = str(stopped)
    return {"stages": stages, "error": error}


@dataclass(frozen=True)
class Fault:
    """What goes wrong for one client in one stage: `weights` or `buffers` get a NaN at its end, `batch` or `gradient` at
    `steps`; with `far` it ends with weights 1,000 times as large.

    Only the rank of index `slot_rank` in the client's slot meets it.
    """

    client: str
    kind: str
    round: int = 0
    stage: str = "stage2"
    steps: tuple[int, ...] = ()
    slot_rank: int = 0


@contextmanager
def inject(faults: Sequence[Fault], run: Any, client: Any) -> Iterator[None]:
    """Put the faults of this client's stage in place, and take them out again."""
    import torch

    from feddra_ds.federation import client as client_module

    validate, batches = client_module.validate_update, client.data.batches
    mine = [fault for fault in faults if fault.slot_rank == run.topology.slot_rank]

    def poison(engine: Any, *args: Any) -> Any:
        for fault in mine:
            if fault.kind == "weights":
                next(iter(engine.views("aligner")))[1][0] = float("nan")
            elif fault.kind == "far":
                for part in ("aligner", "backbone"):
                    for _, view in engine.views(part):
                        view.mul_(1000)
            elif fault.kind == "buffers":
                next(b for b in engine.buffers().values() if b.is_floating_point())[0] = float("inf")
        return validate(engine, *args)

    def spoil(*args: Any) -> Iterator[Any]:
        bad = {step for fault in mine if fault.kind == "batch" for step in fault.steps}
        for step, batch in enumerate(batches(*args)):
            yield replace(batch, mean=torch.full_like(batch.mean, float("nan"))) if step in bad else batch

    losses, backward = itertools.count(), run.engine.backward
    bad_gradients = {step for fault in mine if fault.kind == "gradient" for step in fault.steps}

    def blow_up(loss: Any) -> None:
        backward(with_bad_gradient(loss) if next(losses) in bad_gradients else loss)

    with (
        patch.object(client_module, "validate_update", poison),
        patch.object(client.data, "batches", spoil),
        patch.object(run.engine, "backward", blow_up),
    ):
        yield


def with_bad_gradient(loss: Any) -> Any:
    """A loss of the same value whose gradient is infinite or NaN."""
    import torch

    class Spoilt(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Any) -> Any:
            return value.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            return gradient * float("inf")

    return Spoilt.apply(loss)


def finish(run: Any) -> None:
    """What ends a run: the ranks leave together."""
    run.engine.close()
    run.topology.close()


def pieces_of(engine: Any) -> list[tuple[str, int, Any]]:
    """The fp32 masters of this rank without padding: (parameter name, first element, values)."""
    return [
        (fragment.name, fragment.start, view.clone().numpy())
        for part in ("aligner", "backbone")
        for fragment, view in engine.views(part)
    ]


# ---- results, in the test's own process
def assemble(pieces_by_rank: Sequence[list[tuple[str, int, Any]]]) -> dict[str, np.ndarray]:
    """Flat parameters by name from the pieces of a slot's ranks; where ranks hold the same elements they must agree."""
    parts: dict[str, dict[int, np.ndarray]] = {}
    for pieces in pieces_by_rank:
        for name, start, values in pieces:
            known = parts.setdefault(name, {}).setdefault(start, values)
            assert known.tobytes() == values.tobytes(), f"ranks hold different values of {name}"
    out = {}
    for name, by_start in parts.items():
        starts = sorted(by_start)
        ends = [start + len(by_start[start]) for start in starts]
        assert [0, *ends[:-1]] == starts, f"{name} is not covered exactly once: {starts}, {ends}"
        out[name] = np.concatenate([by_start[start] for start in starts])
    return out


def metrics_of(out: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl without times and memory, which never count in "equal"."""
    from feddra_ds.run.metrics_file import read_metrics

    lines = read_metrics(out / "metrics.jsonl")
    for line in lines:
        for key in ("seconds", "stage_seconds", "checkpoint_writer_seconds", "peak_memory_bytes", "stage_memory_bytes"):
            line.pop(key, None)
    return lines


def weights_of(out: Path, round_index: int, owner: str = "global") -> dict[str, np.ndarray]:
    """The trained parameters of a checkpoint by name, fp32, flat."""
    from feddra_ds.checkpoint.format import folder_of
    from feddra_ds.checkpoint.load import SavedModel

    saved = SavedModel(folder_of(out, round_index), owner).parameters()
    return {name: tensor.flatten().numpy() for name, tensor in saved.items()}


def largest_difference(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> float:
    """Over all parameters of two models with the same names."""
    assert a.keys() == b.keys()
    return max(float(np.abs(a[name].astype(np.float64) - b[name].astype(np.float64)).max()) for name in a)


def same_bits(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> bool:
    """Equal to the last bit, NaN included."""
    assert a.keys() == b.keys()
    return all(a[name].tobytes() == b[name].tobytes() for name in a)
