"""Every form of an export: its embeddings or states are the model's, and its card says what the run's files say."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from model_helpers import batch, build, config, scramble, tokenizer
from run_helpers import add_model, make_config, make_data, make_line, make_run
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, BertModel, ViTModel

from feddra_ds.cli import main
from feddra_ds.evaluation import finite
from feddra_ds.evaluation.export import export
from feddra_ds.model import to_onnx
from feddra_ds.model.dual_encoder import DualEncoder
from feddra_ds.model.folder import save_model
from feddra_ds.model.processor import build_processor


@pytest.fixture(scope="module")
def model() -> DualEncoder:
    model = build(num_extra_blocks=1).eval()
    scramble(model)
    return model


@pytest.fixture(scope="module")
def folder(model: DualEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    processor = build_processor(config(), tokenizer(), 32, 12)
    return save_model(model.state_dict(), model.config, processor, tmp_path_factory.mktemp("forms") / "model")


def front_matter(folder: Path) -> dict[str, Any]:
    text = (folder / "README.md").read_text()
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


def test_each_encoder_is_an_ordinary_folder(model: DualEncoder, folder: Path, tmp_path: Path) -> None:
    assert export(folder, tmp_path / "out", kind="encoders") == [tmp_path / "out"]
    inputs = batch()
    with torch.no_grad():
        hidden = model.encode(**inputs)
        vision = AutoModel.from_pretrained(tmp_path / "out" / "vision").eval()
        text = AutoModel.from_pretrained(tmp_path / "out" / "text").eval()
        states = {
            "vision": vision(inputs["pixel_values"]).last_hidden_state,
            "text": text(inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state,
        }
        for side in ("vision", "text"):
            aligner, told = getattr(model.aligner, side), getattr(hidden, side)
            x = told.states
            for block, call in zip(aligner.blocks, told.calls, strict=True):
                x = block(x, *call.args, **dict(call.kwargs))
            torch.testing.assert_close(states[side], aligner.norm(x), atol=1e-5, rtol=0)
    assert (type(vision), type(text)) == (ViTModel, BertModel)
    assert AutoImageProcessor.from_pretrained(tmp_path / "out" / "vision").size["height"] == 32
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "text").model_max_length == 12
    assert front_matter(tmp_path / "out")["library_name"] == "transformers"


@pytest.mark.slow
def test_onnx(model: DualEncoder, folder: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    assert main(["export", str(folder), "--out", str(tmp_path / "out"), "--format", "onnx"]) == 0
    inputs = {name: x.numpy() for name, x in batch(pairs=5).items()}
    with torch.no_grad():
        wanted = model(**batch(pairs=5))
    sessions = {
        side: onnxruntime.InferenceSession(tmp_path / "out" / f"{side}_model.onnx") for side in ("vision", "text")
    }
    pixels = {"pixel_values": inputs.pop("pixel_values")}
    np.testing.assert_allclose(sessions["vision"].run(None, pixels)[0], wanted.image_embeds.numpy(), atol=1e-4)
    np.testing.assert_allclose(sessions["text"].run(None, inputs)[0], wanted.text_embeds.numpy(), atol=1e-4)
    assert front_matter(tmp_path / "out")["library_name"] == "onnx"
    assert "T up to 12" in (tmp_path / "out" / "README.md").read_text()
    AutoTokenizer.from_pretrained(tmp_path / "out")
    other = to_onnx._Images(build(seed=1, num_extra_blocks=1).eval())
    images = {"pixel_values": batch(pairs=5)["pixel_values"]}
    with pytest.raises(
        ValueError, match=r"vision: onnxruntime's embeddings of 5 × 3 × 32 × 32 differ by .*, more than"
    ):
        to_onnx._check(other, images, "image_embeds", tmp_path / "out" / "vision_model.onnx", "vision", False)


def test_weights_of_onnx_files_are_looked_at(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    weight = onnx.numpy_helper.from_array(np.array([1.0, np.nan, np.inf], dtype=np.float32), "w")
    graph = onnx.helper.make_graph([], "g", [], [], initializer=[weight])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "m.onnx")
    assert finite.of_folders([tmp_path]) == {"w": 2}


def test_a_missing_package_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"--format onnx: onnxruntime is missing; pip install 'feddra-ds\[onnx\]'"):
        export(folder, tmp_path / "out", kind="onnx")


def test_what_is_no_export_is_not_replaced(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.png").touch()
    with pytest.raises(ValueError, match=r"--out: .*photos is there and is no exported model"):
        export(folder, tmp_path / "photos")
    assert (tmp_path / "photos" / "one.png").exists()


# ---- the card
@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("card")
    config = make_config(work / "run", make_data(work / "data"))
    make_run(work / "run", config, [make_line(r) for r in range(3)])
    add_model(work / "run" / "model", config)
    assert main(["evaluate", str(work / "run"), "--bootstrap", "20"]) == 0
    return work / "run"


@pytest.mark.slow
def test_the_card_says_what_the_run_says(run: Path, tmp_path: Path) -> None:
    assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert front_matter(tmp_path / "out")["pipeline_tag"] == "zero-shot-image-classification"
    assert "| south_and_the_islands | 12 | 0.300 | 2.000 |" in text, "training pairs, p and loss of the last round"
    assert "| rounds | 3, of 1 + 2 local steps |" in text
    found = json.loads((run / "evaluation.json").read_text())
    at = found["clients"]["north"]["intervals"]["recall@1"]
    assert f"| north | 8 | {100 * at['recall']:.0f} % (" in text
    assert "| beyond (not trained on) | 9 |" in text
    assert "| odd | " in text, "zero-shot"
    assert "not a medical\ndevice" in text
    _tables_are_whole(text)
    assert main(["export", str(tmp_path / "out"), "--out", str(tmp_path / "again"), "--format", "encoders"]) == 0
    again = (tmp_path / "again" / "README.md").read_text()
    assert again.partition("## Training")[2] == text.partition("## Training")[2], "an export's facts are carried on"
    assert "AutoModel.from_pretrained" in again


@pytest.mark.slow
def test_figures_of_another_model_are_not_on_the_card(run: Path, tmp_path: Path) -> None:
    result = json.loads((run / "evaluation.json").read_text())
    other = tmp_path / "run"
    other.mkdir()
    for name in ("config.yaml", "metrics.jsonl", "model"):
        (other / name).symlink_to(run / name)
    (other / "evaluation.json").write_text(json.dumps(result | {"round": 1}))
    export(other, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "Nothing is kept of this model" in text
    assert "| north | 12 |" in text


def _tables_are_whole(text: str) -> None:
    """Every table's rows have as many cells as its header, and follow it without a gap."""
    lines = text.splitlines()
    rules = [i for i, line in enumerate(lines) if line.startswith("|---")]
    assert len(rules) >= 4
    for i in rules:
        assert lines[i + 1].startswith("|"), lines[i - 1]
        for line in lines[i + 1 :]:
            if not line.startswith("|"):
                break
            assert line.count("|") == lines[i].count("|"), line
