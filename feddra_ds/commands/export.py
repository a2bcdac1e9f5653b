"""`feddra-ds export`: the model of a run, of one of its checkpoints or of an export, as a folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from feddra_ds.checkpoint.format import SHARED
from feddra_ds.common.console import next_step
from feddra_ds.evaluation import finite

EXAMPLES = (
    "feddra-ds export runs/mine --out exports/mine",
    "feddra-ds export runs/mine --out exports/first --checkpoint 0",
    "feddra-ds export runs/mine --out exports/hf --format transformers",
)


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
        "--ema",
        action="store_true",
        help="export the average of the run's global models over its rounds (aggregate.ema), of its newest checkpoint or "
        "of --checkpoint",
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
        "--max-shard-size", default="5GB", metavar="SIZE", help="largest weights file (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Exit code 0; 1 where what was written has weights that are not finite. Raises ValueError where there is no such
    model."""
    from feddra_ds.evaluation.export import export  # late: torch and transformers, which --help can do without

    written = export(
        args.source,
        args.out,
        checkpoint=args.checkpoint,
        client=args.client,
        ema=args.ema,
        kind=args.format,
        max_shard_size=args.max_shard_size,
    )
    for path in written:
        print(f"wrote {path}")
    next_step(*_advice(args.format, args.out))
    spoilt = finite.of_folders(written)
    return finite.complain([finite.weights_in_words(spoilt)] if spoilt else [])


def _advice(kind: str, out: Path) -> list[str]:
    if kind == "adapter":
        return [f"peft.PeftModel.from_pretrained(encoder, {str(out / 'vision')!r})   # in Python; text alike"]
    if kind == "transformers":
        return [f"transformers.VisionTextDualEncoderModel.from_pretrained({str(out)!r})   # in Python"]
    return [
        f"feddra_ds.load_pretrained({str(out)!r})   # in Python",
        f"feddra-ds evaluate {out} --data FOLDER_OF_SHARDS",
    ]
