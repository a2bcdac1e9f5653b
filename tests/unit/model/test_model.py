"""The dual encoder: parts, forward, freezing, saving, temperature, heads."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from model_helpers import BODY, TEXT, VISION, batch, build, save, scramble
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from feddra_ds.model.build import checkpoint_activations
from feddra_ds.model.dual_encoder import DualEncoder
from feddra_ds.model.heads import (
    MIN_TEMPERATURE,
    BatchNorm,
    Head,
    SyncBatchNorm,
    Temperature,
    pool,
    synchronise_batchnorms,
)
from feddra_ds.model.weights.deferred import make_room


def test_parts_are_disjoint_and_named() -> None:
    model = build(num_extra_blocks=1, objective={"learnable_temperature": True})
    names = [n for n, _ in model.named_parameters()]
    assert {n.split(".")[0] for n in names} == {"backbone", "aligner"}
    backbone, aligner = ({id(p) for p in part.parameters()} for part in (model.backbone, model.aligner))
    assert not backbone & aligner
    assert len(backbone | aligner) == len(names)
    for name in ("vision.blocks.0", "vision.norm", "vision.extra.0", "vision.head", "text.blocks.0", "temperature"):
        assert any(n.startswith(f"aligner.{name}.") for n in names), name
    assert not any(".layers.2." in n or ".layer.2." in n or "pooler" in n for n in names)
    assert all(p.ndim > 0 for p in model.parameters())


@pytest.mark.parametrize("num_top", [0, 1, 2])
def test_states_equal_the_plain_encoders(num_top: int) -> None:
    model = build(num_top_blocks=num_top, head={"kind": "linear"}).eval()
    scramble(model)
    inputs = batch()
    out = model(**inputs)
    image = model.whole_encoder("vision")(pixel_values=inputs["pixel_values"]).last_hidden_state[:, 0]
    text = model.whole_encoder("text")(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
    ).last_hidden_state[:, 0]
    for got, state, tower in (
        (out.image_embeds, image, model.aligner.vision),
        (out.text_embeds, text, model.aligner.text),
    ):
        expected = nn.functional.normalize(tower.head(state), dim=-1)
        assert torch.allclose(got, expected, atol=1e-6)
        assert torch.allclose(got.norm(dim=-1), torch.ones(4), atol=1e-6)
        assert got.shape == (4, 16)


def test_same_seed_same_weights() -> None:
    one, two, other = build(5, num_extra_blocks=1), build(5, num_extra_blocks=1), build(6, num_extra_blocks=1)
    state = two.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in one.state_dict().items())
    head = "aligner.vision.head.layers.0.weight"
    assert not torch.equal(one.state_dict()[head], other.state_dict()[head])
    assert one.dtype == torch.float32
    assert one.device.type == "cpu"


def test_top_blocks_keep_the_values_that_the_whole_encoder_drew() -> None:
    few, many = build(num_top_blocks=0), build(num_top_blocks=2)
    for side in ("vision", "text"):
        one, two = few.whole_encoder(side).state_dict(), many.whole_encoder(side).state_dict()
        assert one.keys() == two.keys()
        assert all(torch.equal(one[k], two[k]) for k in one)


def test_freezing_gives_no_gradient_and_no_dropout_but_the_same_values() -> None:
    dropout = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}
    model = build(vision={"config": VISION | dropout}, text={"config": TEXT | dropout}, num_top_blocks=0).train()
    inputs = batch()
    frozen = model(**inputs, freeze_backbone=True)
    again = model(**inputs, freeze_backbone=True)
    assert torch.equal(frozen.image_embeds, again.image_embeds)  # no dropout is left outside the backbone
    assert not torch.equal(model(**inputs).image_embeds, model(**inputs).image_embeds)
    assert torch.allclose(frozen.text_embeds, copy.deepcopy(model).eval()(**inputs).text_embeds, atol=1e-6)
    assert all(m.training for m in model.modules())  # the mode is put back
    (frozen.image_embeds.sum() + frozen.text_embeds.sum()).backward()
    assert all(p.grad is None for p in model.backbone.parameters())
    assert all(p.grad is not None for p in model.aligner.parameters())


def test_modes_of_submodules_survive_freezing() -> None:
    model = build().train()
    model.backbone.text.eval()
    model(**batch(), freeze_backbone=True)
    assert model.backbone.vision.training
    assert not any(m.training for m in model.backbone.text.modules())


def test_every_parameter_is_used() -> None:
    model = build(num_extra_blocks=1, objective={"learnable_temperature": True})
    out = model(**batch())
    (out.image_embeds[:, 0].sum() + out.text_embeds[:, 0].sum() + out.temperature.sum()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_a_frozen_copy_of_the_aligner_serves_the_anchors() -> None:
    model = build(num_extra_blocks=1)
    twin = copy.deepcopy(model.aligner).eval().requires_grad_(False)
    scramble(model.aligner)
    out = model(**batch(), freeze_backbone=True, return_hidden=True)
    image, text = twin(out.hidden)
    assert not image.requires_grad
    fresh = build(num_extra_blocks=1)(**batch())
    assert torch.allclose(nn.functional.normalize(image, dim=-1), fresh.image_embeds, atol=1e-6)
    assert torch.allclose(nn.functional.normalize(text, dim=-1), fresh.text_embeds, atol=1e-6)
    assert not torch.allclose(out.image_embeds, fresh.image_embeds, atol=1e-3)
    assert model(**batch()).hidden is None


def test_one_side_alone() -> None:
    model = build().eval()
    inputs = batch()
    both = model(**inputs)
    images = model(pixel_values=inputs["pixel_values"])
    texts = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    assert torch.equal(images.image_embeds, both.image_embeds)
    assert images.text_embeds is None
    assert torch.equal(texts.text_embeds, both.text_embeds)
    assert texts.image_embeds is None
    unmasked = torch.full((1, 5), 7)
    assert torch.equal(
        model(input_ids=unmasked).text_embeds,
        model(input_ids=unmasked, attention_mask=torch.ones_like(unmasked)).text_embeds,
    )


@pytest.mark.parametrize("num_extra", [0, 2])
def test_padding_changes_nothing(num_extra: int) -> None:
    model = build(num_extra_blocks=num_extra).eval()
    scramble(model)
    inputs = batch()
    short = model(input_ids=inputs["input_ids"][3:, :2], attention_mask=inputs["attention_mask"][3:, :2])
    assert torch.allclose(short.text_embeds, model(**inputs).text_embeds[3:], atol=1e-5)


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    plain, saving = build(num_extra_blocks=1), build(num_extra_blocks=1)
    saving.activation_checkpointing_enable()
    calls = []
    for model in (plain, saving):
        model.train()
        block = model.aligner.vision.extra[0].qkv
        block.register_forward_hook(lambda *_: calls.append(1))
        out = model(**batch())
        (out.image_embeds[:, 0].sum() + out.text_embeds[:, 1].sum()).backward()
    assert len(calls) == 3  # once in the plain model, twice where the block is computed again
    for (name, one), two in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert torch.allclose(one.grad, two.grad, atol=1e-6), name


def test_attention_is_sdpa() -> None:
    model = build()
    configs = [m.config for m in model.modules() if hasattr(m, "config")]
    assert {c._attn_implementation for c in configs} == {"sdpa"}


def test_save_and_load(tmp_path: Path) -> None:
    model = build(num_extra_blocks=1, num_top_blocks=2, objective={"learnable_temperature": True}).eval()
    scramble(model)
    loaded, info = DualEncoder.from_pretrained(save(model, tmp_path / "m"), output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    state = loaded.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    one, two = model(**batch()), loaded.eval()(**batch())
    assert torch.equal(one.image_embeds, two.image_embeds)
    assert torch.equal(one.text_embeds, two.text_embeds)
    assert torch.equal(one.temperature, two.temperature)


def test_weight_decay_leaves_out_biases_norms_and_the_temperature() -> None:
    model = build(num_extra_blocks=1, objective={"learnable_temperature": True})
    decays = set(model.decay_parameter_names())
    names = {n for n, _ in model.named_parameters()}
    assert decays < names
    for name in names - decays:
        assert name.endswith("bias") or "norm" in name.lower() or "temperature" in name or "layers.1" in name, name
    assert not any(n.endswith("bias") or "norm" in n.lower() or "temperature" in n for n in decays)
    assert "aligner.vision.head.layers.1.weight" not in decays  # the head's norm
    assert "aligner.vision.head.layers.0.weight" in decays


def test_temperature() -> None:
    assert Temperature(0.07, learnable=False)().item() == pytest.approx(0.07)
    learned = Temperature(0.07, learnable=True)
    assert learned.log_ratio.shape == (1,)
    assert torch.allclose(learned(), torch.tensor([0.07]))
    learned().backward()
    assert learned.log_ratio.grad.item() == pytest.approx(0.07)  # d(τ₀ eˢ)/ds
    assert Temperature(0.07, learnable=True).bfloat16()().item() == pytest.approx(0.07, rel=1e-6)
    with torch.no_grad():
        learned.log_ratio.fill_(math.log(0.05 / 0.07))
    assert learned().item() == pytest.approx(0.05)


@pytest.mark.parametrize("learnable", [False, True])
def test_every_module_gives_tensors_or_containers(learnable: bool) -> None:
    """DeepSpeed's ZeRO 3 looks for tensors in whatever a module returns, and fails on a number."""
    model = build(num_extra_blocks=1, objective={"learnable_temperature": learnable})
    seen = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda module, args, out, name=name: seen.__setitem__(name, out))
    out = model(**batch(), return_hidden=True)
    assert {"", "aligner.temperature", "backbone", "aligner.vision.head"} <= seen.keys()
    wrong = {
        name: out for name, out in seen.items() if not isinstance(out, (torch.Tensor, tuple, list, dict, type(None)))
    }
    assert not wrong
    assert isinstance(out.temperature, torch.Tensor)
    assert out.temperature.requires_grad == learnable


def test_temperature_stops_at_its_least_value_and_can_come_back() -> None:
    learned = Temperature(0.07, learnable=True)
    with torch.no_grad():
        learned.log_ratio.fill_(-9.0)
    assert learned().item() == pytest.approx(MIN_TEMPERATURE)
    learned().backward()
    assert learned.log_ratio.grad.item() > 0


@pytest.mark.parametrize("norm", ["layernorm", "batchnorm", "none"])
def test_heads(norm: str) -> None:
    head = Head(8, 4, "mlp", 16, norm)
    kinds = [type(layer).__name__ for layer in head.layers]
    middle = {"layernorm": ["LayerNorm"], "batchnorm": ["BatchNorm"], "none": []}[norm]
    assert kinds == ["Linear", *middle, "ReLU", "Linear"]
    assert head(torch.randn(3, 8)).shape == (3, 4)
    linear = Head(8, 4, "linear", 16, norm)
    assert [tuple(p.shape) for p in linear.parameters()] == [(4, 8)]


@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_output_norms_have_no_parameters_and_say_what_they_do(kind: str) -> None:
    pooled = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)) + 5
    plain = Head(8, 4, kind, 16, "none")
    weights = plain.state_dict()
    layer, batchnorm = (Head(8, 4, kind, 16, "none", norm) for norm in ("layernorm", "batchnorm"))
    for head in (layer, batchnorm):
        head.load_state_dict(weights, strict=False)
        assert [tuple(p.shape) for p in head.parameters()] == [tuple(p.shape) for p in plain.parameters()]
    found = plain(pooled)
    centred = F.normalize(found - found.mean(1, keepdim=True), dim=1)
    assert torch.allclose(F.normalize(layer(pooled), dim=1), centred, atol=1e-4)
    whitened = (found - found.mean(0)) / (found.var(0, correction=0) + 1e-5).sqrt()
    assert torch.allclose(batchnorm(pooled), whitened, atol=1e-5)
    for _ in range(200):
        batchnorm(pooled)
    running = (found - found.mean(0)) / (found.var(0) + 1e-5).sqrt()
    assert torch.allclose(batchnorm.eval()(pooled), running, atol=1e-4)  # alone: eval does not look at the batch
    assert torch.allclose(batchnorm(pooled[:1]), running[:1], atol=1e-4)


def test_a_batchnorm_counts_in_float32_in_any_dtype() -> None:
    plain = BatchNorm(4)
    exact, low = nn.BatchNorm1d(4), BatchNorm(4).to(torch.bfloat16)
    room = make_room(copy.deepcopy(plain).to("meta"), torch.device("cpu"), torch.bfloat16)
    for module in (low, room):
        assert [p.dtype for p in module.parameters()] == [torch.bfloat16] * 2
        assert [b.dtype for b in module.buffers()] == [torch.float32, torch.float32, torch.int64]
    draws = torch.Generator().manual_seed(0)
    for _ in range(30):
        x = (20 + 0.1 * torch.randn(8, 4, generator=draws)).bfloat16()
        assert torch.equal(plain(x.float()), exact(x.float()))
        low(x)
    for module in (plain, low):
        assert all(torch.equal(a, b) for a, b in zip(module.buffers(), exact.buffers(), strict=True))


def test_batchnorms_over_ranks_keep_weights_and_statistics() -> None:
    model = build(head={"norm": "batchnorm", "output_norm": "batchnorm"})
    model(**batch())
    found = model.eval()(**batch()).image_embeds
    state = model.state_dict()
    synchronise_batchnorms(model)
    assert sum(isinstance(m, SyncBatchNorm) for m in model.modules()) == 4
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.allclose(model(**batch()).image_embeds, found, atol=1e-6)
    assert all(b.dtype != torch.bfloat16 for n, b in model.to(torch.bfloat16).named_buffers() if "running" in n)


@pytest.mark.parametrize("head", [{"norm": "batchnorm"}, {"norm": "none", "output_norm": "batchnorm"}])
def test_batchnorm_statistics_are_buffers_with_a_rule(head: dict[str, str]) -> None:
    model = build(head=head)
    buffers = {n: b for n, b in model.named_buffers() if n in model.state_dict()}
    floating = [n for n, b in buffers.items() if b.is_floating_point()]
    assert sorted(n.rsplit(".", 1)[1] for n in floating) == ["running_mean"] * 2 + ["running_var"] * 2
    assert sorted(n.rsplit(".", 1)[1] for n in buffers if n not in floating) == ["num_batches_tracked"] * 2
    assert build().state_dict().keys() == {n for n, _ in build().named_parameters()}


def test_pooling() -> None:
    states = torch.arange(12.0).view(2, 3, 2)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert torch.equal(pool(states, mask, "cls"), states[:, 0])
    assert torch.equal(pool(states, mask, "last"), torch.stack([states[0, 1], states[1, 2]]))
    assert torch.equal(pool(states, None, "last"), states[:, 2])
    assert torch.equal(pool(states, mask, "mean"), torch.stack([states[0, :2].mean(0), states[1].mean(0)]))
    assert torch.equal(pool(states, None, "mean"), states.mean(1))


def test_other_families_work_end_to_end() -> None:
    distil = {"model_type": "distilbert", "dim": 32, "n_layers": 3, "n_heads": 2, "hidden_dim": 64}
    clip = {"model_type": "clip_text_model", "eos_token_id": 2, "bos_token_id": 1, **BODY}
    pairs = [("dinov2", TEXT), ("siglip_vision_model", distil), ("clip_vision_model", clip)]
    for kind, text in pairs:
        vision = VISION | {"model_type": kind}
        if kind == "dinov2":
            del vision["intermediate_size"]  # it has mlp_ratio
        model = build(vision={"config": vision}, text={"config": text}, num_extra_blocks=1)
        out = model(**batch())
        assert out.image_embeds.shape == out.text_embeds.shape == (4, 16)
        (out.image_embeds[:, 0].sum() + out.text_embeds[:, 0].sum()).backward()
        unused = {n for n, p in model.named_parameters() if p.grad is None}
        assert unused <= {"backbone.vision.embeddings.mask_token"}, unused  # DINOv2's, for masked pre-training only


def _saved_and_gradients(checkpointing: bool) -> tuple[int, dict[str, torch.Tensor]]:
    """Bytes that a forward keeps for its backward, and the gradients."""
    model = build(objective={"learnable_temperature": True})
    scramble(model)
    if checkpointing:
        checkpoint_activations(model)
    kept: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(**batch(pairs=8))
        loss = (out.image_embeds * out.text_embeds).sum()
    loss.backward()
    return sum(kept.values()), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_activation_checkpointing_keeps_less_and_changes_nothing() -> None:
    plain, wanted = _saved_and_gradients(False)
    less, found = _saved_and_gradients(True)
    assert less < 0.5 * plain
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[name], wanted[name], atol=1e-7) for name in wanted)


def test_activation_checkpointing_is_refused_where_no_block_can(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    for module in model.modules():
        vars(module).pop("gradient_checkpointing", None)
    monkeypatch.delattr(GradientCheckpointingLayer, "gradient_checkpointing")
    with pytest.raises(ValueError, match=r"model.activation_checkpointing: .* set it to false"):
        checkpoint_activations(model)
