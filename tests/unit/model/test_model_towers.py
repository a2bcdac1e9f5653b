"""Cutting encoders: with the blocks put back or applied later, the output is the plain encoder's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from feddra_ds.model import encoders, towers

BODY = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
VISION = {**BODY, "image_size": 32, "patch_size": 8}
TEXT = {**BODY, "vocab_size": 60, "max_position_embeddings": 40}
DISTIL = {"dim": 32, "n_layers": 4, "n_heads": 2, "hidden_dim": 64, "vocab_size": 60, "max_position_embeddings": 40}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
MODERN = {**TEXT, **SPECIAL, "global_attn_every_n_layers": 2, "local_attention": 4}
CLIP_TEXT = {**TEXT, "bos_token_id": 1, "eos_token_id": 2}

FAMILIES = [
    ("vit", VISION, "cls"), ("deit", VISION, "cls"), ("dinov2", VISION, "cls"), ("clip_vision_model", VISION, "cls"),
    ("siglip_vision_model", VISION, "mean"), ("bert", TEXT, "cls"), ("roberta", TEXT, "cls"),
    ("electra", TEXT, "cls"), ("mpnet", TEXT, "cls"), ("distilbert", DISTIL, "cls"), ("modernbert", MODERN, "cls"),
    ("clip_text_model", CLIP_TEXT, "last"), ("siglip_text_model", CLIP_TEXT, "mean"), ("beit", VISION, "mean"),
    ("siglip2_vision_model", {**BODY, "patch_size": 8, "num_patches": 16}, "mean"),
    ("siglip2_text_model", CLIP_TEXT, "mean"),
]  # fmt: skip


def make(kind: str, values: dict) -> tuple[PreTrainedModel, str]:
    torch.manual_seed(0)
    encoder = encoders.new_encoder(AutoConfig.for_model(kind, **values), "key").eval()
    # Fresh norms are the identity, which would hide a norm that was left out.
    for module in encoder.modules():
        if "Norm" in type(module).__name__ and hasattr(module, "weight"):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return encoder, "vision" if "patch_size" in values else "text"


def test_every_tested_type_is_tested() -> None:
    assert {kind for kind, _, _ in FAMILIES} == towers.TESTED_TYPES


@pytest.mark.parametrize(("kind", "values", "pooling"), FAMILIES, ids=[f[0] for f in FAMILIES])
def test_cut_and_merged_equal_the_plain_encoder(kind: str, values: dict, pooling: str) -> None:
    encoder, side = make(kind, values)
    inputs = encoders.probe_inputs(encoder.config, side)
    mask = inputs.get("attention_mask")
    real = slice(None) if mask is None else mask.bool()  # padded positions are nobody's business
    plain = encoder(**inputs, return_dict=True)
    assert encoders.pooling_of(encoder, side) == pooling
    layout = towers.find_layout(encoder, "key")
    for num_top in (0, 1, 3):
        cut = copy.deepcopy(encoder)
        top = towers.split(cut, layout, num_top)
        names = {n for n, _ in cut.named_parameters()}
        assert not any(n.startswith(f"{layout.blocks}.{4 - num_top}") for n in names)
        assert len(names) < len(list(encoder.named_parameters())) or num_top == 0
        hidden = towers.run(cut, layout, mask, **inputs)
        states = towers.call_blocks(top.blocks, hidden.states, hidden.calls)
        normed = states if top.norm is None else top.norm(states)
        if kind == "clip_vision_model":  # its final norm acts on the pooled token alone
            assert torch.allclose(normed[:, 0], plain.pooler_output, atol=1e-6)
            normed = states
        if kind == "beit":  # and this one's on the mean of the patches
            assert top.norm is not None
            assert torch.allclose(top.norm(states[:, 1:].mean(1)), plain.pooler_output, atol=1e-6)
            normed = states
        assert torch.allclose(normed[real], plain.last_hidden_state[real], atol=1e-6)
        assert all(m.record is None for m in cut.modules() if isinstance(m, towers.Tap))
        merged = towers.merge(cut, layout, top)(**inputs, return_dict=True)
        assert torch.allclose(merged.last_hidden_state[real], plain.last_hidden_state[real], atol=1e-6)
        if layout.pooler:
            assert torch.allclose(merged.pooler_output, plain.pooler_output, atol=1e-6)


def test_gradient_reaches_the_backbone_and_its_position_bias() -> None:
    encoder, _ = make("mpnet", TEXT)  # its relative position bias is a parameter that the blocks are called with
    layout = towers.find_layout(encoder, "key")
    top = towers.split(encoder, layout, 1)
    inputs = encoders.probe_inputs(encoder.config, "text")
    hidden = towers.run(encoder, layout, inputs["attention_mask"], **inputs)
    states = towers.call_blocks(top.blocks, hidden.states.detach(), hidden.calls)
    states.sum().backward()
    bias = encoder.get_submodule("encoder.relative_attention_bias").weight
    assert bias.grad is not None
    assert bias.grad.abs().sum() > 0


def test_reading_order_of_an_unknown_type_is_looked_at() -> None:
    causal, _ = make("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 60, "n_positions": 40})
    causal.config.use_cache = False
    assert encoders.pooling_of(causal, "text") == "last"
    assert encoders.pooling_of(make("ernie", TEXT)[0], "text") == "cls"
    decoder, _ = make("bert", {**TEXT, "is_decoder": True})
    assert encoders.pooling_of(decoder, "text") == "last"


@pytest.mark.parametrize("num_top", [-1, 4, 7])
def test_too_many_top_blocks_are_refused_with_the_counts(num_top: int) -> None:
    encoder, _ = make("bert", TEXT)
    with pytest.raises(ValueError, match=rf"model.num_top_blocks: {num_top} top blocks .* with 4 blocks.* at most 3"):
        towers.split(encoder, towers.find_layout(encoder, "key"), num_top)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("albert", TEXT, "k: a albert encoder .* has no list of its 4 blocks"),
        (
            "efficientnet",
            {"image_size": 32, "hidden_dim": 64},
            "k: a efficientnet .* has no list of its .* keep it whole",
        ),
    ],
)
def test_encoders_that_cannot_be_cut_are_refused(kind: str, values: dict, message: str) -> None:
    encoder, _ = make(kind, values)
    with pytest.raises(ValueError, match=message):
        towers.find_layout(encoder, "k")


def test_shared_blocks_are_refused() -> None:
    encoder, _ = make("bert", TEXT)
    layers = encoder.get_submodule("encoder.layer")
    layers[1] = layers[0]  # type: ignore[operator,index]
    with pytest.raises(ValueError, match="no list of its 4 blocks"):
        towers.find_layout(encoder, "k")


def test_unknown_parts_after_the_blocks_are_refused() -> None:
    encoder, _ = make("bert", TEXT)
    encoder.mystery = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="unknown part 'mystery' after its blocks"):
        towers.find_layout(encoder, "k")
    del encoder.mystery
    encoder.second_pooler = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="two parts after its blocks that look like a pooler"):
        towers.find_layout(encoder, "k")


@pytest.mark.parametrize("kind", ["vit_mae", "deberta"])
def test_untested_types_are_checked_when_built(kind: str) -> None:
    encoder, side = make(kind, VISION if kind == "vit_mae" else TEXT)  # random masking; blocks that return tuples
    inputs = encoders.probe_inputs(encoder.config, side)
    with pytest.raises(ValueError, match=f"k: cutting a {kind} encoder changes what it computes"):
        towers.check_cut(encoder, towers.find_layout(encoder, "k"), 1, inputs, "k")


def test_check_draws_no_random_numbers_and_changes_nothing() -> None:
    encoder, side = make("data2vec-vision", VISION)
    encoder.train()
    before, state = copy.deepcopy(encoder.state_dict()), torch.get_rng_state()
    towers.check_cut(encoder, towers.find_layout(encoder, "k"), 1, encoders.probe_inputs(encoder.config, side), "k")
    assert torch.equal(torch.get_rng_state(), state)
    assert encoder.training
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())


def test_block_count_of_another_model_is_an_invariant() -> None:
    with pytest.raises(AssertionError, match="another number of top blocks"):
        towers.call_blocks([nn.Identity()], torch.zeros(1, 1, 1), [])
