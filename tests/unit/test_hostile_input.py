"""Mutated files of every format that others may have written: each is read, or refused in one line; none gives a traceback.

A seeded slice in the fast tier; FEDDRA_FUZZ_CASES sets the number of cases (`make fuzz`: 2,000). A case that failed is
repeated by its format and its number, which the message names.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import random
import socket
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tokenizers
import torch
import yaml
from data_helpers import make_dataset
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

from feddra_ds import cli
from feddra_ds.checkpoint.format import check, described, files_of, read_coordinator
from feddra_ds.checkpoint.load import SavedFragments
from feddra_ds.commands._status_text import show
from feddra_ds.common.errors import ConfigError, DataError
from feddra_ds.common.parse import parse_json, parse_yaml
from feddra_ds.common.text import printable
from feddra_ds.common.trust import find_weights
from feddra_ds.config.deepspeed_file import read_deepspeed_file
from feddra_ds.config.load import load
from feddra_ds.config.schema import StreamingConfig
from feddra_ds.data.format.dataset import open_dataset
from feddra_ds.data.format.indexing import Indexer, info_of
from feddra_ds.data.format.remote import Store
from feddra_ds.data.format.samples import texts_of_json
from feddra_ds.data.loading.tokens import freeze, load_tokenizer
from feddra_ds.data.sources.base import Skip
from feddra_ds.data.sources.journal import Journal
from feddra_ds.evaluation.labels import find_tasks, read_prompts
from feddra_ds.experiments import spec
from feddra_ds.model.encoders import load_config
from feddra_ds.model.processor import image_statistics
from feddra_ds.model.weights.tensor_files import stored
from feddra_ds.report import tables
from feddra_ds.report.standing import standing
from feddra_ds.run.files import open_run

CASES = int(os.environ.get("FEDDRA_FUZZ_CASES", "180"))
LONGEST_S = 10.0  # of a case, in this process's time
VALUES: list[Any] = [
    None, True, -1, 0, 2**31, 2**63, 10**40, 1.5, float("nan"), float("inf"), "", "../x", "/etc/passwd", "\x1b[31m\x07", "[/red]",
    "\u202ereversed", "\ud800", "x" * 10_000, [], {}, [[]], {"": {}}, {"a": [None]}, [1, "2"], "12", "\n",
]  # fmt: skip
BYTES = [
    b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"[" * 100_000, b"{" * 2_000, b'"', b"\\ud800", b"&a [*a]", b"!!python/name:os.system",
    b"1e999999", b"\x1b]0;x\x07", b": ", b"\n", b"*", b"9" * 5000, b"\xff" * 12,
]  # fmt: skip


class Format(NamedTuple):
    """write(folder) makes good files and returns the one to mutate; read(it) is what must not fail."""

    write: Callable[[Path], Path]
    read: Callable[[Path], object]
    dump: Callable[[Any], str] | None = json.dumps  # None: of bytes alone
    parse: Callable[[bytes], Any] = json.loads


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a tree."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield tree, key
        yield from places(tree[key])


def mutated(good: bytes, draw: random.Random, form: Format) -> bytes:
    """One change of the bytes, or up to three of the tree that they are."""
    if form.dump is None or draw.random() < 0.4:
        at, length = draw.randrange(len(good)), draw.choice([0, 1, 8, len(good)])
        new = draw.choice([*BYTES, b"", bytes([draw.randrange(256)]), good])
        return good[:at] + new + good[at + length :]
    tree = copy.deepcopy(form.parse(good))
    for _ in range(draw.choice([1, 1, 3])):
        container, key = draw.choice(list(places(tree)) or [({}, "x")])
        kind = draw.random()
        if kind < 0.2:
            container.pop(key, None) if isinstance(container, dict) else container.pop(key)
        elif kind < 0.35 and isinstance(container, dict):
            container[draw.choice(["", "x", "\x1b", "__class__", "version", "auto_map", 7])] = draw.choice(VALUES)
        else:
            container[key] = draw.choice(VALUES)
    return form.dump(tree).encode("utf-8", "surrogatepass")


def with_header(good: bytes, draw: random.Random, form: Format) -> bytes:
    """A safetensors file whose header, or the length of it, is changed."""
    cut = 8 + int.from_bytes(good[:8], "little")
    head = mutated(good[8:cut], draw, form)
    return draw.choice([len(head)] * 4 + [2**63, 0]).to_bytes(8, "little") + head + good[cut:]


def text(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def write_data(root: Path, file: str) -> Path:
    make_dataset(root, {"north": {"train": 3, "val": 1}, "south": {"train": 2}})
    return root / file


def read_data(root: Path) -> None:
    dataset = open_dataset(root)
    for client in dataset.client_ids:
        for split in dataset.splits(client):
            samples = dataset.samples(client, split)
            for index in range(len(samples)):
                with contextlib.suppress(EOFError, ValueError):  # a bad pair, which the loader counts
                    samples.read_info(index)
                    samples.read_text(index)


def read_member(path: Path) -> None:
    data = path.read_bytes()
    "".join(texts_of_json(data, "caption")).encode()
    for task in find_tasks([info_of(data), {"labels": {"mass": "1"}}])[0]:
        task.prompts()


def write_tar(root: Path) -> Path:
    with tarfile.open(root / "train.tar", "w") as tar:
        for name, data in {"a.jpg": b"x", "a.json": b'{"patient": "p"}', "b.jpg": b"y" * 600, "b.txt": b"two"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return root / "train.tar"


def read_tar(path: Path) -> None:
    indexer = Indexer(with_owner=True)
    indexer.add(path.name, path)
    for note in indexer.notes:
        assert printable(note) == note


def write_checkpoint(root: Path, file: str) -> Path:
    about = {"round": 3, "config": {"data": {"root": "x"}}, "metrics": {"client_ids": ["a"]}, "next_client_weights": [1.0],
             "positions": {"a": {"epoch": 0}}}  # fmt: skip
    shard = root / "weights" / "global" / "shard-00000-of-00001.safetensors"
    shard.parent.mkdir(parents=True)
    told = {"shapes": json.dumps({"w": [2, 3], "b": [3]}), "starts": json.dumps({"w": 0, "b": 0})}
    save_file({"w": torch.zeros(6), "b": torch.zeros(3)}, shard, told)
    files = described(shard, root) | described(text(root / "coordinator.json", about), root)
    text(root / "manifest.json", {"format": 1, "files": files})
    return root / file


def read_checkpoint(path: Path) -> None:
    check(path.parent)
    files_of(path.parent)
    read_coordinator(path.parent)


def write_run(root: Path, file: str) -> Path:
    text(root / "config.yaml", yaml.safe_dump({"strategy": {"name": "feddra"}, "schedule": {"rounds": 2}}))
    record = {"round": 0, "client_ids": ["a", "b"], "client_weights": [0.5, 0.5], "next_client_weights": [0.6, 0.4],
              "client_losses": [1.0, None], "worst_loss": 1.0, "excluded_clients": [{"id": "b", "reason": "late"}],
              "val": {"all": {"i2t_recall@1": 0.5, "pairs": 4}}, "seconds": 2.0, "stage_seconds": {"stage1": 1.0}}  # fmt: skip
    text(root / "metrics.jsonl", record)
    text(root / "progress.json", {"round": 1, "rounds": 2, "time": 0.0, "state": "running"})
    text(root / "evaluation.json", EVALUATION)
    return root / file


def read_run(path: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        files = open_run(path.parent)
        show(files, standing(files))
    assert "\x1b" not in shown.getvalue()


def read_evaluation(path: Path) -> None:
    if tables.evaluation(open_run(path.parent)) is None:
        raise DataError("a run may lack it, so what is none is not there")


def write_journal(root: Path) -> Path:
    made = Journal(root / "shards", FACTS)
    read_journal(made.path, made)
    return made.path


FACTS = {"--text-column": "report", "rows of a.csv": 3}


def read_journal(path: Path, fills: Journal | None = None) -> None:
    shard = path.parent / "shards" / "north" / "train-000000.tar"
    shard.parent.mkdir(parents=True, exist_ok=True)
    shard.write_bytes(b"x" * 10)
    journal = fills or Journal(path.parent / "shards", FACTS)
    with contextlib.suppress(InterruptedError), journal:
        if fills:
            shard.parent.mkdir(parents=True, exist_ok=True)
            shard.write_bytes(b"x" * 10)
            fills.found(0, "digest")
            fills.found(1, Skip(2, "no image"))
            fills.take("north", "train", Skip(2, "no image"))
            fills.finish("north", "train", shard)
        journal.left([(0, "train"), (1, "train")], lambda row: "north")
        raise InterruptedError  # what is there stays


def write_tokenizer(root: Path, file: str) -> Path:
    pieces = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "no": 4, "##dule": 5}
    fast = tokenizers.Tokenizer(tokenizers.models.WordPiece(pieces, unk_token="[UNK]"))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(root)
    return root / file


def read_tokenizer(path: Path) -> None:
    frozen, _ = freeze(load_tokenizer(str(path.parent)), 8)
    tokenizers.Tokenizer.from_str(frozen).encode("no nodule")


def write_adapter(root: Path, file: str) -> Path:
    text(root / "config.json", MODEL)
    text(
        root / "adapter_config.json",
        {"peft_type": "LORA", "r": 4, "target_modules": ["query"], "base_model_name_or_path": "x"},
    )
    for name in ("adapter_model", "model"):
        save_file({"a": torch.zeros(2, 4)}, root / f"{name}.safetensors")
    return root / file


def refuse_adapter(path: Path) -> None:
    """It is no model, whatever it says; its weights are read as any file of tensors."""
    with pytest.raises(ValueError, match="is an adapter"):
        find_weights(path.parent, "key")
    load_config(str(path.parent), "key")


CONFIG = yaml.safe_dump({"data": {"root": "x", "image_size": 32}, "strategy": {"name": "fedavg"}, "schedule": {"rounds": 2},
                         "model": {"vision": {"config": {"hidden_size": 32}}}, "clients": {"ids": ["a", "b"]}})  # fmt: skip
SPEC = yaml.safe_dump({"name": "x", "base": "quickstart", "data": {"synth": {"num_pairs": 100}},
                       "arms": {"a": {"strategy.name": "fedavg"}}, "seeds": {"dev": [0], "test": [1]}})  # fmt: skip
MODEL = {
    "model_type": "bert", "hidden_size": 32, "num_attention_heads": 4, "id2label": {"0": "a"}, "vocab_size": 60,
}  # fmt: skip
STATISTICS = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "image_processor": {"size": {"height": 8}}}
DEEPSPEED = {"bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 2}}
PROMPTS = yaml.safe_dump({"edema": {"yes": ["edema", "an edema"], "no": "none"}})
YAML = (yaml.dump, yaml.safe_load)
LINES = (
    lambda tree: "".join(json.dumps(line) + "\n" for line in tree),
    lambda data: [json.loads(x) for x in data.splitlines()],
)
RECALL = {"k": 5, "recall": 0.5, "low": 0.25, "high": 0.75, "chance": 0.1, "verdict": "above chance"}
INTERVAL = {"value": 0.5, "low": 0.25, "high": 0.75}
MEASURED = {"n": 40.0, "positives": 20.0, "auroc": 0.75, "balanced_accuracy": 0.5}
GALLERY = {"pairs": 40, "intervals": {"recall@5": RECALL}}
EVALUATION = {
    "round": 0, "split": "val", "data": "data", "pooled": GALLERY,
    "clients": {"a": GALLERY | {"held_out": True, "split": "test"}},
    "without_split": ["b"], "non_finite": {"weights": {"w": 1}, "pairs": {"a": {"image": ["x"]}}},
    "worst_mixture": {"loss": 1.0, "recall@5": 0.5, "intervals": {"loss": {"low": 0.5, "high": 2.0}},
                      "weights_by_loss": {"a": 1.0}, "weights_by_recall": None, "mean": {"loss": INTERVAL},
                      "worst_client": {"loss": INTERVAL | {"id": "a"}},
                      "held_out": {"c": {"loss": INTERVAL}}, "loss_by_chance": 2.0,
                      "set": {"kind": "chi2", "radius": 1.0, "minimum": 0.0, "maximum": None}},
    "zero_shot": {"mass": {"classes": 2, "clients": {"a": MEASURED, "b": None}, "pooled": MEASURED | {
        "calibration": {"ece": 0.1, "bins": [{"low": 0.5, "high": 0.6, "n": 40, "confidence": 0.55, "accuracy": 0.5}]}}}},
    "subgroups": {"fields": {"sex": {"F": {"pairs": 20, "recall@5": RECALL}}}, "worst": RECALL | {"field": "sex", "value": "F"}},
}  # fmt: skip
FORMATS: dict[str, Format] = {
    "index": Format(lambda root: write_data(root, "north/index.json"), lambda path: read_data(path.parent.parent)),
    "dataset": Format(lambda root: write_data(root, "dataset.json"), lambda path: read_data(path.parent)),
    "member": Format(
        lambda root: text(root / "a.json", {"caption": ["one", "two"], "labels": {"mass": 1, "site": "a|b"}}),
        read_member,
    ),
    "tar": Format(write_tar, read_tar, None),
    "manifest": Format(lambda root: write_checkpoint(root, "manifest.json"), read_checkpoint),
    "coordinator": Format(lambda root: write_checkpoint(root, "coordinator.json"), read_checkpoint),
    "shard": Format(
        lambda root: write_checkpoint(root, "weights/global/shard-00000-of-00001.safetensors"),
        lambda path: SavedFragments(path.parents[2], "weights/global"),
    ),
    "tensors": Format(
        lambda root: (save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4)}, root / "x"), root / "x")[1], stored
    ),
    "model": Format(lambda root: text(root / "config.json", MODEL), lambda path: load_config(str(path.parent), "key")),
    "statistics": Format(
        lambda root: text(text(root / "config.json", MODEL).with_name("preprocessor_config.json"), STATISTICS),
        lambda path: image_statistics(str(path.parent), "key"),
    ),
    "config": Format(lambda root: text(root / "config.yaml", CONFIG), load, *YAML),
    "spec": Format(lambda root: text(root / "spec.yaml", SPEC), spec.load, *YAML),
    "prompts": Format(lambda root: text(root / "prompts.yaml", PROMPTS), read_prompts, *YAML),
    "deepspeed": Format(lambda root: text(root / "ds.json", DEEPSPEED), lambda path: read_deepspeed_file(str(path))),
    "metrics": Format(lambda root: write_run(root, "metrics.jsonl"), read_run),
    "progress": Format(lambda root: write_run(root, "progress.json"), read_run),
    "evaluation": Format(lambda root: write_run(root, "evaluation.json"), read_evaluation),
    "journal": Format(write_journal, read_journal, *LINES),
    "tokenizer": Format(lambda root: write_tokenizer(root, "tokenizer.json"), read_tokenizer),
    "tokenizer config": Format(lambda root: write_tokenizer(root, "tokenizer_config.json"), read_tokenizer),
    "adapter": Format(lambda root: write_adapter(root, "adapter_config.json"), refuse_adapter),
    "run config": Format(lambda root: write_run(root, "config.yaml"), read_run, *YAML),
}


def must_be_read_or_refused(read: Callable[[], object], case: str, given: bytes) -> bool:
    """Whether it was refused."""
    start = time.process_time()
    refused = False
    try:
        read()
    except Exception as error:
        refused = True
        problems = cli._problems(error)
        assert problems, f"{case}: {error!r} from {given[:300]!r}"
        for line in problems:
            assert "\n" not in line, f"{case}: {line!r}"
            assert len(line) < 2000, f"{case}: {line[:300]}"
    assert time.process_time() - start < LONGEST_S, f"{case}: {given[:300]!r}"
    return refused


@pytest.mark.parametrize("name", FORMATS)
def test_a_mutated_file_is_read_or_refused_in_a_line(name: str, tmp_path: Path) -> None:
    form = FORMATS[name]
    path = form.write(tmp_path)
    good, change = path.read_bytes(), with_header if name in ("tensors", "shard") else mutated
    assert not must_be_read_or_refused(lambda: form.read(path), f"{name}, as it was", good)
    refused = 0
    for case in range(CASES // (len(FORMATS) + 1)):
        bad = change(good, random.Random(f"{name} {case}"), form)
        path.write_bytes(bad)
        refused += must_be_read_or_refused(lambda: form.read(path), f"{name} {case}", bad)
        if name in ("coordinator", "shard") and bad != good:
            assert check(tmp_path), f"{name} {case}: a damaged checkpoint passes for a whole one"
    # whose pairs are counted as bad, which a run may lack, that is refused as it is, and from whose bad line on one begins anew
    assert refused or name in ("member", "progress", "adapter", "journal")


def test_a_server_may_answer_anything(tmp_path: Path) -> None:
    good = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
    answer = [good]
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client, _ = server.accept()
                    with client, contextlib.suppress(OSError):
                        client.recv(4096)
                        client.sendall(answer[0])

        threading.Thread(target=serve, daemon=True).start()
        options = StreamingConfig(retries=0, timeout_s=2.0, cache_dir=str(tmp_path))
        store = Store(f"http://127.0.0.1:{server.getsockname()[1]}", options)
        store.refresh("dataset.json")
        for case in range(CASES // (len(FORMATS) + 1)):
            answer[0] = mutated(good, random.Random(f"http {case}"), FORMATS["tar"])
            must_be_read_or_refused(lambda: store.refresh("dataset.json"), f"http {case}", answer[0])


def test_what_a_file_system_raises_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    class Refused(Exception):
        """As the clients of object stores have them, of no type that is known here."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise Refused("An error occurred\n\x1b[31m(403)")

    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "_open", refuse)
    store = Store("memory://bucket", StreamingConfig(retries=0, cache_dir=str(tmp_path)))
    with pytest.raises(DataError) as caught:
        store.refresh("dataset.json")
    assert str(caught.value).endswith("the last one said: Refused: An error occurred")


def test_a_damaged_header_does_not_end_a_shard_in_silence(tmp_path: Path) -> None:
    path = write_tar(tmp_path)
    with tarfile.open(path) as tar:
        third = tar.getmembers()[2].offset
    data = bytearray(path.read_bytes())
    data[third] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(DataError, match="the header after its member number 2 is damaged"):
        Indexer().add("train.tar", path)
    member = tarfile.TarInfo("c.jpg")
    member.size = -1
    path.write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(DataError, match="its member number 1 has a size below 0"):
        Indexer().add("train.tar", path)


def test_aliases_are_written_out_up_to_a_bound(tmp_path: Path) -> None:
    good = "base: &b {root: x}\ndata: {<<: *b, image_size: 32}\nclients: {ids: &i [a]}\nother: *i\n"
    assert parse_yaml(good) == {"base": {"root": "x"}, "data": {"root": "x", "image_size": 32}, "clients": {"ids": ["a"]},
                                "other": ["a"]}  # fmt: skip
    path = tmp_path / "config.yaml"
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))
    merges = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 30))
    for bad, why in ((bomb, "more than 100000 values"), (merges, "more than 100000 values|more than 32 levels"),
                     ("a: &a [*a]", "stands within what it names"), ("[" * 40 + "]" * 40, "deeper than 32"),
                     ("a: !!python/name:os.system x", "could not determine a constructor"), ("[1]: x", "unhashable|text"),
                     ("1.5: x", r"the key 1\.5 must be text"), ("x" * 600_000, "more than 524288")):  # fmt: skip
        path.write_text(bad)
        with pytest.raises(ConfigError, match=why) as caught:
            load(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("given", ["[" * 300, '"\\ud800"', b"\xff", '{"a": 1', ""])
def test_what_is_no_json_is_one_line(given: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"Invalid JSON|characters that are none") as caught:
        parse_json(given)
    assert "\n" not in str(caught.value)


def test_names_cannot_move_the_cursor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--config", str(tmp_path / "\x1b[31mred"), "--data.root", "x"]) == 2
    make_dataset(tmp_path, {"north": {"train": 3}})
    (tmp_path / "north").rename(tmp_path / "\x1b[31mnorth\n")
    assert cli.main(["data", "inspect", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "\\x1b[31mred" in told
    assert "client names with control characters: \\x1b[31mnorth\\n; rename their folders" in told
    assert "\x1b" not in told


def test_an_index_names_its_first_wrong_field(tmp_path: Path) -> None:
    path = write_data(tmp_path, "north/index.json")
    index = json.loads(path.read_text())
    rows = index["splits"]["train"]["samples"]
    for change, why in (
        ({"shard": 9}, "a sample is in shard 9 of 1"),
        ({"text_id": 9}, r"splits\.train\.samples\.0\.text_id: "),
        ({"jpg": [512, 10**12]}, "the image of sample .* lies outside its shard"),
        ({"txt": rows[1]["txt"]}, "two samples of train have the same text"),
    ):
        bad = copy.deepcopy(index)
        bad["splits"]["train"]["samples"][0] |= change
        path.write_text(json.dumps(bad))
        with pytest.raises(DataError, match=why) as caught:
            open_dataset(tmp_path).samples("north", "train")
        assert str(caught.value).endswith("; convert again")
