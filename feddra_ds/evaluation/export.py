"""A trained model as a folder of its own, which needs neither the run nor DeepSpeed."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from feddra_ds.checkpoint.choose import averaged_checkpoint, find_checkpoint
from feddra_ds.checkpoint.format import EMA, SHARED, read_coordinator
from feddra_ds.checkpoint.restore import export_checkpoint, load_checkpoint
from feddra_ds.config.load import from_dict
from feddra_ds.model import lora
from feddra_ds.model.folder import MAX_SHARD_SIZE, load_pretrained, save_model, write_folder
from feddra_ds.model.to_transformers import to_transformers

Format = Literal["feddra", "transformers", "adapter"]


def export(
    source: Path,
    out: Path,
    *,
    checkpoint: str | None = None,
    client: str = SHARED,
    ema: bool = False,
    kind: Format = "feddra",
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> list[Path]:
    """Write the model of a run, of one of its checkpoints, or of an export. Returns what was written.

    source: a run's folder, its model/, or an exported folder. checkpoint: a round's number, a folder's name or path
    (None: the run's model/, else its newest checkpoint). client: whose model, where each client keeps its own. ema: the
    average over rounds (aggregate.ema) that a checkpoint, by default the newest, holds beside the global model. kind:
    feddra loads with feddra_ds.load_pretrained; transformers is a VisionTextDualEncoderModel; adapter is the LoRA factors
    of a checkpoint in peft's format. Raises ValueError where there is no such model or it has no such form.
    """
    if ema:
        if client != SHARED:
            raise ValueError("--ema: is the average of the model that all clients share; leave out --client")
        client, folder, is_checkpoint = EMA, averaged_checkpoint(source, checkpoint), True
    elif kind == "adapter":
        folder, is_checkpoint = find_checkpoint(source, checkpoint), True
    else:
        folder, is_checkpoint = _choose(source, checkpoint, client)
    if kind == "adapter":
        return _export_adapter(folder, client, out)
    if is_checkpoint and kind == "feddra":  # tensor by tensor
        export_checkpoint(folder, client, out, max_shard_size=max_shard_size)
        return [out]
    model, processor = load_checkpoint(folder, client) if is_checkpoint else load_pretrained(folder)
    if kind == "transformers":
        whole = to_transformers(model, processor)
        write_folder(whole.state_dict(), whole.config, processor, out, max_shard_size)
    else:
        save_model(model.state_dict(), model.config, processor, out, max_shard_size=max_shard_size)
    return [out]


def _choose(source: Path, checkpoint: str | None, client: str) -> tuple[Path, bool]:
    """The folder to export, and whether it is a checkpoint's."""
    if checkpoint is None:
        own = source / "model" / client
        if client != SHARED and (own / "config.json").is_file():
            return own, False
        has_model = (source / "config.json").is_file() or (source / "model" / "config.json").is_file()
        if has_model or not (source / "checkpoints").is_dir():
            return source, False
    return find_checkpoint(source, checkpoint), True


def _export_adapter(folder: Path, client: str, out: Path) -> list[Path]:
    model, _ = load_checkpoint(folder, client, merge_adapters=False)
    config = from_dict(read_coordinator(folder)["config"]).model
    base = {side: getattr(config, side).pretrained or config.pretrained for side in ("vision", "text")}
    return lora.save_adapter(model, out, base)
