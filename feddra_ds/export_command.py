"""`feddra-ds export`: the model of a run, of one of its checkpoints or of an export, as a folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import checkpoint
from .config import from_dict
from .data.tokens import load_tokenizer
from .dual_encoder import DualEncoder
from .export import MAX_SHARD_SIZE, load_pretrained, save_model, write_folder
from .interchange import to_transformers
from .model import build_model
from .processing import DualEncoderProcessor, build_processor
from .server import SHARED


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `feddra-ds export`."""
    parser.add_argument("source", type=Path, help="a run directory, its model/, or an exported folder")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; an existing export there is replaced")
    parser.add_argument(
        "--checkpoint",
        help="export this checkpoint of the run (a round's number, a folder's name or path) instead of its model/; "
        "a run without model/ gives its newest (default: model/)",
    )
    parser.add_argument(
        "--client", default=SHARED, help="whose model, where each client keeps its own (default: the global model)"
    )
    parser.add_argument(
        "--format",
        choices=("feddra", "transformers"),
        default="feddra",
        help="feddra loads with feddra_ds.load_pretrained; transformers writes a VisionTextDualEncoderModel, "
        "for linear heads without extra blocks (default: %(default)s)",
    )
    parser.add_argument("--max-shard-size", default=MAX_SHARD_SIZE, help="largest weights file (default: %(default)s)")
    parser.set_defaults(run=main)


def main(args: argparse.Namespace) -> int:
    """Run `feddra-ds export`. Raises ValueError."""
    run = args.source
    has_model = (run / "config.json").is_file() or (run / "model" / "config.json").is_file()
    own = run / "model" / args.client
    if args.checkpoint is None and args.client != SHARED and (own / "config.json").is_file():
        model, processor = load_pretrained(own)
    elif args.checkpoint is None and (has_model or not (run / "checkpoints").is_dir()):
        model, processor = load_pretrained(run)
    else:
        model, processor = load_checkpoint(find_checkpoint(run, args.checkpoint), args.client)
    if args.format == "transformers":
        whole = to_transformers(model, processor)
        write_folder(whole.state_dict(), whole.config, processor, args.out, args.max_shard_size)
        print(f"wrote {args.out}. Load it with transformers.VisionTextDualEncoderModel.from_pretrained({str(args.out)!r})")
    else:
        save_model(model.state_dict(), model.config, processor, args.out, max_shard_size=args.max_shard_size)
        print(f"wrote {args.out}. Load it with feddra_ds.load_pretrained({str(args.out)!r})")
    return 0


def load_checkpoint(folder: Path, owner: str = SHARED) -> tuple[DualEncoder, DualEncoderProcessor]:
    """The model (eval mode, fp32, CPU) that a checkpoint holds for `owner` (the global model, or a client's id).

    Built from the config in the checkpoint. Raises CheckpointError, and ConfigError or ValueError where the config no
    longer fits (a pretrained folder that has gone).
    """
    problem = checkpoint.check(folder)
    if problem is not None:
        raise checkpoint.CheckpointError(f"{folder}: {problem}")
    config = from_dict(checkpoint.read_coordinator(folder)["config"])
    owners = sorted(path.name for path in (folder / "weights").iterdir())
    if owner not in owners:
        raise checkpoint.CheckpointError(f"{folder} holds no model of {owner}; it holds {', '.join(owners)}: use --client")
    text = config.model.text
    tokenizer = load_tokenizer(text.tokenizer or text.pretrained or config.model.pretrained)
    model = build_model(
        config.model,
        config.objective,
        image_size=config.data.image_size,
        vocab_size=len(tokenizer),
        pad_token_id=int(tokenizer.pad_token_id or 0),
        max_text_length=config.data.text_length,
    )
    saved = checkpoint.SavedModel(folder, owner)
    state = saved.parameters() | saved.buffers()
    lost = {name for name, p in model.named_parameters() if p.requires_grad} - state.keys()
    unknown = state.keys() - model.state_dict().keys()
    if lost or unknown:
        raise checkpoint.CheckpointError(f"{folder} is of another model: {sorted(lost | unknown)[0]} is on one side only")
    model.load_state_dict(state, strict=False)
    return model.eval(), build_processor(config.model, tokenizer, config.data.image_size, config.data.text_length)


def find_checkpoint(run: Path, name: str | None) -> Path:
    """A run's checkpoint by path, folder name or round number; the newest whole one where `name` is None.

    Raises ValueError.
    """
    if name is None:
        newest = checkpoint.find_newest(run)
        if newest is None:
            raise ValueError(f"{run} has neither a model/ nor a whole checkpoint")
        return newest
    candidates = [Path(name), run / "checkpoints" / name]
    if name.isdigit():
        candidates.append(checkpoint.folder_of(run, int(name)))
    for folder in candidates:
        if (folder / "manifest.json").is_file():
            return folder
    there = ", ".join(sorted(p.name for p in (run / "checkpoints").glob("round-*"))) or "none"
    raise ValueError(f"--checkpoint {name}: no such checkpoint of {run}; it has {there}")
