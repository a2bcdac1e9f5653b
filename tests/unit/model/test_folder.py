"""Model folders: written whole, loaded without deepspeed, and in transformers' own form where that exists."""

from __future__ import annotations

import argparse
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_helpers import BODY, TEXT, VISION, batch, build, config, save, scramble, tokenizer
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, VisionTextDualEncoderModel

from feddra_ds.checkpoint.format import folder_of, partial_of, read_coordinator
from feddra_ds.checkpoint.write import commit
from feddra_ds.commands import export
from feddra_ds.common.files import sha256
from feddra_ds.config.load import from_dict
from feddra_ds.data.loading.batch import Batch
from feddra_ds.data.loading.images import evaluation_pixels
from feddra_ds.data.loading.tokens import load_tokenizer
from feddra_ds.model import lora, lora_options
from feddra_ds.model import to_transformers as to_transformers_module
from feddra_ds.model.dual_encoder import DualEncoder
from feddra_ds.model.folder import load_pretrained, save_model
from feddra_ds.model.processor import DualEncoderProcessor, build_processor, image_statistics
from feddra_ds.model.to_transformers import to_transformers

TEXTS = ["a b c d e f g h i j k l m n o p", "q r", "s"]


def images() -> list[Image.Image]:
    draw = np.random.default_rng(0)
    colour = [Image.fromarray(draw.integers(0, 256, (40 + n, 70, 3), dtype=np.uint8)) for n in range(2)]
    wide = Image.fromarray(draw.integers(0, 4096, (50, 50)).astype(np.uint16))
    return [colour[0], colour[1].convert("L"), wide]


def processor() -> DualEncoderProcessor:
    return build_processor(config(), tokenizer(), 32, 12)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[DualEncoder, Path]:
    head = {"norm": "batchnorm", "output_norm": "batchnorm"}
    model = build(num_extra_blocks=1, head=head, objective={"learnable_temperature": True})
    scramble(model)
    model(**batch())  # running statistics that matter
    model.eval()
    save_model(model.state_dict(), model.config, processor(), tmp_path / "run" / "model")
    return model, tmp_path / "run"


def embed(model: Any, proc: DualEncoderProcessor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        out = model(**proc(images=images(), text=TEXTS, return_tensors="pt", padding=True))
    return out.image_embeds, out.text_embeds


def test_saved_model_loads_with_the_same_outputs(saved: tuple[DualEncoder, Path]) -> None:
    model, run = saved
    for path in (run, run / "model", str(run)):
        loaded, proc = load_pretrained(path)
        assert not loaded.training
        for one, two in zip(embed(model, processor()), embed(loaded, proc), strict=True):
            assert torch.equal(one, two)
            assert torch.allclose(two.norm(dim=-1), torch.ones(3), atol=1e-6)
    assert {p.name for p in (run / "model").iterdir()} == {
        "config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert [p.name for p in run.iterdir()] == ["model"]
    assert isinstance(AutoModel.from_pretrained(run / "model"), DualEncoder)
    assert AutoTokenizer.from_pretrained(run / "model").model_max_length == 12


def test_large_models_are_sharded(saved: tuple[DualEncoder, Path], tmp_path: Path) -> None:
    model, _ = saved
    out = save_model(model.state_dict(), model.config, processor(), tmp_path / "sharded", max_shard_size=60_000)
    assert len(list(out.glob("model-*.safetensors"))) > 2
    loaded, proc = load_pretrained(out)
    assert torch.equal(embed(loaded, proc)[0], embed(model, processor())[0])


def test_an_export_is_replaced_whole_or_not_at_all(
    saved: tuple[DualEncoder, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, run = saved
    before = (run / "model" / "model.safetensors").read_bytes()
    changed = {n: t + 1 if t.is_floating_point() else t for n, t in model.state_dict().items()}

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(DualEncoderProcessor, "save_pretrained", fail)
        with pytest.raises(OSError, match="disk full"):
            save_model(changed, model.config, processor(), run / "model")
    assert (run / "model" / "model.safetensors").read_bytes() == before
    assert [p.name for p in run.iterdir()] == ["model"]
    save_model(changed, model.config, processor(), run / "model")
    assert (run / "model" / "model.safetensors").read_bytes() != before
    assert [p.name for p in run.iterdir()] == ["model"]


def test_weights_of_another_model_are_refused(saved: tuple[DualEncoder, Path], tmp_path: Path) -> None:
    model, _ = saved
    state = dict(model.state_dict())
    state["aligner.vision.head.layers.0.weight"] = torch.empty(0)
    state["surplus"] = torch.zeros(1)
    del state["backbone.text.embeddings.word_embeddings.weight"]
    with pytest.raises(
        ValueError, match=r"3 names differ, aligner.vision.head.*.weight \(is \(0,\), should be \(48, 32\)\)"
    ):
        save_model(state, model.config, processor(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_loaded_is_named(saved: tuple[DualEncoder, Path], tmp_path: Path) -> None:
    model, run = saved
    folder = run / "model"

    def refused(path: Path, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            load_pretrained(path)

    refused(tmp_path / "none", "does not exist; give a run directory")
    refused(tmp_path, "has no config.json; give a run directory")
    (tmp_path / "checkpoints").mkdir()
    refused(tmp_path, "has no model/ yet; `feddra-ds export")
    save_model(model.state_dict(), model.config, processor(), tmp_path / "many" / "model" / "north")
    refused(tmp_path / "many", "holds one model per client; give one of .*north")
    other = save(BertModel(BertConfig(**BODY, vocab_size=60)), tmp_path / "bert")
    refused(Path(other), "holds a bert model, not one exported by feddra-ds")
    tokens = folder / "tokenizer.json"
    kept = tokens.read_bytes()
    tokens.unlink()
    (folder / "tokenizer_config.json").rename(tmp_path / "moved")
    refused(folder, "model holds no processor")
    tokens.write_bytes(kept)
    (tmp_path / "moved").rename(folder / "tokenizer_config.json")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    refused(folder, "its weights cannot be loaded")
    partial = {n: t for n, t in model.state_dict().items() if "head" not in n}
    save_file({n: t.contiguous() for n, t in partial.items()}, weights, metadata={"format": "pt"})
    refused(folder, r"its weights lack \d+ parameters, aligner.text.head")


# ---- the processor
def test_pixels_equal_the_evaluation_transform() -> None:
    proc = build_processor(config(), tokenizer(), 32, 12)
    pixels = []
    for image in images():
        file = io.BytesIO()
        image.save(file, format="PNG")
        pixels.append(torch.from_numpy(evaluation_pixels(file.getvalue(), 32)))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (proc.image_mean, proc.image_std))
    empty = torch.zeros(3, 1, dtype=torch.long)
    expected = Batch(torch.stack(pixels), empty, empty, empty[:, 0], list("abc"), mean, std).pixel_values
    got = proc(images=images(), return_tensors="pt")["pixel_values"]
    assert got.dtype == torch.float32
    assert torch.allclose(got, expected, atol=1e-6)
    single = proc(images=images()[0], return_tensors="pt")["pixel_values"]
    assert torch.equal(single, got[:1])


def test_texts_are_cut_and_padded() -> None:
    proc = processor()
    batch = proc(text=TEXTS, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["input_ids"].shape == (3, 12)
    assert batch["attention_mask"].sum(1).tolist() == [12, 4, 3]
    assert proc(text="q r", return_tensors="pt")["input_ids"].shape == (1, 4)
    assert isinstance(proc(text=TEXTS, padding=False)["input_ids"], list)
    assert tokenizer().model_max_length > 12  # the caller's tokenizer is not changed
    with pytest.raises(ValueError, match="give images, text, or both"):
        proc()


def test_statistics_come_from_the_pretrained_vision_model(tmp_path: Path) -> None:
    folder = tmp_path / "vit"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "vit"}')
    assert image_statistics(str(folder), "k") == ((0.5,) * 3, (0.5,) * 3)
    values = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": values}))
    assert image_statistics(str(folder), "k") == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    (folder / "preprocessor_config.json").write_text(json.dumps(values | {"image_mean": [0.0, 0.0, 0.0]}))
    proc = build_processor(config(vision={"pretrained": str(folder)}), tokenizer(), 32, 12)
    assert (proc.image_mean, proc.image_std) == ((0.0, 0.0, 0.0), (0.4, 0.5, 0.6))
    given = build_processor(config(vision={"pretrained": str(folder)}), tokenizer(), 32, 12, image_std=(0.3, 0.2, 0.1))
    assert (given.image_mean, given.image_std) == ((0.0, 0.0, 0.0), (0.3, 0.2, 0.1))
    whole = build_processor(config(pretrained=str(folder)), tokenizer(), 32, 12)
    assert whole.image_mean == (0.0, 0.0, 0.0)
    (folder / "preprocessor_config.json").write_text(json.dumps(values | {"image_std": [0.5, 0.0, 0.5]}))
    with pytest.raises(ValueError, match=r"k: preprocessor_config.json of .*: image_mean and image_std must be three"):
        image_statistics(str(folder), "k")
    (folder / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"k: cannot read preprocessor_config.json"):
        image_statistics(str(folder), "k")
    with pytest.raises(ValueError, match=r"model.vision.pretrained: there is no folder /no/such"):
        build_processor(config(vision={"pretrained": "/no/such"}), tokenizer(), 32, 12)


# ---- transformers' own form
CLIP_TEXT = {"model_type": "clip_text_model", **BODY, "bos_token_id": 2, "eos_token_id": 3}


@pytest.mark.parametrize(
    ("vision", "text"),
    [("vit", TEXT), ("clip_vision_model", CLIP_TEXT), ("vit", TEXT | {"model_type": "roberta"})],
    ids=["vit-bert", "clip", "vit-roberta"],
)
@pytest.mark.parametrize("output_norm", ["none", "layernorm"])
def test_transformers_form_gives_the_same_embeddings(vision: str, text: dict, output_norm: str, tmp_path: Path) -> None:
    model = build(
        head={"kind": "linear", "output_norm": output_norm},
        num_top_blocks=2,
        objective={"temperature": 0.05},
        vision={"config": VISION | {"model_type": vision}},
        text={"config": text},
    ).eval()
    scramble(model)
    whole = to_transformers(model, processor())
    loaded = VisionTextDualEncoderModel.from_pretrained(save(whole, tmp_path / "whole")).eval()
    for one, two in zip(embed(model, processor()), embed(loaded, processor()), strict=True):
        assert torch.allclose(one, two, atol=1e-5)
    assert loaded.logit_scale.exp().item() == pytest.approx(20.0, rel=1e-5)
    back = build(pretrained=str(tmp_path / "whole")).eval()
    assert torch.allclose(embed(back, processor())[1], embed(model, processor())[1], atol=1e-5)


def test_transformers_form_of_a_batchnorm_at_the_output() -> None:
    model = build(head={"kind": "linear", "output_norm": "batchnorm"}, num_top_blocks=2)
    scramble(model)
    for _ in range(20):
        model(**batch())  # running statistics
    model.eval()
    whole = to_transformers(model, processor())
    for one, two in zip(embed(model, processor()), embed(whole, processor()), strict=True):
        assert torch.allclose(one, two, atol=1e-5)
        assert not torch.allclose(one.mean(0), torch.zeros(16), atol=0.05), "the bias matters"


DISTIL = {"model_type": "distilbert", "dim": 32, "n_layers": 3, "n_heads": 2, "hidden_dim": 64}
UNFIT = [
    ({}, "needs model.head.kind = linear"),
    ({"head": {"kind": "linear"}, "num_extra_blocks": 1}, "needs model.num_extra_blocks = 0"),
    (
        {"head": {"kind": "linear", "output_norm": "batchnorm"}, "embedding_dim": 32},
        "with a batchnorm at the output it needs model.embedding_dim below the vision encoder's width 32",
    ),
    (
        {
            "head": {"kind": "linear", "output_norm": "batchnorm"},
            "vision": {"config": VISION | {"model_type": "clip_vision_model"}},
        },
        "needs model.head.output_norm = none or layernorm",
    ),
    (
        {"head": {"kind": "linear"}, "text": {"config": DISTIL}},
        r"the text encoder \(distilbert, cls pooling\) has no pooled",
    ),
]


@pytest.mark.parametrize(
    ("values", "message"), UNFIT, ids=["mlp", "extra", "wide-batchnorm", "clip-batchnorm", "no-pooler"]
)
def test_what_transformers_cannot_hold_is_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"--format transformers: {message}"):
        to_transformers(build(**values), processor())


def test_a_difference_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(head={"kind": "linear"})
    scramble(model)
    monkeypatch.setattr(to_transformers_module, "_POOLER_SCALE", 3.0)  # tanh is not linear there
    with pytest.raises(ValueError, match=r"the image_embeds of a VisionTextDualEncoderModel would differ|text_embeds"):
        to_transformers(model, processor())


# ---- the command
def write_checkpoint(run: Path, model: DualEncoder, values: dict, number: int = 1, owner: str = "global") -> Path:
    """A checkpoint of one model in two shards that cut every parameter in the middle."""
    folder = folder_of(run, number)
    weights = partial_of(folder) / "weights" / owner
    weights.mkdir(parents=True)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    shapes = {name: tuple(p.shape) for name, p in trained.items()}
    for shard in (0, 1):
        tensors, starts = {}, {}
        for name, p in trained.items():
            flat = p.detach().reshape(-1)
            half = (flat.numel() + 1) // 2
            if shard == 0 or half < flat.numel():
                starts[name] = shard * half
                tensors[name] = (flat[half:] if shard else flat[:half]).clone()
        metadata = {"starts": json.dumps(starts), "shapes": json.dumps(shapes)}
        save_file(tensors, weights / f"shard-{shard:05d}-of-00002.safetensors", metadata=metadata)
    buffers = {n: b for n, b in model.named_buffers() if n in model.state_dict()}
    save_file(buffers, weights / "buffers.safetensors")
    root = partial_of(folder)
    files = {str(p.relative_to(root)): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in weights.iterdir()}
    commit(folder, json.dumps({"round": number, "config": values}), files, keep=0)
    return folder


def run_command(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    export.add_arguments(parser)
    return export.run(parser.parse_args([str(a) for a in arguments]))


@pytest.fixture
def run(tmp_path: Path) -> tuple[DualEncoder, Path]:
    """A run with two checkpoints and no model/; the model is that of the newer one."""
    tree = {"data": {"root": "x", "image_size": 32, "text_length": 12}, "model": config().model_dump(mode="json")}
    tree["model"]["head"]["kind"] = "linear"
    values = from_dict(tree).model_dump(mode="json")
    model = build(head={"kind": "linear"}, sizes={"vocab_size": len(load_tokenizer(None))}).eval()
    write_checkpoint(tmp_path / "run", model, values, 0)
    scramble(model)
    write_checkpoint(tmp_path / "run", model, values, 1)
    return model, tmp_path / "run"


def test_exporting_checkpoints(
    run: tuple[DualEncoder, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, folder = run
    assert run_command(folder, "--out", tmp_path / "newest") == 0
    assert "feddra_ds.load_pretrained" in capsys.readouterr().out
    loaded, proc = load_pretrained(tmp_path / "newest")
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in model.state_dict().items())
    for name in ("0", "round-000000", str(folder_of(folder, 0))):
        assert run_command(folder, "--out", tmp_path / "first", "--checkpoint", name) == 0
        first, _ = load_pretrained(tmp_path / "first")
        assert not torch.equal(first.aligner.vision.head.layers[0].weight, model.aligner.vision.head.layers[0].weight)
    assert run_command(folder, "--out", tmp_path / "hf", "--format", "transformers") == 0
    assert "VisionTextDualEncoderModel" in capsys.readouterr().out
    whole = VisionTextDualEncoderModel.from_pretrained(tmp_path / "hf").eval()
    assert torch.allclose(embed(whole, proc)[1], embed(model, proc)[1], atol=1e-5)
    save_model(loaded.state_dict(), loaded.config, proc, folder / "model")
    shutil.rmtree(folder / "checkpoints")  # model/ is enough
    assert run_command(folder, "--out", tmp_path / "again", "--max-shard-size", "50KB") == 0
    assert torch.equal(embed(load_pretrained(tmp_path / "again")[0], proc)[0], embed(model, proc)[0])


def test_exporting_an_adapted_run(run: tuple[DualEncoder, Path], tmp_path: Path) -> None:
    _, folder = run
    values = read_coordinator(folder_of(folder, 1))["config"]
    values["model"]["adapter"], values["run"]["seed"] = {"type": "lora", "r": 4, "aggregation": "freeze_a"}, 7
    model = build(7, head={"kind": "linear"}, sizes={"vocab_size": len(load_tokenizer(None))}).eval()
    lora.apply(model, lora_options.parse(values["model"]["adapter"]))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_B" in name:
            torch.nn.init.normal_(parameter)
    write_checkpoint(folder, model, values, 2)
    assert run_command(folder, "--out", tmp_path / "merged") == 0
    loaded, proc = load_pretrained(tmp_path / "merged")
    for one, two in zip(embed(loaded, proc), embed(model, proc), strict=True):
        assert torch.allclose(one, two, atol=1e-5)  # B is drawn with SD 1, which makes large weights to merge
    assert run_command(folder, "--out", tmp_path / "adapter", "--format", "adapter") == 0
    factors = load_file(tmp_path / "adapter" / "text" / "adapter_model.safetensors")
    name = "encoder.layer.0.attention.self.query.lora_B"
    wanted = model.backbone.text.state_dict()[f"{name}.default.weight"]
    assert torch.equal(factors[f"base_model.model.{name}.weight"], wanted)
    with pytest.raises(ValueError, match="has no adapters"):
        run_command(folder, "--out", tmp_path / "none", "--format", "adapter", "--checkpoint", "1")


def test_exporting_one_clients_model(run: tuple[DualEncoder, Path], tmp_path: Path) -> None:
    model, folder = run
    proc = build_processor(config(), load_tokenizer(None), 32, 12)
    save_model(model.state_dict(), model.config, proc, folder / "model" / "north")
    assert run_command(folder, "--out", tmp_path / "out", "--client", "north") == 0
    assert load_pretrained(tmp_path / "out")[0].config.head_kind == "linear"


def test_what_cannot_be_exported_is_named(run: tuple[DualEncoder, Path], tmp_path: Path) -> None:
    model, folder = run
    out = ("--out", tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"--checkpoint 7: no such checkpoint of .*; it has round-000000, round-000001"
    ):
        run_command(folder, *out, "--checkpoint", "7")
    with pytest.raises(ValueError, match="holds no model of south; it holds global: use --client"):
        run_command(folder, *out, "--client", "south")
    values = read_coordinator(folder_of(folder, 1))["config"]
    write_checkpoint(folder, build(num_extra_blocks=1), values, 2)
    with pytest.raises(ValueError, match=r"is of another model: aligner.* is on one side only"):
        run_command(folder, *out, "--checkpoint", "2")
    for number in (0, 1, 2):
        (folder_of(folder, number) / "coordinator.json").write_text("{}")
    with pytest.raises(ValueError, match=r"coordinator.json has 2 bytes"):
        run_command(folder, *out, "--checkpoint", "1")
    with pytest.raises(ValueError, match="has neither a model/ nor a whole checkpoint"):
        run_command(folder, *out)
    with pytest.raises(ValueError, match="does not exist"):
        run_command(tmp_path / "none", *out)
    assert not (tmp_path / "out").exists()
    assert model.config.head_kind == "linear"
