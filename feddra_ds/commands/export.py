"""`feddra-ds export`: the model of a run, of one of its checkpoints or of an export, as a folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from feddra_ds.checkpoint.choose import find_checkpoint
from feddra_ds.checkpoint.format import SHARED, read_coordinator
from feddra_ds.checkpoint.restore import export_checkpoint, load_checkpoint
from feddra_ds.common.console import next_step
from feddra_ds.config.load import from_dict
from feddra_ds.model import lora
from feddra_ds.model.folder import MAX_SHARD_SIZE, load_pretrained, save_model, write_folder
from feddra_ds.model.to_transformers import to_transformers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `feddra-ds export`."""
    parser.add_argument(
        "source", type=Path, metavar="RUN_OR_MODEL", help="a run directory, its model/, or an exported folder"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", required=True, help="folder to write; an existing export there is replaced"
    )
    parser.add_argument(
        "--checkpoint",
        metavar="ROUND",
        help="export this checkpoint of the run (a round's number, a folder's name or path) instead of its model/; "
        "a run without model/ gives its newest (default: model/)",
    )
    parser.add_argument(
        "--client",
        default=SHARED,
        metavar="ID",
        help="whose model, where each client keeps its own (default: the global model)",
    )
    parser.add_argument(
        "--format",
        choices=("feddra", "transformers", "adapter"),
        default="feddra",
        help="feddra loads with feddra_ds.load_pretrained, adapters merged; transformers writes a "
        "VisionTextDualEncoderModel, for linear heads without extra blocks; adapter writes the LoRA factors of a run's "
        "checkpoint in peft's format, and the alignment module (default: %(default)s)",
    )
    parser.add_argument(
        "--max-shard-size", default=MAX_SHARD_SIZE, metavar="SIZE", help="largest weights file (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Run `feddra-ds export`. Raises ValueError."""
    run = args.source
    if args.format == "adapter":
        return _write_adapter(run, args)
    has_model = (run / "config.json").is_file() or (run / "model" / "config.json").is_file()
    own = run / "model" / args.client
    if args.checkpoint is None and args.client != SHARED and (own / "config.json").is_file():
        model, processor = load_pretrained(own)
    elif args.checkpoint is None and (has_model or not (run / "checkpoints").is_dir()):
        model, processor = load_pretrained(run)
    else:
        folder = find_checkpoint(run, args.checkpoint)
        if args.format == "feddra":
            export_checkpoint(folder, args.client, args.out, max_shard_size=args.max_shard_size)
            return _written(args.out)
        model, processor = load_checkpoint(folder, args.client)
    if args.format == "transformers":
        whole = to_transformers(model, processor)
        write_folder(whole.state_dict(), whole.config, processor, args.out, args.max_shard_size)
        print(f"wrote {args.out}")
        next_step(f"transformers.VisionTextDualEncoderModel.from_pretrained({str(args.out)!r})   # in Python")
        return 0
    save_model(model.state_dict(), model.config, processor, args.out, max_shard_size=args.max_shard_size)
    return _written(args.out)


def _written(out: Path) -> int:
    print(f"wrote {out}")
    next_step(
        f"feddra_ds.load_pretrained({str(out)!r})   # in Python", f"feddra-ds evaluate {out} --data FOLDER_OF_SHARDS"
    )
    return 0


def _write_adapter(run: Path, args: argparse.Namespace) -> int:
    folder = find_checkpoint(run, args.checkpoint)
    model, _ = load_checkpoint(folder, args.client, merge_adapters=False)
    config = from_dict(read_coordinator(folder)["config"]).model
    base = {side: getattr(config, side).pretrained or config.pretrained for side in ("vision", "text")}
    for path in lora.save_adapter(model, args.out, base):
        print(f"wrote {path}")
    next_step(f"peft.PeftModel.from_pretrained(encoder, {str(args.out / 'vision')!r})   # in Python; text alike")
    return 0
