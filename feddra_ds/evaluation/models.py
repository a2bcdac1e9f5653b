"""The trained model or models of a run directory, its model/ or an export, opened on demand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from feddra_ds.checkpoint.choose import averaged_checkpoint, find_newest
from feddra_ds.checkpoint.format import EMA, SHARED, WEIGHTS
from feddra_ds.checkpoint.restore import load_checkpoint
from feddra_ds.config.schema import DataConfig
from feddra_ds.data.format.dataset import Dataset
from feddra_ds.distributed.launch import choose_device
from feddra_ds.evaluation import finite
from feddra_ds.model.dual_encoder import DualEncoder
from feddra_ds.model.folder import find_model, load_pretrained
from feddra_ds.model.processor import DualEncoderProcessor
from feddra_ds.run.files import RunFiles, is_run, open_run

DATA_CLIENTS = "data.clients"  # stands for a root where a run's config names each client's shards


@dataclass
class Models:
    """The model of a run or an export; with strategy.name = local, a model per client.

    folders: by client, or "" for the one that all share; exports, or the run's newest checkpoint. run: the run
    directory, or None for an export. owner: whose, in a checkpoint, the shared one is. non_finite: the number of values
    that are not finite, by weight (by client/weight where each has a model of its own), of the models opened so far.
    """

    path: Path
    folders: dict[str, Path]
    run: RunFiles | None
    device: torch.device
    owner: str = SHARED
    non_finite: dict[str, int] = field(default_factory=dict)
    _open: dict[str, tuple[DualEncoder, DualEncoderProcessor]] = field(default_factory=dict)

    @property
    def source(self) -> Path:
        """The folder that the model, or the first client's, is read from."""
        return next(iter(self.folders.values()))

    @property
    def is_run(self) -> bool:
        """Whether they were opened by their run's folder."""
        return self.run is not None and self.run.path == self.path

    @property
    def round(self) -> int | None:
        """The round after which a run's model was taken: that of its newest checkpoint. None for an export."""
        if not self.is_run or self.run is None:
            return None
        kept = self.run.checkpoints
        return int(kept[-1].name.rpartition("-")[2]) if kept else self.run.rounds_done - 1

    @property
    def shared(self) -> bool:
        """Whether all clients are served by one model."""
        return "" in self.folders

    def of(self, client: str) -> tuple[DualEncoder, DualEncoderProcessor]:
        """The model (eval mode, on the device) and processor for a client; the last one is kept in memory.

        Raises ValueError where each client has its own model and this one has none.
        """
        key = "" if self.shared else client
        if key not in self.folders:
            raise ValueError(f"{self.path}: no model of client {client}; there are: {', '.join(sorted(self.folders))}")
        if key not in self._open:
            self._open.clear()
            folder = self.folders[key]
            is_checkpoint = (folder / "manifest.json").is_file()
            model, processor = load_checkpoint(folder, key or self.owner) if is_checkpoint else load_pretrained(folder)
            prefix = f"{key}/" if key else ""
            spoilt = finite.of_tensors(model.state_dict().items())
            self.non_finite |= {prefix + name: count for name, count in spoilt.items()}
            self._open[key] = (model.to(self.device).eval(), processor)
        return self._open[key]

    def data_root(self, given: str | None) -> str:
        """--data, else the run's data.root, or data.clients where it names shards. Raises ValueError where nothing is there."""
        if given is None and self.run is not None and self.run.reading.clients is not None:
            return DATA_CLIENTS
        root = given or (self.run.get("data.root") if self.run is not None else None)
        if root is None:
            raise ValueError(f"--data: is needed, because {self.path} is a model without a run's config.yaml")
        is_set = self.run is not None and self.run.reading.client_field is not None  # with braces, perhaps
        if given is None and not is_set and not Path(root).is_dir():
            raise ValueError(f"--data: is needed, because the run's data.root {root} is not here")
        return str(root)

    def reading(self, root: str) -> DataConfig | None:
        """How the data under `root` (data_root) are to be read; None for an export, which does not say."""
        if self.run is None:
            return None
        own = root in (DATA_CLIENTS, self.run.get("data.root"))
        other = {} if own else {"clients": None, "client_field": None}
        return self.run.reading.model_copy(update={"order": "exact", **other})  # its samples are drawn from all pairs

    def trained_on(self, dataset: Dataset) -> list[str] | None:
        """The run's clients in its order; None for an export, which does not say."""
        if self.run is None:
            return None
        ids = self.run.get("clients.ids")
        if ids is None:
            ids = [c for c in dataset.clients if c not in dataset.held_out]
        return [c for c in ids if c in dataset.clients]

    def held_out(self, dataset: Dataset, clients: Sequence[str]) -> list[str]:
        """Those of `clients` that were not trained on; for an export, those that the dataset holds out."""
        trained = self.trained_on(dataset)
        return [c for c in clients if (c in dataset.held_out if trained is None else c not in trained)]


def run_of(path: str | Path) -> RunFiles | None:
    """The run whose folder or model `path` is; None for an export. Raises ValueError where there is no model."""
    root = Path(path).expanduser()
    if is_run(root):
        return open_run(root)
    folder = find_model(root)
    above = folder.parent if folder.name == "model" else folder.parent.parent
    return open_run(above) if is_run(above) else None


def open_models(path: str | Path, device: str = "auto", *, ema: bool = False, local_rank: int = 0) -> Models:
    """The model(s) of a run directory, its model/, or an export; of a run that goes on, those of its newest checkpoint.

    ema: the average over rounds of a run's global model (aggregate.ema) instead, from its newest checkpoint. local_rank:
    which GPU, of several. Raises ValueError, one line, where there is none.
    """
    root = Path(path).expanduser()
    where = choose_device(device, local_rank)
    run = run_of(root)
    if ema:
        if run is None or not is_run(root):
            raise ValueError(f"--ema: {root} is no run's folder; export the average with `feddra-ds export RUN --ema`")
        return Models(root, {"": averaged_checkpoint(root)}, run, where, EMA)
    if run is None or not is_run(root):
        return Models(root, {"": find_model(root)}, run, where)
    newest = find_newest(root)
    written = max((folder.stat().st_mtime for folder in run.models.values()), default=0.0)
    if newest is not None and (newest / "manifest.json").stat().st_mtime > written:
        owners = sorted(p.name for p in (newest / WEIGHTS).iterdir())
        return Models(root, dict.fromkeys([""] if SHARED in owners else owners, newest), run, where)
    if not run.models:
        raise ValueError(f"{root} has neither a model/ nor a whole checkpoint yet; see `feddra-ds status {root}`")
    return Models(root, run.models, run, where)
