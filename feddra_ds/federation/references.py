"""The clients' own models, from a finished run of strategy.name=local: what dro.loss=excess compares losses with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from feddra_ds.checkpoint.load import SavedModel
from feddra_ds.data.loading.client_data import ClientData
from feddra_ds.engine.engine import Engine
from feddra_ds.federation.client import Client
from feddra_ds.federation.protocol import Loss


class References:
    """Reads a client's own model where its loss is asked for: no rank holds more than one model beside its own."""

    def __init__(self, checkpoint: Path, engine: Engine):
        """checkpoint: the folder of a checkpoint with a model per client, of the engine's shapes."""
        self.checkpoint, self.engine = checkpoint, engine
        self._of_fixed_samples: dict[str, float] = {}

    def loss_of(self, client: Client, draw: int | None, measure: Callable[[ClientData, int | None], Loss]) -> float:
        """The mean loss of the client's own model on its sample `draw`; the engine holds that model afterwards.

        measure: gives the loss of the engine's model. Collective over the slot, but for a fixed sample (None) once a run.
        """
        if draw is None and client.id in self._of_fixed_samples:
            return self._of_fixed_samples[client.id]
        self.engine.write(SavedModel(self.checkpoint, client.id).read_state(self.engine))
        loss = measure(client.val or client.data, draw).mean
        if draw is None:
            self._of_fixed_samples[client.id] = loss
        return loss
