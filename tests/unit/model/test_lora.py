"""LoRA on the backbones: what trains, exactness of merging, the three averages and their errors."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from lora_reference import average, trained_names, update_error
from model_helpers import batch, build, scramble
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from feddra_ds.model import lora, lora_options
from feddra_ds.model.dual_encoder import DualEncoder
from feddra_ds.model.folder import load_pretrained
from feddra_ds.model.lora import Factors
from feddra_ds.model.lora_options import LoraOptions


def adapted(seed: int = 0, **options: object) -> DualEncoder:
    model = build(seed, num_extra_blocks=1)
    scramble(model)
    lora.apply(model, LoraOptions.model_validate(options))
    return model.eval()


def train(model: DualEncoder, steps: int = 3, freeze_backbone: bool = False, seed: int = 0) -> None:
    """A few SGD steps on what requires a gradient."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    target = torch.randn(4, 16, generator=torch.Generator().manual_seed(seed))
    for _ in range(steps):
        optimizer.zero_grad()
        out = model(**batch(), freeze_backbone=freeze_backbone)
        ((out.image_embeds - target) ** 2 + (out.text_embeds - target) ** 2).mean().backward()
        optimizer.step()


def close(one: DualEncoder, two: DualEncoder, atol: float = 1e-5) -> bool:
    with torch.no_grad():
        a, b = one.eval()(**batch()), two.eval()(**batch())
    return torch.allclose(a.image_embeds, b.image_embeds, atol=atol) and torch.allclose(
        a.text_embeds, b.text_embeds, atol=atol
    )


def test_options_are_validated() -> None:
    assert lora_options.parse(None) is None
    assert lora_options.parse({"type": "lora", "r": 4}) == LoraOptions(r=4)
    with pytest.raises(ValueError, match=r"model.adapter.r: ") as caught:
        lora_options.parse({"r": 0, "rank": 3, "aggregation": "mean"})
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "model.adapter.r",
        "model.adapter.aggregation",
        "model.adapter.rank",
    ]
    assert "unknown key; there are type, r, ranks, alpha" in lines[2]


def test_ranks_of_clients() -> None:
    options = lora_options.parse({"r": 4, "alpha": 8, "aggregation": "stack", "ranks": {"a": 2, "b": 6, "c": 6}})
    assert options is not None
    assert options.largest_rank == 6
    assert [options.lower_rank(client) for client in "abcd"] == [2, None, None, 4]
    model = adapted(**options.model_dump())
    assert set(lora.adapted(model).values()) == {2.0}, "alpha / r, whatever rank the engine has"
    assert all(p.shape[0] == 6 for n, p in model.named_parameters() if "lora_A" in n)
    with pytest.raises(ValueError, match=r"^model.adapter.ranks: aggregation=product averages .* use stack"):
        lora_options.parse({"aggregation": "product", "ranks": {"a": 2}})


def test_directions_that_are_zero_never_learn() -> None:
    """What unequal ranks rest upon: rows of A and columns of B that are both 0 have no gradient, so no optimizer moves them."""
    model = adapted(r=4)
    factors = {n: p for n, p in model.named_parameters() if "lora_A" in n}
    for a in factors.values():
        a.data[2:] = 0
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    for seed in range(3):
        optimizer.zero_grad()
        out = model(**batch())
        (out.image_embeds - out.text_embeds.roll(seed, 0)).square().sum().backward()
        optimizer.step()
    for name, p in model.named_parameters():
        if "lora_A" in name:
            assert not p[2:].any(), name
        if "lora_B" in name:
            assert p[:, :2].any(), name
            assert not p[:, 2:].any(), name


def test_a_new_adapter_changes_nothing_and_none_adds_nothing() -> None:
    plain = build(num_extra_blocks=1)
    scramble(plain)
    assert close(plain, adapted())
    before = [n for n, _ in plain.named_parameters()]
    lora.apply(plain, None)
    assert [n for n, _ in plain.named_parameters()] == before
    assert all(p.requires_grad for p in plain.parameters())


def test_what_trains() -> None:
    model = adapted(r=4)
    names = trained_names(model)
    assert {n for n in names if n.startswith("aligner.")} == {
        f"aligner.{n}" for n, _ in model.aligner.named_parameters()
    }
    backbone = [n for n in names if n.startswith("backbone.")]
    assert all("lora_" in n for n in backbone)
    # q, k, v, output and two of the MLP, on 2 blocks of each encoder (the third is the alignment module's)
    assert len(lora.pairs(backbone)) == len(backbone) // 2 == 2 * 2 * 6
    before = {n: p.clone() for n, p in model.named_parameters()}
    train(model, freeze_backbone=True)  # stage 1
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert all(n.startswith("aligner.") for n in moved)
    train(model)  # stage 2
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert {n for n in moved if n.startswith("backbone.")} == set(backbone)


def test_freeze_a_trains_b_alone() -> None:
    model = adapted(aggregation="freeze_a")
    names = [n for n in trained_names(model) if "lora" in n]
    assert names
    assert all("lora_B" in n for n in names)


def test_a_is_drawn_from_its_name() -> None:
    torch.manual_seed(123)
    one, two = adapted(0).state_dict(), adapted(5).state_dict()
    a = [n for n in one if "lora_A" in n]
    assert all(torch.equal(one[n], two[n]) for n in a)
    assert not torch.equal(one[a[0]], one[a[1]])
    assert one[a[0]].abs().max() <= 32**-0.5
    assert all(not tensor.any() for name, tensor in one.items() if "lora_B" in name)


def test_targets_by_their_last_parts() -> None:
    model = adapted(target_modules=["q_proj", "self.value"])
    layers = [n for n in trained_names(model) if "lora_A" in n]
    assert len(layers) == 4
    assert all(".q_proj." in n or ".self.value." in n for n in layers)
    with pytest.raises(
        ValueError, match=r"model.adapter.target_modules: \['nope'\] name no layer; there are \['dense', 'fc1'"
    ):
        adapted(target_modules=["nope"])


def test_one_encoder_alone_can_be_adapted() -> None:
    model = adapted(target_modules=["query"])
    assert {n.split(".")[1] for n in trained_names(model) if "lora" in n} == {"text"}
    assert not any(p.requires_grad for p in model.backbone.vision.parameters())


@pytest.mark.parametrize("rule", ["factors", "freeze_a"])
def test_merging_keeps_the_outputs(rule: str, tmp_path: Path) -> None:
    model = adapted(r=4, alpha=8.0, aggregation=rule)
    train(model)
    merged = lora.merge(copy.deepcopy(model))
    plain = build(num_extra_blocks=1)
    assert merged.state_dict().keys() == plain.state_dict().keys()
    assert close(model, merged, 1e-6)
    scramble(plain)
    assert not close(plain, merged, 1e-3)  # training did move it
    assert all(p.requires_grad for p in merged.parameters())
    plain.load_state_dict(merged.state_dict())
    assert close(plain, merged, 0.0)


def test_merged_export(tmp_path: Path) -> None:
    from test_folder import processor

    from feddra_ds.model.folder import save_model

    model = adapted()
    train(model)
    merged = lora.merge(copy.deepcopy(model))
    loaded, _ = load_pretrained(save_model(merged.state_dict(), merged.config, processor(), tmp_path / "out"))
    assert close(model, loaded, 1e-6)


def test_adapter_in_pefts_format(tmp_path: Path) -> None:
    model = adapted(r=4)
    train(model)
    plain = build(num_extra_blocks=1)
    scramble(plain)
    files = lora.save_adapter(model, tmp_path / "adapter", {"vision": "base/vit", "text": None})
    assert [str(f.relative_to(tmp_path / "adapter")) for f in files] == [
        "vision/adapter_model.safetensors", "vision/adapter_config.json",
        "text/adapter_model.safetensors", "text/adapter_config.json", "aligner.safetensors",
    ]  # fmt: skip
    size = sum(f.stat().st_size for f in files)
    trained = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    assert size <= 1.2 * trained
    assert all(t.numel() > 0 for f in files if f.suffix == ".safetensors" for t in load_file(f).values())
    assert json.loads(files[1].read_text())["base_model_name_or_path"] == "base/vit"
    for side in ("vision", "text"):
        encoder = PeftModel.from_pretrained(plain.whole_encoder(side), tmp_path / "adapter" / side)
        got, wanted = encoder.state_dict(), getattr(model.backbone, side).state_dict()
        factors = {n: t for n, t in wanted.items() if "lora" in n}
        assert factors
        assert all(torch.equal(got[f"base_model.model.{n}"], t) for n, t in factors.items())
    with pytest.raises(ValueError, match=r"has no adapters; set model.adapter"):
        lora.save_adapter(plain, tmp_path / "none", {})


def test_adapters_over_other_frozen_weights(tmp_path: Path) -> None:
    """Frozen weights that the server has moved are given to adapters of the rank that it takes, for the first encoder."""
    model, plain = adapted(r=2, alpha=6.0), build(num_extra_blocks=1)
    scramble(plain)
    train(model)
    generator, ranks = torch.Generator().manual_seed(1), {}
    weights = {n: p for n, p in model.named_parameters() if n.endswith(".base_layer.weight") and "lora" not in n}
    began = {n: p.detach().clone() for n, p in weights.items()}
    for index, (name, p) in enumerate(weights.items()):
        left, right = (torch.randn(n, index % 4, generator=generator) for n in p.shape)
        p.data += 0.1 * left @ right.T
        ranks[name.removesuffix(".base_layer.weight")] = index % 4 + 2
    moved = lora.merge(copy.deepcopy(model))
    assert not close(adapted(r=2, alpha=6.0), moved, 1e-3)
    lora.stand_on(model, began)
    found = {n.removesuffix(".lora_A.default.weight"): len(p) for n, p in model.named_parameters() if "lora_A" in n}
    assert found == ranks
    assert all(torch.equal(p, began[n]) for n, p in model.named_parameters() if n in began)
    assert close(model, moved, 1e-5)
    lora.save_adapter(model, tmp_path, {})
    for side in ("vision", "text"):
        encoder = PeftModel.from_pretrained(plain.whole_encoder(side), tmp_path / side).merge_and_unload()
        wanted = dict(getattr(moved.backbone, side).named_parameters())
        gaps = [float((p - wanted[n]).abs().max()) for n, p in encoder.named_parameters() if n in wanted]
        assert len(gaps) > 10
        assert max(gaps) <= 2e-6, side


def test_gradient_checkpointing_with_a_frozen_base() -> None:
    one, two = adapted(), adapted()
    two.activation_checkpointing_enable()
    for model in (one, two):
        model.train()
        train(model, steps=1)
    assert close(one, two, 1e-6)
    assert any(p.any() for n, p in two.named_parameters() if "lora_B" in n)


# ---- averaging
def random_factors(count: int, rank: int = 4, size: tuple[int, int] = (20, 12), common: float = 0.0) -> list[Factors]:
    generator = torch.Generator().manual_seed(count)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    a, b = draw(rank, size[1]), draw(size[0], rank)
    return [Factors(common * a + draw(rank, size[1]), common * b + draw(size[0], rank)) for _ in range(count)]


def mean_update(clients: list[Factors], weights: list[float]) -> Tensor:
    return sum((p * (f.b.double() @ f.a.double()) for p, f in zip(weights, clients, strict=True)), torch.zeros(()))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_product_is_the_best_rank_r_update(count: int) -> None:
    clients, weights = random_factors(count), [1 / count] * count
    exact = mean_update(clients, weights)
    got = lora.average_product(clients, weights)
    assert got.a.shape == (4, 12)
    assert got.b.shape == (20, 4)
    error = (got.b.double() @ got.a.double() - exact).norm() / exact.norm()
    tail = torch.linalg.svdvals(exact)[4:].norm() / exact.norm()  # Eckart-Young
    assert error == pytest.approx(float(tail), abs=1e-6)
    assert update_error(got, clients, weights) == pytest.approx(float(error), abs=1e-6)
    if count == 1:
        assert error < 1e-6


@pytest.mark.parametrize("size", [(20, 12), (12, 20), (6, 40), (40, 6)])
def test_a_product_of_a_rank_above_the_width(size: tuple[int, int]) -> None:
    clients = random_factors(3, rank=16, size=size)
    got, exact = lora.average_product(clients, [0.5, 0.3, 0.2]), mean_update(clients, [0.5, 0.3, 0.2])
    assert (got.a.shape, got.b.shape) == ((16, size[1]), (size[0], 16))
    assert torch.allclose(got.b.double() @ got.a.double(), exact, atol=1e-5)
    assert int(torch.linalg.matrix_rank(got.a)) == min(16, size[1]), "A keeps all the directions that it can have"


def test_rows_of_the_mean_update() -> None:
    clients, weights = random_factors(3), [0.5, 0.3, 0.2]
    exact = mean_update(clients, weights)
    assert torch.allclose(lora.rows_of_update(clients, weights, slice(3, 9)), exact[3:9], atol=1e-12)
    assert lora.rows_of_update(clients, weights, slice(20, 20)).shape == (0, 12)


def test_a_is_drawn_anew() -> None:
    first, second = lora.draw("x", (4, 9)), lora.draw("x", (4, 9), times=1)
    assert torch.equal(second, lora.draw("x", (4, 9), times=1))
    assert not torch.equal(first, second)
    assert max(first.abs().max(), second.abs().max()) <= 1 / 3


def test_errors_of_the_three_rules() -> None:
    clients, weights = random_factors(3, common=2.0), [0.5, 0.3, 0.2]
    states = [{"x.lora_A.default.weight": f.a, "x.lora_B.default.weight": f.b, "head": f.a} for f in clients]
    errors = {}
    for rule in ("factors", "product"):
        mean = average(states, weights, rule)
        assert torch.allclose(mean["head"], sum(p * f.a for p, f in zip(weights, clients, strict=True)), atol=1e-6)
        factors = Factors(mean["x.lora_A.default.weight"], mean["x.lora_B.default.weight"])
        errors[rule] = update_error(factors, clients, weights)
        expected = (factors.b.double() @ factors.a.double() - mean_update(clients, weights)).norm()
        assert errors[rule] == pytest.approx(float(expected / mean_update(clients, weights).norm()), abs=1e-6)
    assert 0 < errors["product"] < errors["factors"]
    shared = [Factors(clients[0].a, f.b) for f in clients]  # freeze_a: one A for all
    mean_b = sum((p * f.b for p, f in zip(weights, shared, strict=True)), torch.zeros(()))
    assert update_error(Factors(clients[0].a, mean_b), shared, weights) < 1e-6


def test_untrained_adapters_stay_able_to_learn() -> None:
    clients = [Factors(f.a, torch.zeros_like(f.b)) for f in random_factors(3)]
    got = lora.average_product(clients, [0.2, 0.3, 0.5])
    assert not got.b.any()
    assert torch.linalg.svdvals(got.a).min() > 0.1
    assert update_error(got, clients, [0.2, 0.3, 0.5]) == 0.0
    part = [Factors(f.a, f.b * torch.tensor([1.0, 0, 0, 0])) for f in clients[:1]]
    assert torch.linalg.svdvals(lora.average_product(part, [1.0]).a).min() > 0.1


def test_averaging_one_model_changes_no_output() -> None:
    model = adapted(r=4)
    train(model)
    state = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    for rule in ("factors", "product"):
        other = adapted(r=4)
        other.load_state_dict(average([state, state], [0.25, 0.75], rule), strict=False)
        assert close(model, other, 1e-5), rule


@pytest.mark.parametrize("weights", [[0.5], [0.5, 0.4], []])
def test_weights_must_fit(weights: list[float]) -> None:
    states: list[dict[str, Tensor]] = [{}, {}] if weights else []
    with pytest.raises(ValueError, match="need as many weights that sum to 1"):
        average(states, weights, "factors")


def test_adapters_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = build()
        lora.apply(model, LoraOptions())
    assert all(p.is_meta for p in model.parameters())
