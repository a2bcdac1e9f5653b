"""Nothing that came as a model, tokenizer, processor, adapter or checkpoint runs, and nothing is asked on the terminal."""

from __future__ import annotations

import builtins
import json
import os
import pickle
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from model_helpers import BODY, build, config, save, tokenizer
from safetensors.torch import load_file
from transformers import AutoConfig, BertConfig, BertModel, dynamic_module_utils

from feddra_ds.checkpoint.load import SavedModel
from feddra_ds.common.errors import CheckpointError
from feddra_ds.common.trust import commit_of
from feddra_ds.data.loading.tokens import load_tokenizer
from feddra_ds.model.folder import load_pretrained, save_model
from feddra_ds.model.processor import DualEncoderProcessor, build_processor, image_statistics
from feddra_ds.model.weights.deferred import defer

MARKER = "ran"  # a file in the current folder, which planted code writes
EVIL = f"open({MARKER!r}, 'w').close()\nclass Evil: pass\n"
HUB_ID = "somebody/model"


class Payload:
    """Pickled; whoever opens the pickle writes the marker."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (EVIL,)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model with its processor: whole; and text/, an encoder with its tokenizer."""
    root = tmp_path_factory.mktemp("good")
    model = build()
    save_model(model.state_dict(), model.config, build_processor(config(), tokenizer(), 32, 12), root / "whole")
    text = Path(save(BertModel(BertConfig(**BODY, vocab_size=60, max_position_embeddings=12)), root / "text"))
    tokenizer().save_pretrained(text)
    return root


@pytest.fixture
def guarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What was asked on the terminal; the hub is a folder here, and code that transformers would run goes to another."""
    asked: list[str] = []

    class Answers:
        def readline(self, *_: Any) -> str:
            asked.append("stdin")
            return "y\n"

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(builtins, "input", lambda prompt="": (asked.append(prompt), "y")[1])
    monkeypatch.setattr(sys, "stdin", Answers())
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    commit_of.cache_clear()
    yield asked
    commit_of.cache_clear()


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.is_file() else {}), **fields}))


def code(folder: Path) -> None:
    (folder / "evil.py").write_text(EVIL)
    kinds = dict.fromkeys(("AutoConfig", "AutoModel", "AutoImageProcessor", "AutoProcessor"), "evil.Evil")
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            edit(folder / name, auto_map={**kinds, "AutoTokenizer": ["evil.Evil", "evil.Evil"]})


def unknown(folder: Path) -> None:
    code(folder)
    edit(folder / "config.json", model_type="evil")
    edit(folder / "tokenizer_config.json", tokenizer_class="Evil")


def nested(folder: Path) -> None:
    code(folder)
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            edit(folder / name, auto_map=None, text_config={"auto_map": {"AutoConfig": "evil.Evil"}})


def kernel(folder: Path) -> None:
    edit(folder / "config.json", _attn_implementation="somebody/kernel:evil")


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))


def named_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Payload()))


def index_of_pickles(folder: Path) -> None:
    only_pickle(folder)
    edit(folder / "model.safetensors.index.json", metadata={}, weight_map={"a": "pytorch_model.bin"})


def index_to_payload(folder: Path) -> None:
    only_pickle(folder)
    (folder / "pytorch_model.bin").rename(folder / "pytorch_model-0.bin")
    edit(folder / "pytorch_model.bin.index.json", metadata={}, weight_map={"a": "pytorch_model-0.bin"})


def index_of_elsewhere(folder: Path) -> None:
    only_pickle(folder)
    edit(folder / "model.safetensors.index.json", metadata={}, weight_map={"a": "../other/model.safetensors"})


def adapter(folder: Path) -> None:
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Payload()))
    edit(folder / "adapter_config.json", peft_type="LORA", base_model_name_or_path=str(folder), r=1, auto_mapping={})


def named_pickle(folder: Path) -> None:
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Payload()))
    edit(folder / "config.json", transformers_weights="adapter_model.bin")


def only_adapter(folder: Path) -> None:
    adapter(folder)
    (folder / "config.json").unlink()


def as_text(folder: Path | str, pickled: bool = False) -> Any:
    return build(text={"pretrained": str(folder)}, pickled_weights=pickled)


LOADERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "export": ("whole", load_pretrained),
    "model.pretrained": ("whole", lambda folder: build(pretrained=str(folder))),
    "model.vision.pretrained": ("text", lambda folder: build(vision={"pretrained": str(folder)})),
    "model.text.pretrained": ("text", as_text),
    "deferred": ("text", lambda folder: defer(lambda: as_text(folder))),
    "tokenizer": ("text", lambda folder: load_tokenizer(str(folder))),
    "tokenizer of an export": ("whole", lambda folder: load_tokenizer(str(folder))),
    "processor": ("whole", DualEncoderProcessor.from_pretrained),
    "hub id": ("text", lambda folder: as_text(at_hub(folder))),
    "tokenizer at the hub": ("text", lambda folder: load_tokenizer(at_hub(folder))),
}
RUNS = "which is never run here; "
PICKLED = (
    r"are a pickle \(pytorch_model.bin\), not model.safetensors, .* set model.pickled_weights to true .* or convert it"
)
READS_CODE = list(LOADERS)
READS_WEIGHTS = ["export", "model.pretrained", "model.text.pretrained", "deferred", "hub id"]
ATTACKS: list[tuple[Callable[[Path], None], list[str], str]] = [
    (code, READS_CODE, f"auto_map in .*{RUNS}where transformers has the class itself, give a folder with a copy"),
    (unknown, READS_CODE, f"auto_map in .*{RUNS}"),
    (nested, READS_CODE, f"auto_map in .*{RUNS}"),
    (kernel, READS_WEIGHTS, f"attn_implementation 'somebody/kernel:evil' in config.json.*{RUNS}"),
    (only_pickle, READS_WEIGHTS, PICKLED),
    (named_safetensors, READS_WEIGHTS, "model|weights"),
    (index_of_pickles, READS_WEIGHTS, "index.json names 'pytorch_model.bin', which is no .safetensors file beside it"),
    (index_of_elsewhere, READS_WEIGHTS, "index.json names '../other/model.safetensors', which is no .safet"),
    (named_pickle, READS_WEIGHTS, "config.json names the weights 'adapter_model.bin'; call them model.safetensors"),
    (adapter, READS_WEIGHTS, "is an adapter .*merge it into its base model"),
    (only_adapter, ["export", "model.pretrained", "model.text.pretrained"], "has no config.json"),
]
CASES = [(attack, loader, message) for attack, loaders, message in ATTACKS for loader in loaders]


def at_hub(folder: Path) -> str:
    """The folder as a hub id of the cache; its id."""
    repo = Path(constants.HF_HUB_CACHE) / f"models--{HUB_ID.replace('/', '--')}"
    commit = "0" * 40
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / ".no_exist" / commit).mkdir(parents=True)
    for name in ("preprocessor_config.json", "processor_config.json"):  # what was asked for once is remembered
        (repo / ".no_exist" / commit / name).touch()
    shutil.copytree(folder, repo / "snapshots" / commit)
    return HUB_ID


@pytest.mark.parametrize(("attack", "loader", "message"), CASES, ids=[f"{a.__name__}-{lo}" for a, lo, _ in CASES])
def test_nothing_runs_that_came_as_a_model(
    attack: Callable[[Path], None], loader: str, message: str, good: Path, tmp_path: Path, guarded: list[str]
) -> None:
    kind, load = LOADERS[loader]
    folder = tmp_path / "given"
    shutil.copytree(good / kind, folder)
    attack(folder)
    with pytest.raises(ValueError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob(MARKER))
    assert not guarded


@pytest.mark.parametrize("loader", [name for name in LOADERS if name != "model.vision.pretrained"])
def test_safetensors_alone_load(loader: str, good: Path, tmp_path: Path, guarded: list[str]) -> None:
    kind, load = LOADERS[loader]
    folder = tmp_path / "given"
    shutil.copytree(good / kind, folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))  # beside safetensors: it is left alone
    load(folder)
    assert not list(tmp_path.rglob(MARKER))
    assert not guarded


def pickled(folder: Path, sharded: bool = False) -> None:
    """The weights as pickles of tensors alone."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if not sharded:
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    places = {name: f"pytorch_model-{number % 2}.bin" for number, name in enumerate(tensors)}
    for file in set(places.values()):
        torch.save({name: tensors[name] for name, place in places.items() if place == file}, folder / file)
    edit(folder / "pytorch_model.bin.index.json", metadata={}, weight_map=places)


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("at", [str, at_hub], ids=["folder", "hub"])
def test_pickles_of_tensors_are_read_where_they_are_permitted(
    at: Callable[[Path], str], sharded: bool, good: Path, tmp_path: Path, guarded: list[str]
) -> None:
    folder = tmp_path / "given"
    shutil.copytree(good / "text", folder)
    wanted = as_text(folder).state_dict()
    pickled(folder, sharded)
    name = at(folder)
    with pytest.raises(ValueError, match=r"set model\.pickled_weights to true"):
        as_text(name)
    got = as_text(name, pickled=True)
    assert all(torch.equal(wanted[key], tensor) for key, tensor in got.state_dict().items())
    built, _ = defer(lambda: as_text(name, pickled=True))  # which warns that every rank reads the whole of it
    assert all(torch.equal(wanted[key], tensor) for key, tensor in built.state_dict().items())


@pytest.mark.parametrize("attack", [only_pickle, index_to_payload], ids=lambda a: a.__name__)
def test_no_permitted_pickle_runs(
    attack: Callable[[Path], None], good: Path, tmp_path: Path, guarded: list[str]
) -> None:
    folder = tmp_path / "given"
    shutil.copytree(good / "text", folder)
    attack(folder)
    for name in (str(folder), at_hub(folder)):
        with pytest.raises(
            ValueError, match=r"pickled weights of .* hold more than tensors, so they are never read"
        ) as caught:
            as_text(name, pickled=True)
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob(MARKER))


def test_the_hub_is_asked_once_and_not_needed_for_what_is_cached(
    good: Path, tmp_path: Path, guarded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "given"
    shutil.copytree(good / "text", folder)
    name, asked = at_hub(folder), []

    def unreachable(address: tuple[str, int], *_: Any, **__: Any) -> Any:
        asked.append(address)
        raise ConnectionRefusedError("no network")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "create_connection", unreachable)
    defer(lambda: as_text(name))
    as_text(name)
    assert image_statistics(name, "key") == ((0.5,) * 3, (0.5,) * 3)
    assert len(asked) == 1


def test_statistics_of_images_are_numbers_alone(good: Path, tmp_path: Path, guarded: list[str]) -> None:
    folder = tmp_path / "given"
    shutil.copytree(good / "whole", folder)
    code(folder)
    assert image_statistics(str(folder), "key") == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert not list(tmp_path.rglob(MARKER))
    assert not guarded


def test_a_pickle_in_a_checkpoint_stays_shut(tmp_path: Path, guarded: list[str]) -> None:
    name = "weights/global/shard-00000-of-00001.safetensors"
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_bytes(pickle.dumps(Payload()))
    (tmp_path / "manifest.json").write_text(json.dumps({"files": {name: {"bytes": 0, "sha256": ""}}}))
    with pytest.raises(CheckpointError, match=r"shard-00000-of-00001\.safetensors is no safetensors file") as caught:
        SavedModel(tmp_path, "global")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob(MARKER))


def test_what_is_planted_would_run(good: Path, tmp_path: Path, guarded: list[str]) -> None:
    pickle.loads(pickle.dumps(Payload()))
    os.remove(MARKER)
    folder = tmp_path / "given"
    shutil.copytree(good / "text", folder)
    unknown(folder)
    with pytest.raises(Exception, match="Evil"):
        AutoConfig.from_pretrained(folder)
    assert guarded
    assert Path(MARKER).is_file()
