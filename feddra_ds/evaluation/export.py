"""A trained model as a folder of its own, which needs neither the run nor DeepSpeed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from feddra_ds.checkpoint.choose import averaged_checkpoint, find_checkpoint
from feddra_ds.checkpoint.format import EMA, SHARED, read_coordinator
from feddra_ds.checkpoint.restore import export_checkpoint, load_adapters, load_checkpoint
from feddra_ds.common.files import write_atomic
from feddra_ds.config.load import from_dict
from feddra_ds.evaluation import model_card
from feddra_ds.evaluation.models import run_of
from feddra_ds.model import SIDES, lora
from feddra_ds.model.dual_encoder import DualEncoder
from feddra_ds.model.folder import MAX_SHARD_SIZE, load_pretrained, save_model, whole_folder, write_folder
from feddra_ds.model.processor import DualEncoderProcessor
from feddra_ds.model.to_onnx import write_onnx
from feddra_ds.model.to_transformers import encoders_alone, to_transformers

Format = Literal["feddra", "transformers", "encoders", "onnx", "adapter"]


@dataclass(frozen=True)
class _Chosen:
    """What is exported: a model folder, or what a checkpoint holds of `owner`."""

    folder: Path
    is_checkpoint: bool
    owner: str

    def load(self) -> tuple[DualEncoder, DualEncoderProcessor]:
        return load_checkpoint(self.folder, self.owner) if self.is_checkpoint else load_pretrained(self.folder)


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
    """Write the model of a run, of one of its checkpoints, or of an export, with a model card. Returns what was written.

    source: a run's folder, its model/, or an exported folder. checkpoint: a round's number, a folder's name or path
    (None: the run's model/, else its newest checkpoint). client: whose model, where each client keeps its own. ema: the
    average over rounds (aggregate.ema) that a checkpoint, by default the newest, holds beside the global model. kind:
    feddra loads with feddra_ds.load_pretrained; transformers is a VisionTextDualEncoderModel; encoders has a folder for
    each encoder; onnx two files for onnxruntime; adapter is the LoRA factors of a checkpoint in peft's format. Adapters
    are merged but in the last. Raises ValueError where there is no such model, it has no such form, or `out` holds
    something else than an export.
    """
    _check_out(out)
    chosen = _choose(source, checkpoint, client, ema=ema, adapter=kind == "adapter")
    facts = _facts(source, chosen)  # first: an export may take the place of its source
    if kind == "feddra" and chosen.is_checkpoint:  # tensor by tensor
        export_checkpoint(chosen.folder, chosen.owner, out, max_shard_size=max_shard_size)
        config, written = json.loads((out / "config.json").read_text(encoding="utf-8")), [out]
    elif kind == "adapter":
        config, written = _write_adapter(chosen, out)
    else:
        model, processor = chosen.load()
        _write(model, processor, out, kind, max_shard_size)
        config, written = model.config.to_dict(), [out]
    write_atomic(out / model_card.FILE_NAME, model_card.write_card(out, kind, config, facts))
    return written


def _write(
    model: DualEncoder, processor: DualEncoderProcessor, out: Path, kind: Format, max_shard_size: int | str
) -> None:
    if kind == "feddra":
        save_model(model.state_dict(), model.config, processor, out, max_shard_size=max_shard_size)
    elif kind == "transformers":
        whole = to_transformers(model, processor)
        write_folder(whole.state_dict(), whole.config, processor, out, max_shard_size)
    elif kind == "encoders":
        prepares = {"vision": processor.image_processor, "text": processor.tokenizer}
        alone = encoders_alone(model)
        with whole_folder(out) as partial:
            for side in SIDES:
                encoder = alone[side]
                write_folder(encoder.state_dict(), encoder.config, prepares[side], partial / side, max_shard_size)
    else:
        with whole_folder(out) as partial:
            write_onnx(model, processor, partial)
            processor.save_pretrained(partial)
            model.config.save_pretrained(partial)


def _write_adapter(chosen: _Chosen, out: Path) -> tuple[dict[str, Any], list[Path]]:
    model = load_adapters(chosen.folder, chosen.owner)
    config = from_dict(read_coordinator(chosen.folder)["config"]).model
    base = {side: getattr(config, side).pretrained or config.pretrained for side in SIDES}
    with whole_folder(out) as partial:
        files = [path.relative_to(partial) for path in lora.save_adapter(model, partial, base)]
    return model.config.to_dict(), [out / name for name in files]


def _check_out(out: Path) -> None:
    """Raises ValueError unless `out` is free, or an export that may be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    is_export = any((out / name).is_file() for name in ("config.json", "aligner.safetensors", "vision/config.json"))
    if not is_export or (out / "config.yaml").exists():
        raise ValueError(f"--out: {out} is there and is no exported model, so it is not replaced; give another folder")


def _choose(source: Path, checkpoint: str | None, client: str, *, ema: bool, adapter: bool) -> _Chosen:
    if ema:
        if client != SHARED:
            raise ValueError("--ema: is the average of the model that all clients share; leave out --client")
        return _Chosen(averaged_checkpoint(source, checkpoint), True, EMA)
    if checkpoint is None and not adapter:
        own = source / "model" / client
        if client != SHARED and (own / "config.json").is_file():
            return _Chosen(own, False, client)
        has_model = (source / "config.json").is_file() or (source / "model" / "config.json").is_file()
        if has_model or not (source / "checkpoints").is_dir():
            return _Chosen(source, False, client)
    return _Chosen(find_checkpoint(source, checkpoint), True, client)


def _facts(source: Path, chosen: _Chosen) -> str:
    try:
        run = run_of(source)
    except ValueError:  # no model and no run: what is wrong is said where the model is loaded
        run = None
    number = chosen.folder.name.rpartition("-")[2]
    round_index = int(number) if chosen.is_checkpoint and number.isdigit() else None
    if run is not None and not chosen.is_checkpoint:
        round_index = run.rounds_done - 1 if run.rounds_done else None
    owner = "" if chosen.owner in (SHARED, EMA) else chosen.owner
    return model_card.facts_of(source, run, round_index, owner, ema=chosen.owner == EMA)
