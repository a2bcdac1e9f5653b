"""Weights that come one by one: the bits, and the generator's state, of a model that was built plainly."""

from __future__ import annotations

import json
import logging
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import BODY, SIZES, TEXT, VISION, batch, config, save, scramble
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertForMaskedLM, CLIPConfig, CLIPModel, ViTConfig, ViTModel

from feddra_ds.model import lora, lora_options
from feddra_ds.model.build import build_model
from feddra_ds.model.dual_encoder import DualEncoder
from feddra_ds.model.weights.deferred import defer, lay_out, make_room
from feddra_ds.model.weights.tensor_files import INDEX, Shape, all_stored, stored, write_shards
from feddra_ds.objectives import ObjectiveOptions


def builder(with_lora: bool = False, **values: Any) -> Callable[[], DualEncoder]:
    def build() -> DualEncoder:
        model = build_model(config(**values), ObjectiveOptions(learnable_temperature=True), **SIZES)
        lora.apply(model, lora_options.parse({"type": "lora", "r": 2}) if with_lora else None)
        return model

    return build


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def check(build: Callable[[], nn.Module]) -> None:
    """Names, shapes, dtypes, what trains, every bit, the mode and what is drawn next: as with a plain build."""
    torch.manual_seed(3)
    plain, after = build(), torch.get_rng_state()
    torch.manual_seed(3)
    model, weights = defer(build)
    assert weights is not None
    assert torch.equal(torch.get_rng_state(), torch.manual_seed(3).get_state()), "deferring draws"
    wanted = tensors_of(plain)
    assert tensors_of(model).keys() == wanted.keys()
    assert all(p.is_meta for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in plain.parameters()]
    assert [m.training for m in model.modules()] == [m.training for m in plain.modules()]
    read = dict(weights.stream(wanted))
    shuffled = random.Random(0).sample(sorted(wanted), len(wanted))
    for again in (read, {name: weights.read(name) for name in shuffled}):
        assert again.keys() == wanted.keys()
        for name, tensor in again.items():
            assert (tensor.dtype, tensor.shape) == (wanted[name].dtype, wanted[name].shape), name
            assert tensor.is_contiguous()
            assert torch.equal(tensor, wanted[name]), name
    weights.leave_generator()
    assert torch.equal(torch.get_rng_state(), after)


SMALL_DISTIL = {"model_type": "distilbert", "dim": 32, "n_layers": 3, "n_heads": 2, "hidden_dim": 64}


@pytest.mark.parametrize("kind", ["vit", "dinov2", "clip_vision_model", "siglip_vision_model", "deit"])
def test_random_image_encoders(kind: str) -> None:
    values = VISION | {"model_type": kind}
    if kind == "dinov2":
        del values["intermediate_size"]
    head = {"norm": "batchnorm", "output_norm": "batchnorm"}
    check(builder(vision={"config": values}, num_extra_blocks=1, head=head))


@pytest.mark.parametrize(
    "values",
    [
        *(TEXT | {"model_type": kind} for kind in ("roberta", "clip_text_model", "siglip_text_model", "modernbert")),
        SMALL_DISTIL,
    ],
    ids=lambda values: str(values["model_type"]),
)
def test_random_text_encoders(values: dict[str, Any]) -> None:
    check(builder(text={"config": values}))


def test_adapters() -> None:
    check(builder(with_lora=True))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT for larger images, BERT's masked language model (no pooler, other names) in several files, a CLIP, our own."""
    root = tmp_path_factory.mktemp("pretrained")
    vit = ViTModel(ViTConfig(image_size=64, patch_size=8, **BODY))
    bert = BertForMaskedLM(BertConfig(vocab_size=60, **BODY))
    text, vision = {"vocab_size": 60, "max_position_embeddings": 20}, {"image_size": 32, "patch_size": 8}
    clip = CLIPModel(CLIPConfig(text_config={**text, **BODY}, vision_config={**vision, **BODY}, projection_dim=16))
    for name, model in {"vit": vit, "bert": bert, "clip": clip, "own": builder()()}.items():
        scramble(model)
        save(model, root / name)
    state = load_file(root / "bert" / "model.safetensors")
    (root / "bert" / "model.safetensors").unlink()
    shapes = {name: Shape(tuple(t.shape), t.dtype) for name, t in state.items()}
    assert len(write_shards(shapes, state.__getitem__, root / "bert", 20_000)) > 3
    return root


@pytest.mark.parametrize(
    ("sides", "whole"),
    [({"text": "bert"}, None), ({"text": "bert", "vision": "vit"}, None), ({"text": "clip", "vision": "clip"}, None),
     ({}, "clip"), ({}, "own")],
    ids=["bert", "bert and vit resized", "halves of clip", "clip", "own"],
)  # fmt: skip
def test_pretrained(folders: Path, sides: dict[str, str], whole: str | None) -> None:
    values: dict[str, Any] = {side: {"pretrained": str(folders / name)} for side, name in sides.items()}
    if whole is not None:
        values["pretrained"] = str(folders / whole)
    check(builder(**values, num_top_blocks=2))


def test_a_file_is_read_when_its_tensor_is(folders: Path, tmp_path: Path) -> None:
    path = tmp_path / "bert.safetensors"
    save_file({"a": torch.ones(3), "b": torch.zeros(2, 2, dtype=torch.bfloat16)}, path)
    tensors = all_stored([path])
    save_file({"a": torch.full((3,), 2.0), "b": torch.zeros(2, 2, dtype=torch.bfloat16)}, path)
    assert tensors["a"].read().tolist() == [2.0, 2.0, 2.0]
    assert tensors["b"].read().dtype == torch.bfloat16


# ---- what cannot be deferred is built whole
def fails_to_defer(build: Callable[[], nn.Module], caplog: pytest.LogCaptureFixture, reason: str) -> None:
    torch.manual_seed(5)
    plain, after = build(), torch.get_rng_state()
    torch.manual_seed(5)
    with caplog.at_level(logging.WARNING, logger="feddra_ds"):
        model, weights = defer(build)
    assert weights is None
    assert reason in caplog.text
    assert all(torch.equal(tensors_of(model)[name], tensor) for name, tensor in tensors_of(plain).items())
    assert torch.equal(torch.get_rng_state(), after)


def test_weights_in_other_files(folders: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = ViTModel(ViTConfig(image_size=32, patch_size=8, **BODY))
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    fails_to_defer(
        builder(vision={"pretrained": str(tmp_path)}, pickled_weights=True), caplog, "has no safetensors weights"
    )


def test_an_encoder_whose_cut_is_tried(caplog: pytest.LogCaptureFixture) -> None:
    values = VISION | {"model_type": "vit_msn"}
    fails_to_defer(builder(vision={"config": values}), caplog, "a vit_msn encoder has to be tried")


def _linear(change: Callable[[nn.Linear], Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        layer = nn.Linear(3, 2)
        change(layer)
        return layer

    return build


def _draw_twice(layer: nn.Linear) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        layer.weight.normal_(generator=generator)
        layer.bias.normal_(generator=generator)


def _write_into(layer: nn.Linear) -> None:
    torch.ones(2).numpy()  # a tensor that is to have a value at once


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda layer: torch.manual_seed(7), "seeds torch's generator itself"),
        (_draw_twice, "drawn from twice"),
        (_write_into, "the model is built whole"),
        (lambda layer: layer.register_buffer("late", torch.empty(2, device="meta")), "nothing says what late holds"),
        (lambda layer: layer.weight.data.add_(torch.empty(3, device="meta")), "has no content to go on with"),
        (lambda layer: torch.tensor([1.0]).add_(layer.bias[0].detach()), "writes into a tensor that is there already"),
        (lambda layer: torch.tensor([1.0]).normal_(), "draws into a tensor that is there already"),
    ],
    ids=["seed", "generator", "numpy", "meta buffer", "meta operand", "write", "draw"],
)
def test_constructions_that_need_values(
    change: Callable[[nn.Linear], Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    build = _linear(change)
    torch.manual_seed(5)
    with caplog.at_level(logging.WARNING, logger="feddra_ds"):
        model, weights = defer(build)
    assert weights is None
    assert reason in caplog.text
    assert not model.weight.is_meta  # type: ignore[union-attr]


def test_a_users_mistake_is_raised_as_without_deferring() -> None:
    with pytest.raises(ValueError, match=r"model\.vision\.config\.patch_size: 7 does not divide"):
        defer(builder(vision={"config": VISION | {"patch_size": 7}}))


# ---- giving the weights a place
def test_lay_out_and_make_room() -> None:
    def tied() -> nn.Module:
        model = builder(head={"norm": "batchnorm"})()
        layers = model.backbone.text.encoder.layer
        layers[1].attention.output.dense.weight = layers[0].attention.output.dense.weight
        return model

    torch.manual_seed(3)
    plain = tied()
    torch.manual_seed(3)
    model, weights = defer(tied)
    assert weights is not None
    twin = make_room(model, torch.device("cpu"), torch.bfloat16)
    assert {p.dtype for p in twin.parameters()} == {torch.bfloat16}
    torch.manual_seed(3)
    model, weights = defer(tied)
    assert weights is not None
    lay_out(model, weights, lambda p: nn.Parameter(torch.zeros(p.shape)), torch.device("cpu"))
    assert len(list(model.parameters())) == len(list(plain.parameters()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights.read(name))
        one, two = model.eval()(**batch()), plain.eval()(**batch())
    assert torch.equal(one.image_embeds, two.image_embeds)
    assert torch.equal(one.text_embeds, two.text_embeds)
    assert make_room(plain, torch.device("cpu"), torch.float32) is plain
    assert torch.equal(plain.aligner.vision.head.layers[0].weight, model.aligner.vision.head.layers[0].weight)


# ---- files
def test_shards_are_what_transformers_writes(tmp_path: Path) -> None:
    from huggingface_hub import save_torch_state_dict

    state = builder(head={"norm": "batchnorm"})().state_dict() | {
        "empty": torch.zeros(0, 3),
        "flag": torch.tensor(True),
    }
    shapes = {name: Shape(tuple(t.shape), t.dtype) for name, t in state.items()}
    for limit in (60_000, "5GB"):
        ours, theirs = tmp_path / f"ours {limit}", tmp_path / f"theirs {limit}"
        ours.mkdir()
        theirs.mkdir()
        write_shards(shapes, state.__getitem__, ours, limit)
        save_torch_state_dict(state, theirs, max_shard_size=limit)
        assert sorted(p.name for p in ours.iterdir()) == sorted(p.name for p in theirs.iterdir())
        for path in ours.glob("*.safetensors"):
            wanted = load_file(theirs / path.name)
            assert all(torch.equal(tensor, wanted[name]) for name, tensor in load_file(path).items())
            assert {n: (t.shape, t.dtype) for n, t in stored(path).items()} == {
                n: (tuple(t.shape), t.dtype) for n, t in wanted.items()
            }
            assert all(torch.equal(stored(path)[name].read(), tensor) for name, tensor in wanted.items())
        if limit != "5GB":
            one, two = (json.loads((folder / INDEX).read_text()) for folder in (ours, theirs))
            assert one["weight_map"] == two["weight_map"]


def test_broken_files(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(100)}, path)
    whole = path.read_bytes()
    tensor = stored(path)["a"]
    path.write_bytes(whole[:-4])
    with pytest.raises(ValueError, match="it is cut off"):
        stored(path)
    with pytest.raises(ValueError, match="should end 4 bytes behind"):
        tensor.read()
    for content in (b"abc", struct.pack("<Q", 2**40) + b"{}", struct.pack("<Q", 3) + b"{}}"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is no safetensors file"):
            stored(path)
