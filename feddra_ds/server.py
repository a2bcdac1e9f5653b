"""The models between stages, as host states of this rank's slices: one shared model, or one per client."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from .aggregate import WeightedSum
from .client import Client
from .engine import BUFFERS, PARTS, Engine, PartState
from .schedule import Stage
from .topology import Topology

ModelState = dict[str, PartState]
SHARED = "global"  # owner of the shared model in checkpoints


class Server:
    """The shared model (φ_g, θ_g): clients start a stage from it, and their average becomes it."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.states: dict[str, ModelState] = {SHARED: snapshot(engine)}
        self.num_bytes = 0  # handed to collectives so far

    def owner_of(self, client: Client) -> str:
        """Whose model a client trains: a key of `states`."""
        return SHARED

    def model_of(self, client: Client) -> ModelState:
        return self.states[self.owner_of(client)]

    def live(self, stage: Stage) -> dict[str, list[Tensor]]:
        """The engine's live slices of what a stage averages."""
        return {part: self.engine.slices(part) for part in (*stage.parts, BUFFERS)}

    def begin(self, stage: Stage) -> None:
        self._sum = WeightedSum(self.engine, stage.parts)

    def add(self, client: Client, weight: float, state: Mapping[str, Sequence[Tensor]]) -> None:
        """Take the weights of a client that may be averaged: live slices, or a host state."""
        self._sum.add(weight, state, client.index)

    def finish(self, topology: Topology, total_weight: float) -> None:
        """θ_g ← Σ p_i θ_i / Σ p_i over the clients that were added. Collective over the peers."""
        self.states[SHARED].update(self._sum.average(topology, total_weight))
        self.num_bytes += self._sum.num_bytes
        del self._sum

    def read_engine(self) -> ModelState:
        """The engine's weights as a host state."""
        return snapshot(self.engine)

    def show(self, client: Client) -> None:
        """Put the model that a client is evaluated with into the engine. Collective over the slot."""
        self.engine.write(self.model_of(client))


class OwnModels(Server):
    """A model per client, never averaged."""

    def __init__(self, engine: Engine, clients: Iterable[Client]):
        self.engine = engine
        self.states = {client.id: snapshot(engine) for client in clients}
        self.num_bytes = 0

    def owner_of(self, client: Client) -> str:
        return client.id

    def begin(self, stage: Stage) -> None:
        self._parts = (*stage.parts, BUFFERS)

    def add(self, client: Client, weight: float, state: Mapping[str, Sequence[Tensor]]) -> None:
        self.states[client.id].update(
            {part: [s.detach().to("cpu", copy=True) for s in state[part]] for part in self._parts}
        )

    def finish(self, topology: Topology, total_weight: float) -> None:
        pass


def snapshot(engine: Engine) -> ModelState:
    """Host copies of everything that makes the model: both parts and the buffers."""
    return {part: engine.snapshot(part) for part in (*PARTS, BUFFERS)}
