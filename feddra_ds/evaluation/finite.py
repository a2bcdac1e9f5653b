"""What is not finite: weights of a model, and embeddings of pairs. Every command that meets any says so and fails."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feddra_ds.common.text import listed

if TYPE_CHECKING:
    from torch import Tensor

    from feddra_ds.evaluation.gallery import Gallery
    from feddra_ds.evaluation.models import Models


def of_tensors(named: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    """name → number of values that are not finite, of the tensors that have any."""
    counts = ((name, int((~x.isfinite()).sum())) for name, x in named if x.is_floating_point())
    return {name: count for name, count in counts if count}


def of_folders(folders: Iterable[Path]) -> dict[str, int]:
    """of_tensors of all safetensors and ONNX files in and under the folders, or of the files themselves."""
    from safetensors import safe_open  # late, as torch: --help can do without

    out: dict[str, int] = {}
    for folder in folders:
        for path in [folder] if folder.is_file() else sorted(folder.rglob("*")):
            if path.suffix == ".safetensors":
                with safe_open(path, "pt") as file:
                    out |= of_tensors((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
            elif path.suffix == ".onnx":
                out |= of_tensors(_onnx_weights(path))
    return out


def _onnx_weights(path: Path) -> Iterator[tuple[str, Tensor]]:
    import onnx  # of the extra onnx, without which there is no such file
    import torch

    for weight in onnx.load(path).graph.initializer:
        yield weight.name, torch.from_numpy(onnx.numpy_helper.to_array(weight).copy())


def of_evaluation(models: Models, galleries: Mapping[str, Gallery]) -> dict[str, Any]:
    """{weights: {name: count}, pairs: {client: {image: [key], text: [key]}}} of what is not finite; {} for nothing."""
    pairs = {client: found for client, gallery in galleries.items() if (found := gallery.non_finite)}
    return {"weights": models.non_finite, "pairs": pairs} if models.non_finite or pairs else {}


def in_words(found: Mapping[str, Any]) -> list[str]:
    """Lines that count and name what of_evaluation found."""
    lines = [weights_in_words(found["weights"])] if found.get("weights") else []
    for client, sides in found.get("pairs", {}).items():
        for side, keys in sides.items():
            lines.append(f"{client}: {len(keys)} {side} embeddings are not finite: {listed(keys)}")
    return lines


def weights_in_words(weights: Mapping[str, int]) -> str:
    """One line on a model's weights."""
    names = [f"{name} ({count})" for name, count in weights.items()]
    return f"the model has {sum(weights.values())} weights that are not finite: {listed(names)}"


def complain(lines: Iterable[str]) -> int:
    """The lines on stderr. Returns the command's exit code: 1 where there is one."""
    shown = list(lines)
    for line in shown:
        print(f"feddra-ds: {line}", file=sys.stderr)
    return 1 if shown else 0
