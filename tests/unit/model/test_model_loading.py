"""Encoders and whole models from configs and from folders of weights, and what is said when they are wrong."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import BODY, TEXT, VISION, batch, build, save, scramble
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
    SiglipConfig,
    SiglipModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    ViTConfig,
    ViTModel,
)

from feddra_ds.model import encoders
from feddra_ds.model.image_size import interpolate_positions, resize_images
from feddra_ds.model.weights.deferred import defer

CLIP_VISION = {**BODY, "image_size": 32, "patch_size": 8}
CLIP_TEXT = {**BODY, "vocab_size": 60, "max_position_embeddings": 12, "bos_token_id": 1, "eos_token_id": 59}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Small models with random weights, saved as transformers saves them."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(1)
    models = {
        "vit": ViTModel(ViTConfig(**BODY, image_size=48, patch_size=8, hidden_dropout_prob=0.1)),
        "bert": BertModel(BertConfig(**BODY, vocab_size=80, max_position_embeddings=20)),
        "roberta": RobertaModel(RobertaConfig(**BODY, vocab_size=80, max_position_embeddings=20, pad_token_id=1)),
        "clip": CLIPModel(CLIPConfig(vision_config=CLIP_VISION, text_config=CLIP_TEXT, projection_dim=24)),
        "siglip": SiglipModel(SiglipConfig(vision_config=CLIP_VISION, text_config=CLIP_TEXT)),
        "vtde": VisionTextDualEncoderModel(
            VisionTextDualEncoderConfig(
                vision_config=ViTConfig(**BODY, image_size=32, patch_size=8).to_dict(),
                text_config=BertConfig(**BODY, vocab_size=60, max_position_embeddings=12).to_dict(),
                projection_dim=24,
            )
        ),
    }
    for model in models.values():
        scramble(model)
    return {name: save(model, root / name) for name, model in models.items()}


def test_defaults_are_the_papers_encoders() -> None:
    with torch.device("meta"):
        vision = encoders.vision_encoder(encoders.EncoderConfig(), 224)
    assert (vision.config.model_type, vision.config.num_hidden_layers, vision.config.hidden_size) == ("vit", 12, 768)
    config = encoders.new_config(encoders.EncoderConfig(), "bert", "key")
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == ("bert", 12, 768)


def test_arguments_reach_the_configs() -> None:
    model = build(sizes={"image_size": 40, "vocab_size": 77, "pad_token_id": 3, "max_text_length": 19})
    vision, text = model.config.vision_config, model.config.text_config
    assert vision.image_size == 40
    assert (text.vocab_size, text.pad_token_id, text.max_position_embeddings) == (77, 3, 19)
    assert vision.hidden_dropout_prob == text.attention_probs_dropout_prob == 0.0
    kept = build(text={"config": TEXT | {"hidden_dropout_prob": 0.2, "vocab_size": 100}})
    assert kept.config.text_config.hidden_dropout_prob == 0.2
    assert kept.config.text_config.vocab_size == 100


def test_pooling_can_be_set() -> None:
    model = build(vision={"config": VISION, "pooling": "mean"}, head={"kind": "linear"}).eval()
    assert (model.config.vision_pooling, model.config.text_pooling) == ("mean", "cls")
    images = batch()["pixel_values"]
    states = model.whole_encoder("vision")(images).last_hidden_state.mean(1)
    expected = torch.nn.functional.normalize(model.aligner.vision.head(states), dim=-1)
    assert torch.allclose(model(pixel_values=images).image_embeds, expected, atol=1e-6)


def test_roberta_has_room_behind_its_padding_id() -> None:
    model = build(text={"config": TEXT | {"model_type": "roberta"}}, sizes={"pad_token_id": 1})
    assert model.config.text_config.max_position_embeddings == 12 + 2
    model(input_ids=torch.full((1, 12), 7))


def test_pretrained_encoders_keep_their_weights(folders: dict[str, str]) -> None:
    model = build(vision={"pretrained": folders["vit"]}, text={"pretrained": folders["bert"]}, sizes={"image_size": 48})
    model.eval()
    images = batch(48)["pixel_values"]
    plain = ViTModel.from_pretrained(folders["vit"]).eval()(images).last_hidden_state
    assert torch.allclose(model.whole_encoder("vision")(images).last_hidden_state, plain, atol=1e-6)
    ids, mask = batch()["input_ids"], batch()["attention_mask"]
    plain = BertModel.from_pretrained(folders["bert"]).eval()(ids, mask).last_hidden_state
    got = model.whole_encoder("text")(ids, mask).last_hidden_state
    assert torch.allclose(got[mask.bool()], plain[mask.bool()], atol=1e-6)
    assert model.config.vision_config.hidden_dropout_prob == 0.0
    assert model.training is False


@pytest.mark.parametrize("size", [32, 64])
def test_position_embeddings_are_interpolated(folders: dict[str, str], size: int) -> None:
    model = build(vision={"pretrained": folders["vit"]}, sizes={"image_size": size}).eval()
    images = batch(size)["pixel_values"]
    plain = ViTModel.from_pretrained(folders["vit"]).eval()(images, interpolate_pos_encoding=True).last_hidden_state
    assert torch.allclose(model.whole_encoder("vision")(images).last_hidden_state, plain, atol=1e-5)
    assert model.config.vision_config.image_size == size


@pytest.mark.parametrize("name", ["bert", "clip"])
def test_the_first_blocks_of_a_pretrained_encoder(folders: dict[str, str], name: str) -> None:
    def load(num_layers: int | None) -> PreTrainedModel:
        section = encoders.EncoderConfig(pretrained=folders[name], num_layers=num_layers)
        return encoders.text_encoder(section, 60, 0, 12)

    cut, whole = load(2), load(None)
    assert (cut.config.num_hidden_layers, whole.config.num_hidden_layers) == (2, 3)
    third = re.compile(r"\.layers?\.2\.")
    expected = {key: tensor for key, tensor in whole.state_dict().items() if not third.search(key)}
    assert cut.state_dict().keys() == expected.keys()
    for key, tensor in cut.state_dict().items():
        assert torch.equal(tensor, expected[key]), key
    deferred, weights = defer(lambda: load(2))
    assert weights is not None
    for key, _ in deferred.named_parameters():
        assert torch.equal(weights.read(key), expected[key]), key


def test_more_blocks_than_there_are(folders: dict[str, str]) -> None:
    section = encoders.EncoderConfig(pretrained=folders["vit"], num_layers=4)
    with pytest.raises(ValueError, match=r"model\.vision\.num_layers: 4 is more than the 3 blocks of"):
        encoders.vision_encoder(section, 48)


def test_interpolation_of_an_embedding_table(folders: dict[str, str]) -> None:
    model = build(vision={"pretrained": folders["clip"]}, sizes={"image_size": 64}).eval()
    images = batch(64)["pixel_values"]
    clip = CLIPModel.from_pretrained(folders["clip"]).eval().vision_model
    plain = clip(images, interpolate_pos_encoding=True).last_hidden_state
    assert torch.allclose(model.whole_encoder("vision")(images).last_hidden_state, plain, atol=1e-5)


def test_halves_of_a_whole_model(folders: dict[str, str]) -> None:
    for name in ("clip", "siglip"):
        model = build(vision={"pretrained": folders[name]}, text={"pretrained": folders[name]}).eval()
        kind = {"clip": CLIPModel, "siglip": SiglipModel}[name]
        whole = kind.from_pretrained(folders[name]).eval()
        ids = batch()["input_ids"]
        plain = whole.text_model(ids, torch.ones_like(ids)).last_hidden_state
        got = model.whole_encoder("text")(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        assert torch.allclose(got, plain, atol=1e-6)


def reference(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    out = model.eval()(**inputs)
    return out.image_embeds, out.text_embeds


@pytest.mark.parametrize("num_top", [0, 1])
def test_a_whole_clip_model_gives_its_own_embeddings(folders: dict[str, str], num_top: int) -> None:
    model = build(pretrained=folders["clip"], num_top_blocks=num_top).eval()
    inputs = batch()
    inputs["input_ids"].clamp_(max=58)
    for row, length in enumerate(inputs["attention_mask"].sum(1)):
        inputs["input_ids"][row, length - 1 :] = 59  # CLIP ends a text with its end token, and pads with it
    out = model(**inputs)
    plains = reference(CLIPModel.from_pretrained(folders["clip"]), inputs)
    for got, plain in zip((out.image_embeds, out.text_embeds), plains, strict=True):
        assert got.shape == (4, 24)
        assert torch.allclose(got, plain, atol=1e-6)
    assert model.config.head_kind == "linear"


@pytest.mark.parametrize("num_top", [0, 2])
def test_a_whole_dual_encoder_gives_its_own_embeddings(folders: dict[str, str], num_top: int, tmp_path: Path) -> None:
    model = build(pretrained=folders["vtde"], num_top_blocks=num_top).eval()
    plain = reference(VisionTextDualEncoderModel.from_pretrained(folders["vtde"]), batch())
    out = model(**batch())
    assert torch.allclose(out.image_embeds, plain[0], atol=1e-6)
    assert torch.allclose(out.text_embeds, plain[1], atol=1e-6)
    assert any(".pooler." in n for n, _ in model.aligner.named_parameters())
    again = build(pretrained=save(model, tmp_path / "again")).eval()(**batch())  # and once more, cut elsewhere
    assert torch.allclose(again.text_embeds, plain[1], atol=1e-6)


def test_an_exported_model_is_a_start_for_another_cut(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = build(num_extra_blocks=1, num_top_blocks=2, head={"norm": "batchnorm"}).eval()
    scramble(first)
    (tmp_path / "run").mkdir()
    save(first, tmp_path / "run" / "model")
    with caplog.at_level(logging.WARNING, "feddra_ds"):
        second = build(9, pretrained=str(tmp_path / "run"), num_top_blocks=1, objective={"temperature": 0.05}).eval()
    assert "model.num_extra_blocks = 0 is not used: model.pretrained has 1" in caplog.text
    one, two = first(**batch()), second(**batch())
    assert torch.allclose(one.image_embeds, two.image_embeds, atol=1e-6)
    assert torch.allclose(one.text_embeds, two.text_embeds, atol=1e-6)
    assert two.temperature == 0.05
    assert len(second.aligner.vision.blocks) == 1


def test_an_exported_model_is_resized(tmp_path: Path) -> None:
    first = build()
    second = build(pretrained=save(first, tmp_path / "m"), sizes={"image_size": 48})
    assert second(**batch(48)).image_embeds.shape == (4, 16)
    assert second.config.image_size == 48


WRONG = [
    ({"vision": {"pretrained": "/no/such/folder"}}, {}, "model.vision.pretrained: there is no folder /no/such/folder"),
    ({"text": {"pretrained": "{tmp}"}}, {}, "model.text.pretrained: .* has no config.json"),
    ({"text": {"pretrained": "{tmp}/file"}}, {}, "model.text.pretrained: .*file is a file; give the folder"),
    ({"text": {"pretrained": "{tmp}/broken"}}, {}, "model.text.pretrained: cannot load .*broken"),
    ({"text": {"pretrained": "{tmp}/empty"}}, {}, "model.text.pretrained: cannot load .*empty"),
    ({"vision": {"pretrained": "{bert}"}}, {}, "model.vision.pretrained: .* bert model, which reads input_ids"),
    ({"text": {"pretrained": "{vit}"}}, {}, "model.text.pretrained: .* vit model, which reads pixel_values, not in"),
    ({"pretrained": "{bert}"}, {}, "model.pretrained: .* is a bert model; give a CLIP, SigLIP or VisionTextDualEncoder"),
    ({"pretrained": "/no/such/folder"}, {}, "model.pretrained: there is no folder /no/such/folder"),
    ({"vision": {"pretrained": "{vit}"}}, {"image_size": 36}, "model.vision.pretrained: 8 does not divide data.image"),
    ({"text": {"pretrained": "{bert}"}}, {"vocab_size": 81}, "model.text.pretrained: its 80 tokens are fewer .* 81;"),
    ({"text": {"pretrained": "{bert}"}}, {"max_text_length": 21}, "data.text_length: 21 is more than the 20 tokens"),
    ({"text": {"pretrained": "{roberta}"}}, {"max_text_length": 19}, "data.text_length: 19 is more than the 18 tokens"),
    ({"vision": {"config": {**VISION, "hiden_size": 3}}}, {}, "model.vision.config: a vit config has no hiden_size"),
    ({"vision": {"config": {**VISION, "hidden_size": "x"}}}, {}, "model.vision.config: "),
    ({"vision": {"config": {**VISION, "image_size": 64}}}, {}, "model.vision.config.image_size: 64 contradicts data"),
    ({"vision": {"config": {**VISION, "patch_size": 7}}}, {}, "model.vision.config.patch_size: 7 does not divide"),
    ({"vision": {"config": {**VISION, "model_type": "vitt"}}}, {}, "model.vision.config.model_type: .* 'vitt'; did you"),
    ({"text": {"config": {**TEXT, "num_attention_heads": 5}}}, {}, "model.text.config: "),
    ({"text": {"config": {**TEXT, "vocab_size": 59}}}, {}, "model.text.config.vocab_size: 59 is too small, 60 are needed"),
    ({"text": {"config": {**TEXT, "max_position_embeddings": 11}}}, {}, "model.text.config.max_position_embeddings: 11 is"),
    ({"num_top_blocks": 3}, {}, "model.num_top_blocks: 3 top blocks of a vit encoder with 3 blocks"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "sizes", "message"), WRONG, ids=[str(n) for n in range(len(WRONG))])
def test_what_cannot_be_built_is_named(
    values: dict, sizes: dict, message: str, folders: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    for name, text in (("broken", "{"), ("empty", json.dumps({"model_type": "bert"}))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)

    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: fill(v) for k, v in value.items()}
        return value.format(tmp=tmp_path, **folders) if isinstance(value, str) else value

    with pytest.raises(ValueError, match=message) as caught:
        build(sizes=sizes, **fill(values))
    assert "\n" not in str(caught.value)


def test_a_hub_that_cannot_be_reached_gives_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"model.text.pretrained: no-such/model is not a folder here .* hub"):
        build(text={"pretrained": "no-such/model"})


def test_a_whole_model_with_a_tower_without_pooler_is_refused(tmp_path: Path) -> None:
    vision = ViTConfig(**BODY, image_size=32, patch_size=8)
    text = {"model_type": "distilbert", "dim": 32, "n_layers": 3, "n_heads": 2, "hidden_dim": 64, "vocab_size": 60}
    config = VisionTextDualEncoderConfig(vision_config=vision.to_dict(), text_config=text, projection_dim=24)
    with pytest.raises(ValueError, match=r"model.pretrained: its text encoder \(distilbert\) has no pooler"):
        build(pretrained=save(VisionTextDualEncoderModel(config), tmp_path / "m"))


def test_sizes_that_cannot_be_interpolated_are_refused() -> None:
    with pytest.raises(ValueError, match="k does not hold one row per patch"):
        interpolate_positions(torch.zeros(1, 8, 4), 3, 4, key="k")
    torch.manual_seed(0)
    values = {k: v for k, v in VISION.items() if k != "model_type"}
    beit = encoders.AutoConfig.for_model("beit", **values, image_size=32, use_relative_position_bias=True)
    with pytest.raises(ValueError, match=r"model.vision.pretrained: .*relative.* depends on the image size 32"):
        resize_images(encoders.new_encoder(beit, "k"), 48, "model.vision.pretrained")
