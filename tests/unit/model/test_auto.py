"""What transformers' own classes make of an exported folder once feddra_ds is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from model_helpers import build, config, scramble, tokenizer
from PIL import Image
from transformers import AutoModel, AutoProcessor, ProcessorMixin, pipeline

from feddra_ds.common.after_import import after_import
from feddra_ds.model.dual_encoder import DualEncoder
from feddra_ds.model.folder import load_pretrained, save_model
from feddra_ds.model.processor import DualEncoderProcessor, build_processor

TEXTS = ["a b", "c d e"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    model = build(objective={"temperature": 0.5}).eval()
    scramble(model)
    processor = build_processor(config(), tokenizer(), 32, 12)
    return str(save_model(model.state_dict(), model.config, processor, tmp_path_factory.mktemp("auto") / "model"))


def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))


def test_auto_classes_give_what_load_pretrained_gives(folder: str, tmp_path: Path) -> None:
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert type(model) is DualEncoder
    assert type(processor) is DualEncoderProcessor
    assert isinstance(processor, ProcessorMixin)
    assert processor.text_length == 12
    batch = processor(images=[image()], text=TEXTS, return_tensors="pt")
    ours, _ = load_pretrained(folder)
    with torch.no_grad():
        out, wanted = model(**batch), ours(**batch)
        image_features = model.get_image_features(batch["pixel_values"]).pooler_output
        text_features = model.get_text_features(batch["input_ids"], batch["attention_mask"]).pooler_output
    assert torch.equal(out.image_embeds, wanted.image_embeds)
    torch.testing.assert_close(torch.nn.functional.normalize(image_features), out.image_embeds)
    torch.testing.assert_close(torch.nn.functional.normalize(text_features), out.text_embeds)
    assert not torch.allclose(image_features.norm(dim=-1), torch.ones(1)), "features come as they leave the head"
    torch.testing.assert_close(out.logits_per_image, out.image_embeds @ out.text_embeds.T / 0.5)
    assert torch.equal(out.logits_per_text, out.logits_per_image.T)
    assert ours(pixel_values=batch["pixel_values"]).logits_per_image is None
    processor.save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    assert AutoProcessor.from_pretrained(tmp_path).tokenizer.model_input_names == ["input_ids", "attention_mask"]


def test_pipelines(folder: str, caplog: pytest.LogCaptureFixture) -> None:
    model, processor = load_pretrained(folder)
    with torch.no_grad():
        out = model(**processor(images=[image()], text=TEXTS, return_tensors="pt"))
    said = pipeline("zero-shot-image-classification", model=folder)(
        image(), candidate_labels=TEXTS, hypothesis_template="{}"
    )
    scores = {row["label"]: row["score"] for row in said}
    assert list(scores[text] for text in TEXTS) == pytest.approx(out.logits_per_image[0].softmax(-1).tolist(), abs=1e-6)
    assert "is not supported" not in caplog.text
    features = pipeline("feature-extraction", model=folder)(TEXTS[1])
    np.testing.assert_allclose(features, out.text_embeds[1:].numpy(), atol=1e-6)


def test_something_is_done_after_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "imported_late.py").write_text("VALUE = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    finders, seen = list(sys.meta_path), []
    after_import("imported_late", lambda: seen.append(sys.modules["imported_late"].VALUE))
    assert seen == []
    import imported_late  # type: ignore[import-not-found]

    assert seen == [imported_late.VALUE] == [1]
    after_import("imported_late", lambda: seen.append(2))
    assert seen == [1, 2], "it is there already"
    assert sys.meta_path == finders
    del sys.modules["imported_late"]


@pytest.mark.slow
def test_importing_feddra_ds_is_enough(folder: str) -> None:
    code = (
        "import sys, feddra_ds\n"
        "assert 'transformers' not in sys.modules\n"
        "from transformers import AutoConfig, AutoProcessor\n"
        "print(type(AutoProcessor.from_pretrained(sys.argv[1])).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["DualEncoderProcessor"], done.stderr
