"""What the config's section `debug` asks for: reproducible kernels, a line per local step, a profile of some steps.

All of it costs time; where nothing is asked for, nothing of this is there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from feddra_ds.common.logs import logger
from feddra_ds.config.schema import DebugConfig
from feddra_ds.distributed.topology import Topology
from feddra_ds.engine.engine import Engine
from feddra_ds.federation.schedule import Stage
from feddra_ds.federation.step import StepObserver


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """torch's deterministic algorithms for the duration; an operation that has none raises RuntimeError."""
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = workspace or ":4096:8"  # cuBLAS is deterministic only with it
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
        if workspace is None:
            del os.environ["CUBLAS_WORKSPACE_CONFIG"]


class StepRecorder(StepObserver):
    """Writes debug/ in the run's folder: steps-slotS.jsonl, a line per local step, and trace-rankK-stepN.json.

    A line: round, client, stage, step (within the stage), loss, and for each part that trains the L2 norms of its gradient
    and of the change that the step made to its fp32 masters.
    """

    def __init__(self, options: DebugConfig, engine: Engine, topology: Topology, run_dir: Path):
        self.options, self.engine, self.topology = options, engine, topology
        self.folder = run_dir / "debug"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.round_index = 0
        self._taken = 0  # local steps of this process
        self._line: dict[str, Any] = {}
        self._before: dict[str, list[Tensor]] = {}
        self._profile: Any = None

    def begin_step(self, client: str, stage: Stage, step: int) -> None:
        if self._taken in self.options.profile_steps:
            activities = [ProfilerActivity.CPU]
            if self.engine.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities, profile_memory=True, record_shapes=True)
            self._profile.__enter__()
        if self.options.log_steps:
            self._line = {"round": self.round_index, "client": client, "stage": stage.name, "step": step}
            self._before = {part: [view.clone() for _, view in self.engine.views(part)] for part in stage.parts}

    def before_update(self) -> None:
        if self.options.log_steps:
            norms = self.engine.gradient_norms()
            self._line["gradient_norm"] = {part: norms[part] for part in self._before}

    def end_step(self, value: float) -> None:
        if self._profile is not None:
            self._profile.__exit__(None, None, None)
            path = self.folder / f"trace-rank{self.topology.rank}-step{self._taken}.json"
            self._profile.export_chrome_trace(str(path))
            self._profile = None
        if self.options.log_steps:
            self._line |= {"loss": value, "update_norm": {part: self._update_norm(part) for part in self._before}}
            if self.topology.is_slot_leader:
                self._write()
        self._taken += 1

    @torch.no_grad()
    def _update_norm(self, part: str) -> float:
        """Collective over the slot where its ranks hold parts of the masters."""
        views = (view for _, view in self.engine.views(part))
        pairs = zip(views, self._before[part], strict=True)
        total = sum(
            ((view - before).double().square().sum() for view, before in pairs), torch.zeros((), dtype=torch.float64)
        )
        total = torch.as_tensor(total, device=self.engine.device).reshape(1)
        if self.engine.zero_stage > 0 and self.topology.plan.ranks_per_slot > 1:
            dist.all_reduce(total, group=self.topology.slot_group)
        return float(total.sqrt())

    def _write(self) -> None:
        with open(self.folder / f"steps-slot{self.topology.slot}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(self._line) + "\n")
        line = self._line
        norms = {
            name: ", ".join(f"{part} {norm:.3g}" for part, norm in line.get(name, {}).items())
            for name in ("gradient_norm", "update_norm")
        }
        told = norms["gradient_norm"] or "none", norms["update_norm"]
        logger.info("round %d, %s, %s, step %d: loss %.6g; gradient %s; update %s",
                    line["round"], line["client"], line["stage"], line["step"], line["loss"], *told)  # fmt: skip


def recorder(options: DebugConfig, engine: Engine, topology: Topology, run_dir: Path) -> StepObserver:
    """What looks at the run's local steps: nothing where nothing is asked for."""
    if not (options.log_steps or options.profile_steps):
        return StepObserver()
    return StepRecorder(options, engine, topology, run_dir)
