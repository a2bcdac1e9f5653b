"""Mutated files of every format that others may have written: each is read, or refused in lines; none gives a traceback.

A seeded slice in the fast tier; FEDDRA_FUZZ_CASES sets the number of cases (`make fuzz`: 2,000).
"""

from __future__ import annotations

import copy
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from data_helpers import make_dataset
from safetensors.torch import save_file

from feddra_ds import cli
from feddra_ds.checkpoint.format import check, described, files_of, read_coordinator
from feddra_ds.common.errors import ConfigError, DataError
from feddra_ds.common.parse import parse_json, parse_yaml, printable
from feddra_ds.config.load import load
from feddra_ds.data.format.dataset import open_dataset
from feddra_ds.data.format.indexing import info_of
from feddra_ds.data.format.samples import texts_of_json
from feddra_ds.evaluation.labels import find_tasks
from feddra_ds.model.encoders import load_config
from feddra_ds.model.weights.tensor_files import stored

CASES = int(os.environ.get("FEDDRA_FUZZ_CASES", "400"))
VALUES: list[Any] = [
    None, True, -1, 0, 2**31, 2**63, 10**40, 1.5, float("nan"), float("inf"), "", "../x", "/etc/passwd", "\x1b[31m\x07", "[/red]",
    "\u202ereversed", "\ud800", "x" * 10_000, [], {}, [[]], {"": {}}, {"a": [None]}, [1, "2"], "12", "\n",
]  # fmt: skip
BYTES = [b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"[" * 100_000, b"{" * 2_000, b'"', b"\\ud800", b"&a [*a]", b"!!python/name:os.system",
         b"1e999999", b"\x1b]0;x\x07", b": ", b"\n", b"*", b"9" * 5000]  # fmt: skip


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a tree."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield tree, key
        yield from places(tree[key])


def mutated(good: bytes, draw: random.Random, dump: Callable[[Any], str], parse: Callable[[bytes], Any]) -> bytes:
    """One change of the text, or of the tree that it is."""
    if draw.random() < 0.4:
        at, length = draw.randrange(len(good)), draw.choice([0, 1, 8, len(good)])
        new = draw.choice([*BYTES, b"", bytes([draw.randrange(256)]), good])
        return good[:at] + new + good[at + length :]
    tree = copy.deepcopy(parse(good))
    for _ in range(draw.choice([1, 1, 3])):
        container, key = draw.choice(list(places(tree)) or [({}, "x")])
        kind = draw.random()
        if kind < 0.2:
            del container[key]
        elif kind < 0.35 and isinstance(container, dict):
            container[draw.choice(["", "x", "\x1b", "__class__", "version", "auto_map", 7])] = draw.choice(VALUES)
        else:
            container[key] = draw.choice(VALUES)
    return dump(tree).encode("utf-8", "surrogatepass")


def write_data(root: Path) -> None:
    make_dataset(root, {"north": {"train": 3, "val": 1}, "south": {"train": 2}})


def read_data(root: Path) -> None:
    dataset = open_dataset(root)
    for client in dataset.client_ids:
        for split in dataset.splits(client):
            samples = dataset.samples(client, split)
            for index in range(len(samples)):
                try:
                    samples.read_info(index)
                    samples.read_text(index)
                except (EOFError, ValueError):
                    pass  # a bad pair, which the loader counts


def read_member(path: Path) -> None:
    data = path.read_bytes()
    texts = texts_of_json(data, "caption")
    "".join(texts).encode()
    info = info_of(data)
    for task in find_tasks([info, {"labels": {"mass": "1"}}])[0]:
        task.prompts()


def write_checkpoint(root: Path) -> None:
    about = {"round": 3, "config": {"data": {"root": "x"}}, "metrics": {"client_ids": ["a"]}, "next_client_weights": [1.0],
             "positions": {"a": {"epoch": 0}}}  # fmt: skip
    (root / "coordinator.json").write_text(json.dumps(about))
    files = described(root / "coordinator.json", root)
    (root / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))


def read_checkpoint(path: Path) -> None:
    check(path.parent)
    files_of(path.parent)
    read_coordinator(path.parent)


def write_model(root: Path) -> None:
    config = {
        "model_type": "bert",
        "hidden_size": 32,
        "num_attention_heads": 4,
        "id2label": {"0": "a"},
        "vocab_size": 60,
    }
    (root / "config.json").write_text(json.dumps(config))


def write_config(root: Path) -> None:
    tree = {"data": {"root": "x", "image_size": 32}, "strategy": {"name": "fedavg"}, "schedule": {"rounds": 2},
            "model": {"vision": {"config": {"hidden_size": 32}}}, "clients": {"ids": ["a", "b"]}}  # fmt: skip
    (root / "config.yaml").write_text(yaml.safe_dump(tree))


def write_tensors(root: Path) -> None:
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4)}, root / "model.safetensors")


def write_member(root: Path) -> None:
    (root / "member.json").write_text(json.dumps({"caption": ["one", "two"], "labels": {"mass": 1, "site": "a|b"}}))


FORMATS: dict[str, tuple[Callable[[Path], None], str, Callable[[Path], object]]] = {
    "index": (write_data, "north/index.json", lambda path: read_data(path.parent.parent)),
    "dataset": (write_data, "dataset.json", lambda path: read_data(path.parent)),
    "member": (write_member, "member.json", read_member),
    "manifest": (write_checkpoint, "manifest.json", read_checkpoint),
    "coordinator": (write_checkpoint, "coordinator.json", read_checkpoint),
    "model": (write_model, "config.json", lambda path: load_config(str(path.parent), "model.pretrained")),
    "tensors": (write_tensors, "model.safetensors", stored),
    "config": (write_config, "config.yaml", load),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_mutated_file_is_read_or_refused_in_lines(name: str, tmp_path: Path) -> None:
    write, file, read = FORMATS[name]
    write(tmp_path)
    path = tmp_path / file
    good = path.read_bytes()
    dump, parse = (yaml.dump, yaml.safe_load) if name == "config" else (json.dumps, json.loads)
    refused = 0
    for seed in range(CASES // len(FORMATS)):
        draw = random.Random(f"{name} {seed}")
        if name == "tensors":
            cut = 8 + int.from_bytes(good[:8], "little")
            head = mutated(good[8:cut], draw, dump, parse)
            bad = (draw.choice([len(head), len(head), 2**63, 0]).to_bytes(8, "little")) + head + good[cut:]
        else:
            bad = mutated(good, draw, dump, parse)
        path.write_bytes(bad)
        start = time.process_time()
        try:
            read(path)
        except Exception as error:
            refused += 1
            problems = cli._problems(error)
            assert problems, f"{name} {seed}: {error!r} from {bad[:300]!r}"
            for line in problems:
                assert printable(line) == line, f"{name} {seed}: {line!r}"
                assert len(line) < 2000, f"{name} {seed}: {line[:300]}"
        assert time.process_time() - start < 10, f"{name} {seed}: {bad[:300]!r}"
    assert refused or name == "member"  # whose pairs are counted as bad where they are read


def test_aliases_are_written_out_up_to_a_bound(tmp_path: Path) -> None:
    text = "base: &b {root: x}\ndata: {<<: *b, image_size: 32}\nclients: {ids: &i [a]}\nother: *i\n"
    assert parse_yaml(text) == {"base": {"root": "x"}, "data": {"root": "x", "image_size": 32}, "clients": {"ids": ["a"]},
                                "other": ["a"]}  # fmt: skip
    path = tmp_path / "config.yaml"
    path.write_text("data: &d {root: x}\nclients: {ids: [&n north, *n]}\n")
    with pytest.raises(ConfigError, match="north"):
        load(path)
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))
    merges = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 30))
    for text, why in ((bomb, "more than 100000 values"), (merges, "more than 100000 values|more than 32 levels"),
                      ("a: &a [*a]", "stands within what it names"), ("[" * 40 + "]" * 40, "deeper than 32"),
                      ("a: !!python/name:os.system x", "could not determine a constructor"), ("[1]: x", "unhashable|text"),
                      ("1.5: x", "the key 1.5 must be text"), ("x" * 600_000, "more than 524288")):  # fmt: skip
        path.write_text(text)
        with pytest.raises(ConfigError, match=why) as caught:
            load(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[" * 300, '"\\ud800"', b"\xff", '{"a": 1', ""])
def test_what_is_no_json_is_one_line(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"Invalid JSON|characters that are none") as caught:
        parse_json(text)
    assert "\n" not in str(caught.value)


def test_names_are_shown_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("- x\n")
    assert cli.main(["train", "--config", str(tmp_path / "\x1b[31mred"), "--data.root", "x"]) == 2
    told = capsys.readouterr().err
    assert "\\x1b[31mred" in told
    assert "\x1b" not in told


def test_an_index_names_its_first_wrong_field(tmp_path: Path) -> None:
    write_data(tmp_path)
    path = tmp_path / "north" / "index.json"
    index = json.loads(path.read_text())
    for change, why in (("shard", "sample is in shard 9 of 1"), ("text_id", "splits.train.samples.0.text_id: ")):
        bad = copy.deepcopy(index)
        bad["splits"]["train"]["samples"][0][change] = 9
        path.write_text(json.dumps(bad))
        with pytest.raises(DataError, match=why) as caught:
            open_dataset(tmp_path).samples("north", "train")
        assert str(caught.value).endswith("; convert again")
