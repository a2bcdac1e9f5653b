"""Peak memory of a rank, predicted from a config: a run in miniature, whose steps only hold and drop amounts in a ledger.

The amounts are those of the arrays that this package and DeepSpeed 0.19.8 make, by ZeRO stage and precision; activations
come from running the model on fake tensors (trace.py). No process group, no weights, no data are needed.

Legend: P elements of the model, T of them trained, W ranks of a slot, b bytes of a working weight, m pairs of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from feddra_ds.config.schema import Config
from feddra_ds.doctor.memory.layout import Layout
from feddra_ds.doctor.memory.ledger import High
from feddra_ds.doctor.memory.run import Miniature
from feddra_ds.doctor.memory.trace import StepTracer
from feddra_ds.engine.parts import PARTS
from feddra_ds.model.dual_encoder import DualEncoder

# Resident bytes of a process that has imported torch, transformers and deepspeed, joined a group and opened its data; with
# CUDA its libraries and context too (measured on a CPU only).
BASELINE_BYTES = {"cpu": 530_000_000, "cuda": 3_000_000_000}


@dataclass(frozen=True)
class MemoryPlan:
    """What a rank will need.

    one_memory: the device is the host's own memory (a CPU), all is in `host` and `device` is empty. parameters: elements
    by part, trained: of them. Phases are build, stage1, stage2, evaluate and model, in bytes at each one's highest point.
    """

    one_memory: bool
    parameters: dict[str, int]
    trained: int
    host: dict[str, High]
    device: dict[str, High]

    def peak(self, where: str) -> High | None:
        """The highest phase of `host` or `device`; None where there is no such memory."""
        phases: Mapping[str, High] = getattr(self, where)
        return max(phases.values(), key=lambda high: high.total, default=None)

    def bytes_of(self, where: str) -> int:
        """Peak bytes of `host` or `device`."""
        high = self.peak(where)
        return 0 if high is None else high.total


def plan_memory(
    config: Config,
    model: DualEncoder,
    *,
    ranks_per_slot: int = 1,
    clients_per_slot: int = 1,
    step_factor: int = 1,
    device: str = "cpu",
    baseline: int | None = None,
) -> MemoryPlan:
    """Predict a rank's peak: of the coordinator, which also writes the final model.

    model: of this config, built on the meta device (`build.model_of`), and used up: it is run on fake tensors. device:
    cpu or cuda. clients_per_slot: of the slot that hosts most. step_factor: how many times the schedule's steps a client
    takes (Strategy.step_factor). baseline: bytes of a process that has done nothing yet
    (None: BASELINE_BYTES).
    """
    layout = Layout.of(config, model, ranks_per_slot, clients_per_slot, device)
    parameters = {part: sum(p.numel() for p in model.get_submodule(part).parameters()) for part in PARTS}
    tracer = StepTracer(model, layout.dtype)
    run = Miniature(config, layout, tracer, step_factor, BASELINE_BYTES[device] if baseline is None else baseline)
    run.run()
    same = run.host is run.device
    return MemoryPlan(same, parameters, layout.trained, run.host.highs, {} if same else run.device.highs)
