"""A folder that brings code of its own: it is refused, and nobody is asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from feddra_ds.data.loading.tokens import load_tokenizer
from feddra_ds.model.encoders import load_config
from feddra_ds.model.folder import load_pretrained


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model's folder whose json names classes in a file beside it, which leaves a mark when it is imported."""
    mark, folder = tmp_path / "mark", tmp_path / "planted"
    folder.mkdir()
    (folder / "theirs.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    names = {"AutoConfig": "theirs.Config", "AutoModel": "theirs.Model", "AutoTokenizer": ["theirs.T", "theirs.T"]}
    (folder / "config.json").write_text(json.dumps({"model_type": "theirs", "auto_map": names}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T", "auto_map": names}))

    def asked(*_: object) -> str:
        raise AssertionError("somebody at the terminal was asked")

    monkeypatch.setattr("builtins.input", asked)
    yield folder
    assert not mark.exists()


@pytest.mark.parametrize(
    "load",
    [lambda f: load_config(str(f), "model.vision.pretrained"), lambda f: load_tokenizer(str(f)), load_pretrained],
    ids=["encoder", "tokenizer", "exported model"],
)
def test_code_in_a_folder_is_refused(planted: Path, load: Callable[[Path], object]) -> None:
    with pytest.raises(ValueError, match="planted") as error:
        load(planted)
    assert "\n" not in str(error.value)
