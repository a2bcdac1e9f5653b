"""A DualEncoder as two ONNX files, which onnxruntime and others run without torch, transformers or feddra_ds.

vision_model.onnx: pixel_values (B, C, S, S) fp32 → image_embeds (B, D). text_model.onnx: input_ids and attention_mask
(B, T) int64 → text_embeds (B, D). Embeddings are fp32 of unit norm. B and T are free, T up to the model's text length.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from feddra_ds.model.dual_encoder import DualEncoder
from feddra_ds.model.encoders import count_parameters

TOLERANCE = 1e-4
_MAX_BYTES_IN_ONE_FILE = 1_500_000_000  # a protobuf holds 2 GB at most; weights beyond that lie beside it
_TEXTS = ["no finding", "a", "small effusion at the left base"]


class _Images(nn.Module):
    def __init__(self, model: DualEncoder):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values=pixel_values).image_embeds


class _Texts(nn.Module):
    def __init__(self, model: DualEncoder):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).text_embeds


@torch.no_grad()
def write_onnx(model: DualEncoder, processor: Callable[..., Any], folder: Path) -> list[Path]:
    """Write both files into `folder` and compare what onnxruntime makes of them with the model. Returns the files.

    processor: the model's, whose texts are compared. Raises ValueError, one line, where an encoder has no such form,
    where embeddings differ by more than TOLERANCE, or where the packages of the extra `onnx` are not installed.
    """
    try:
        import onnxruntime  # noqa: F401  # on demand: of the extra onnx, as onnxscript, which torch's exporter needs
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"--format onnx: {error.name} is missing; pip install 'feddra-ds[onnx]'") from error
    model = model.eval()
    size, channels = model.config.image_size, getattr(model.backbone.vision.config, "num_channels", 3)
    draw = torch.Generator().manual_seed(0)
    images = {"pixel_values": torch.randn(3, channels, size, size, generator=draw)}
    texts = dict(processor(text=_TEXTS, return_tensors="pt"))
    return [
        _write(_Images(model), images, "image_embeds", folder / "vision_model.onnx", {0: "images"}),
        _write(_Texts(model), texts, "text_embeds", folder / "text_model.onnx", {0: "texts", 1: "tokens"}),
    ]


def _write(module: nn.Module, inputs: Mapping[str, Tensor], output: str, path: Path, free: dict[int, str]) -> Path:
    """Export and check one side. free: the name of each dimension that the inputs may have at any size."""
    about = f"--format onnx: {path.name}"
    try:
        with _quiet():
            torch.onnx.export(
                module,
                kwargs=dict(inputs),
                f=str(path),
                input_names=list(inputs),
                output_names=[output],
                dynamic_shapes={name: dict.fromkeys(free, torch.export.Dim.DYNAMIC) for name in inputs},
                dynamo=True,
                external_data=4 * count_parameters(module) > _MAX_BYTES_IN_ONE_FILE,
                verbose=False,
            )
    except Exception as error:  # the exporter's errors have no common type, and their text is a page
        why = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"{about} cannot be written: {why}; use --format feddra") from error
    _check(module, inputs, output, path, about, len(free) > 1)
    return path


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of torchvision and of its own versions."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _check(module: nn.Module, inputs: Mapping[str, Tensor], output: str, path: Path, about: str, is_text: bool) -> None:
    """Compare at several sizes: all, the first alone, and of texts a shorter cut."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    cases = [dict(inputs), {name: x[:1] for name, x in inputs.items()}]
    if is_text:
        cases.append({name: x[:2, :3] for name, x in inputs.items()})
    for case in cases:
        (theirs,) = session.run([output], {name: x.numpy() for name, x in case.items()})
        ours = module(**case).detach()
        if not torch.allclose(ours, torch.from_numpy(theirs), atol=TOLERANCE, rtol=0, equal_nan=True):
            off = float((ours - torch.from_numpy(theirs)).abs().max())
            shape = " × ".join(map(str, next(iter(case.values())).shape))
            raise ValueError(
                f"{about}: onnxruntime's embeddings of {shape} differ by {off:.1g}, more than {TOLERANCE:g}"
            )
