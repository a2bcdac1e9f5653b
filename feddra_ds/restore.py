"""A checkpoint of a run as a model, on one device and without deepspeed."""

from __future__ import annotations

from pathlib import Path

import torch

from . import adapters, checkpoint
from .config import from_dict
from .data.tokens import load_tokenizer
from .dual_encoder import DualEncoder
from .model import build_model
from .processing import DualEncoderProcessor, build_processor
from .server import SHARED


def load_checkpoint(
    folder: Path, owner: str = SHARED, *, merge_adapters: bool = True
) -> tuple[DualEncoder, DualEncoderProcessor]:
    """The model (eval mode, fp32, CPU) that a checkpoint holds for `owner` (the global model, or a client's id).

    Built from the config in the checkpoint; what was frozen is built again from its weights or seed. Raises
    CheckpointError, and ConfigError or ValueError where the config no longer fits (a pretrained folder that has gone).
    """
    problem = checkpoint.check(folder)
    if problem is not None:
        raise checkpoint.CheckpointError(f"{folder}: {problem}")
    config = from_dict(checkpoint.read_coordinator(folder)["config"])
    owners = sorted(path.name for path in (folder / "weights").iterdir())
    if owner not in owners:
        raise checkpoint.CheckpointError(
            f"{folder} holds no model of {owner}; it holds {', '.join(owners)}: use --client"
        )
    text = config.model.text
    tokenizer = load_tokenizer(text.tokenizer or text.pretrained or config.model.pretrained)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        model = build_model(
            config.model,
            config.objective,
            image_size=config.data.image_size,
            vocab_size=len(tokenizer),
            pad_token_id=int(tokenizer.pad_token_id or 0),
            max_text_length=config.data.text_length,
        )
        adapters.apply(model, adapters.parse(config.model.adapter))
    saved = checkpoint.SavedModel(folder, owner)
    state = saved.parameters() | saved.buffers()
    lost = {name for name, p in model.named_parameters() if p.requires_grad} - state.keys()
    unknown = state.keys() - model.state_dict().keys()
    if lost or unknown:
        raise checkpoint.CheckpointError(
            f"{folder} is of another model: {sorted(lost | unknown)[0]} is on one side only"
        )
    model.load_state_dict(state, strict=False)
    if merge_adapters:
        adapters.merge(model)
    return model.eval(), build_processor(config.model, tokenizer, config.data.image_size, config.data.text_length)
