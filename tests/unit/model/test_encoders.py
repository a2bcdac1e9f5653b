"""The encoders of docs/encoders.md, each from a folder of random weights: what they compute, and their gradients."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import BODY, SIZES, batch, build, config, save, scramble
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel, SiglipConfig, SiglipModel
from transformers.models.siglip2 import Siglip2Config, Siglip2Model

from feddra_ds.common.errors import ConfigError
from feddra_ds.config.load import from_dict
from feddra_ds.data.loading.tokens import load_tokenizer
from feddra_ds.model import encoders, lora, lora_options, towers
from feddra_ds.model.build import build_model, model_of
from feddra_ds.model.dual_encoder import DualEncoder
from feddra_ds.model.heads import BatchNorm
from feddra_ds.model.weights.deferred import defer
from feddra_ds.objectives import ObjectiveOptions

IMAGES: dict[str, Any] = {**BODY, "image_size": 32, "patch_size": 8}
WINDOWS = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}
MAPS = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "embedding_size": 8, "groups_width": 8}
CONVOLUTIONS = {
    "image_size": 32,
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 1, 1],
    "layer_scale_init_value": 0.5,
}
TEXTS: dict[str, Any] = {**BODY, "vocab_size": 60, "max_position_embeddings": 24}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
RELATIVE = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 8,
    "norm_rel_ebd": "layer_norm",
}
T5 = {"vocab_size": 60, "d_model": 32, "num_layers": 2, "d_kv": 8, "d_ff": 64, "num_heads": 3}

# type: its config, and how many of its parameters the forward leaves out (mask tokens)
VISION: dict[str, tuple[dict[str, Any], int]] = {
    "vit": (IMAGES, 0), "deit": (IMAGES, 0), "beit": (IMAGES, 0), "dinov2": (IMAGES, 1),
    "clip_vision_model": (IMAGES, 0), "siglip_vision_model": (IMAGES, 0),
    "siglip2_vision_model": ({**BODY, "patch_size": 8, "num_patches": 16}, 0),
    "swin": (WINDOWS, 0), "swinv2": (WINDOWS, 0), "convnext": (CONVOLUTIONS, 0),
    "convnextv2": ({k: v for k, v in CONVOLUTIONS.items() if "scale" not in k}, 0), "resnet": (MAPS, 0), "regnet": (MAPS, 0),
}  # fmt: skip
TEXT: dict[str, dict[str, Any]] = {
    "bert": TEXTS, "roberta": TEXTS, "electra": TEXTS, "mpnet": TEXTS, "clip_text_model": {**TEXTS, "eos_token_id": 2},
    "distilbert": {"dim": 32, "n_layers": 3, "n_heads": 2, "hidden_dim": 64, "vocab_size": 60},
    "modernbert": {**TEXTS, **SPECIAL}, "siglip_text_model": TEXTS, "siglip2_text_model": TEXTS,
    "albert": {**TEXTS, "embedding_size": 16}, "deberta": {**TEXTS, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": {**TEXTS, **RELATIVE}, "t5": T5, "mt5": T5, "umt5": T5,
}  # fmt: skip
FAMILIES = [("vision", kind, *row) for kind, row in VISION.items()] + [("text", k, v, 0) for k, v in TEXT.items()]
NAMES = [family[1] for family in FAMILIES]


def plain_encoder(kind: str, values: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    made = AutoConfig.for_model(kind, **values)
    encoder = AutoModel.from_config(made) if kind in towers.ENCODERS_OF_TWO else encoders.new_encoder(made, "key")
    scramble(encoder)
    for module in encoder.modules():  # statistics that are not a new batchnorm's
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    return encoder.eval()


def of_folder(side: str, kind: str, folder: str, **values: Any) -> DualEncoder:
    whole = kind in towers.WHOLE_TYPES
    blocks = {"num_top_blocks": 0, "num_extra_blocks": 1} if whole else {"num_top_blocks": 1}
    return build(**{side: {"pretrained": folder}}, **blocks, **values)


def test_the_documented_encoders_are_the_tested_ones() -> None:
    page = (Path(__file__).parents[3] / "docs" / "encoders.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \|.*\| (cut|whole) \|", page, re.MULTILINE)
    assert dict(rows) == {kind: "whole" if kind in towers.WHOLE_TYPES else "cut" for kind in NAMES}
    assert set(NAMES) == towers.TESTED_TYPES | towers.WHOLE_TYPES


@pytest.mark.parametrize(("side", "kind", "values", "num_unused"), FAMILIES, ids=NAMES)
def test_encoder_from_a_folder(side: str, kind: str, values: dict[str, Any], num_unused: int, tmp_path: Path) -> None:
    plain: Any = plain_encoder(kind, values)
    model = of_folder(side, kind, save(plain, tmp_path / kind)).double().eval()
    plain = plain.encoder if kind in towers.ENCODERS_OF_TWO else plain
    inputs = batch()
    images = inputs["pixel_values"] = inputs["pixel_values"].double()
    own = encoders.image_inputs(plain.config, images) if side == "vision" else inputs | {"pixel_values": None}
    own = {name: tensor for name, tensor in own.items() if tensor is not None}
    wanted = towers.as_sequence(plain.double()(**own, return_dict=True).last_hidden_state)

    hidden = getattr(model.encode(**inputs), side)
    states = towers.call_blocks(list(getattr(model.aligner, side).blocks), hidden.states, hidden.calls)
    normed = getattr(model.aligner, side).norm(states)
    # BEiT's and ConvNeXt's norm, and CLIP's, act in transformers on what is pooled alone
    got = states if kind in ("beit", "convnext", "convnextv2", "clip_vision_model") else normed
    real = inputs["attention_mask"].bool() if side == "text" else slice(None)
    assert torch.allclose(got[real], wanted[real], atol=1e-5), (got - wanted).abs().max()
    if kind == "siglip_vision_model":
        assert not any("head" in name for name, _ in model.backbone.named_parameters())  # its pooler is left out
    check_gradient(model, side, inputs, num_unused)


def check_gradient(model: DualEncoder, side: str, inputs: dict[str, Tensor], num_unused: int) -> None:
    """Every parameter has one, and along a random direction it is the slope of the loss."""
    generator = torch.Generator().manual_seed(1)
    given = {k: v for k, v in inputs.items() if (k == "pixel_values") == (side == "vision")}
    names = [f"backbone.{side}.", f"aligner.{side}."]
    parameters = {n: p for n, p in model.named_parameters() if n.startswith(tuple(names))}
    weights = torch.randn(4, 16, generator=generator, dtype=torch.float64)

    def loss() -> Tensor:
        hidden = model.encode(given.get("pixel_values"), given.get("input_ids"), given.get("attention_mask"))
        return (model.aligner(hidden)[side == "text"] * weights).sum()

    gradients = torch.autograd.grad(loss(), list(parameters.values()), allow_unused=True)
    used = {n: g for n, g in zip(parameters, gradients, strict=True) if g is not None}
    assert len(parameters) - len(used) == num_unused, sorted(parameters.keys() - used.keys())
    assert all(g.isfinite().all() for g in used.values())
    directions = {n: torch.randn(g.shape, generator=generator, dtype=g.dtype) for n, g in used.items()}
    slope = sum(float((g * directions[n]).sum()) for n, g in used.items())
    step, values = 1e-5, []
    with torch.no_grad():
        for sign in (1, -2):
            for name, direction in directions.items():
                parameters[name].add_(sign * step * direction)
            values.append(float(loss()))
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=2e-2, abs=1e-3)


@pytest.mark.parametrize("kind", ["bert", "t5", "swin", "beit"])
def test_a_pretrained_encoder_trains_without_its_dropout(kind: str, tmp_path: Path) -> None:
    side = "text" if kind in TEXT else "vision"
    values = TEXT[kind] if side == "text" else VISION[kind][0]
    plain = plain_encoder(kind, values | ({"drop_path_rate": 0.3} if side == "vision" else {}))
    model = of_folder(side, kind, save(plain, tmp_path / kind)).train()
    once, again = model(**batch()), model(**batch())
    assert torch.equal(once.image_embeds, again.image_embeds)
    assert torch.equal(once.text_embeds, again.text_embeds)


@pytest.mark.parametrize("kind", sorted(towers.WHOLE_TYPES))
def test_blocks_of_what_cannot_be_cut_are_refused_before_weights_are_made(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = "text" if kind in TEXT else "vision"
    values = TEXT[kind] if side == "text" else VISION[kind][0]
    AutoConfig.for_model(kind, **values).save_pretrained(tmp_path)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were made")

    monkeypatch.setattr(encoders, "new_encoder", never)
    monkeypatch.setattr(encoders, "load_model", never)
    wanted = (
        rf"model\.{side}.*: a {kind} encoder cannot be cut .* model.num_top_blocks = 0, with model.num_extra_blocks = 1"
    )
    section = encoders.EncoderConfig(pretrained=str(tmp_path))
    read = {"vision": encoders.vision_encoder, "text": encoders.text_encoder}[side]
    sizes = (32,) if side == "vision" else (60, 0, 12)
    with pytest.raises(ValueError, match=wanted) as caught:
        read(section, *sizes, 1)  # type: ignore[operator]
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=wanted):
        read(encoders.EncoderConfig(config={"model_type": kind}), *sizes, 1)  # type: ignore[operator]


def test_an_encoder_with_a_decoder_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.text: a bart encoder has a decoder too; give an encoder-only model"):
        build(text={"config": {"model_type": "bart"}}, num_top_blocks=0)


@pytest.mark.parametrize("kind", ["convnext", "swin", "resnet", "t5", "beit"])
def test_weights_come_one_by_one_all_the_same(kind: str, tmp_path: Path) -> None:
    """Random and pretrained, with the bits of a plain build: a whole encoder is not tried where its type is known."""
    side = "text" if kind in TEXT else "vision"
    values = TEXT[kind] if side == "text" else VISION[kind][0]
    folder = save(plain_encoder(kind, values), tmp_path / kind)
    given = {k: v for k, v in values.items() if k not in ("image_size", "vocab_size", "embedding_size", "groups_width")}
    for section in ({"pretrained": folder}, {"config": {"model_type": kind, **given}}):
        described = config(**{side: section}, num_top_blocks=0, num_extra_blocks=1)

        def make(described: Any = described) -> DualEncoder:
            return build_model(described, ObjectiveOptions(), **SIZES)

        torch.manual_seed(4)
        plain = make()
        torch.manual_seed(4)
        model, weights = defer(make)
        assert weights is not None
        assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
        tensors = dict(plain.named_parameters()) | dict(plain.named_buffers())
        assert all(torch.equal(weights.read(name), tensor) for name, tensor in tensors.items())


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = build(
        vision={"config": _resnet()},
        text={"config": {"model_type": "t5", **{k: v for k, v in T5.items() if k != "vocab_size"}}},
        num_top_blocks=0,
        num_extra_blocks=1,
    )
    scramble(model)
    folder = save(model.eval(), tmp_path / "m")
    again = DualEncoder.from_pretrained(folder).eval()
    for name in ("image_embeds", "text_embeds"):
        assert torch.allclose(getattr(model(**batch()), name), getattr(again(**batch()), name), atol=1e-6)
    start = build(pretrained=folder, num_top_blocks=0)
    assert torch.allclose(start.eval()(**batch()).text_embeds, model(**batch()).text_embeds, atol=1e-6)


def _resnet() -> dict[str, Any]:
    return {"model_type": "resnet", "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "embedding_size": 8}


def test_adapters_on_a_whole_encoder() -> None:
    model = build(vision={"config": {"model_type": "convnext", "hidden_sizes": [8, 16, 24, 32]}}, num_top_blocks=0)
    names = lora.targets(model, "vision", None)
    assert names
    assert all("pwconv" in name for name in names)
    lora.apply(model, lora_options.parse({"type": "lora", "r": 2}))
    assert any("backbone.vision" in n and p.requires_grad for n, p in model.named_parameters())


# ---- batchnorms of an encoder
def test_batchnorms_of_an_encoder_have_the_rules_of_ours(tmp_path: Path) -> None:
    model = build(vision={"config": _resnet()}, num_top_blocks=0)
    found = [m for m in model.backbone.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert found
    assert all(type(m) is BatchNorm for m in found)
    assert model.encoder_with_batchnorm() == "model.vision"
    assert build().encoder_with_batchnorm() is None
    model.train()
    model(**batch(), freeze_backbone=True)
    assert all(int(m.num_batches_tracked) == 0 for m in found)  # stage 1 leaves the statistics as they are
    model(**batch())
    assert all(int(m.num_batches_tracked) == 1 for m in found)
    tree = {"model": {"vision": {"config": _resnet()}, "num_top_blocks": 0, "num_extra_blocks": 1}}
    tree |= {"data": {"root": str(tmp_path), "micro_batch_size": 2, "image_size": 32}}
    with pytest.raises(ConfigError, match=r"data.micro_batch_size: splits the batch that model.vision's batchnorms"):
        model_of(from_dict(tree), load_tokenizer(None))


# ---- whole SigLIP models
SIGLIP_TEXT = {**BODY, "vocab_size": 60, "max_position_embeddings": 16, "projection_size": 32}


@pytest.fixture(scope="module")
def siglips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """SigLIP, which SigLIP 2's fixed resolutions are too, and SigLIP 2 for images of any shape."""
    root = tmp_path_factory.mktemp("siglips")
    torch.manual_seed(2)
    models = {
        "siglip": SiglipModel(SiglipConfig(vision_config=IMAGES, text_config=SIGLIP_TEXT)),
        "siglip2": Siglip2Model(
            Siglip2Config(vision_config={**BODY, "patch_size": 8, "num_patches": 16}, text_config=SIGLIP_TEXT)
        ),
    }
    for model in models.values():
        scramble(model)
    return {name: save(model, root / name) for name, model in models.items()}


def own_embeddings(kind: str, folder: str, inputs: dict[str, Tensor], pad: int) -> tuple[Tensor, Tensor]:
    """As SigLIP's own processor would ask for them: texts padded to all 16 positions, without a mask."""
    model = {"siglip": SiglipModel, "siglip2": Siglip2Model}[kind].from_pretrained(folder).eval()
    ids = torch.full((4, 16), pad)
    for row, length in enumerate(inputs["attention_mask"].sum(1)):
        ids[row, :length] = inputs["input_ids"][row, :length]
    images = encoders.image_inputs(model.config.vision_config, inputs["pixel_values"])
    out = model(input_ids=ids, **images)
    return out.image_embeds, out.text_embeds


@pytest.mark.parametrize("num_top", [0, 1])
@pytest.mark.parametrize("kind", ["siglip", "siglip2"])
def test_a_whole_siglip_model_gives_its_own_embeddings(
    kind: str, num_top: int, siglips: dict[str, str], tmp_path: Path
) -> None:
    sizes = {"pad_token_id": 1, "max_text_length": 12}
    model = build(pretrained=siglips[kind], num_top_blocks=num_top, sizes=sizes).eval()
    out = model(**batch(), return_tokens=True)
    plains = own_embeddings(kind, siglips[kind], batch(), pad=1)
    assert torch.allclose(out.image_embeds, plains[0], atol=1e-5)
    assert torch.allclose(out.text_embeds, plains[1], atol=1e-5)
    assert out.text_tokens.shape == (4, 10, 32)
    assert torch.equal(out.text_mask, batch()["attention_mask"])
    folder = save(model, tmp_path / "again")
    again = build(pretrained=folder, num_top_blocks=1 - num_top, sizes=sizes).eval()(**batch())
    assert torch.allclose(again.image_embeds, plains[0], atol=1e-5)
    assert torch.allclose(again.text_embeds, plains[1], atol=1e-5)
    loaded = DualEncoder.from_pretrained(folder).eval()(**batch())
    assert torch.allclose(loaded.text_embeds, plains[1], atol=1e-5)


def test_all_of_a_siglip_trains(siglips: dict[str, str]) -> None:
    model = build(pretrained=siglips["siglip"], sizes={"pad_token_id": 1}).train()
    out = model(**batch())
    (out.image_embeds[:, 0].sum() + out.text_embeds[:, 0].sum()).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
