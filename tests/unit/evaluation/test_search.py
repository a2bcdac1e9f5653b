"""`feddra-ds search`: the nearest pictures by the saved embeddings, as a page of its own and as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from documented_json import check_documented
from run_helpers import add_model, make_config, make_data, make_line, make_run
from safetensors import safe_open

from feddra_ds.cli import main
from feddra_ds.evaluation.search import best, search


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of an untrained model, beside its data."""
    work = tmp_path_factory.mktemp("work")
    config = make_config(work / "run", make_data(work / "data"))
    run = make_run(work / "run", config, [make_line(0)])
    add_model(run / "model", config)
    return run


def code(*words: object) -> int:
    return main([str(word) for word in words])


def test_the_nearest_are_those_of_the_embeddings_that_embed_writes(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    query = "<b>report</b> 5 & north"  # the text of north's val0005
    page = tmp_path / "found.html"
    assert code("search", query, "--model", run, "--top", 5, "--json", "--out", page) == 0
    found = json.loads(capsys.readouterr().out)
    check_documented("search", found, but="non_finite")

    assert code("embed", run, "--out", tmp_path / "all.safetensors") == 0
    with safe_open(tmp_path / "all.safetensors", "np") as file:
        names = {name: json.loads(file.metadata()[name]) for name in ("client", "key")}
        image, text = file.get_tensor("image"), file.get_tensor("text")
    places = list(zip(names["client"], names["key"], strict=True))
    scores = image @ text[places.index(("north", "val0005"))]
    expected = [places[i] for i in np.argsort(-scores, kind="stable")[:5]]
    assert [(hit["client"], hit["key"]) for hit in found["hits"]] == expected
    assert [hit["score"] for hit in found["hits"]] == pytest.approx(np.sort(scores)[:-6:-1].tolist(), abs=1e-6)
    assert found["pictures"] == len(places) == 8 + 8 + 9

    html = page.read_text()
    assert html.count('<img src="data:image/jpeg;base64,') == 5
    assert "<h1>&lt;b&gt;report&lt;/b&gt; 5 &amp; north</h1>" in html, "a query is text, not markup"
    assert not any(word in html for word in ("<script", "http://", "https://", "@import"))
    positions = [html.index(f">{client}, {key}") for client, key in expected]
    assert positions == sorted(positions)


def test_without_json_there_is_a_page(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert code("search", "left effusion", "--model", run, "--clients", "north", "--top", 3) == 0
    out = capsys.readouterr().out
    assert "among the 8 pictures in val" in out
    assert "wrote search.html" in out
    assert (tmp_path / "search.html").read_text().count("<article") == 3
    assert code("search", "left effusion", "--model", run, "--clients", "north", "--json") == 0
    assert json.loads(capsys.readouterr().out)["pictures"] == 8
    assert [path.name for path in tmp_path.iterdir()] == ["search.html"]


class Stand:
    """A gallery's pictures alone."""

    def __init__(self, image: np.ndarray) -> None:
        self.image = image

    def __len__(self) -> int:
        return len(self.image)


def test_pictures_without_a_finite_embedding_are_not_found() -> None:
    nan = np.float32("nan")
    images = {"a": [[0.6, 0.8], [nan, 1], [1, 0]], "b": [[1, 0], [0, -1]]}
    galleries: Any = {name: Stand(np.array(x, np.float32)) for name, x in images.items()}
    found = best(galleries, np.array([1, 0], np.float32), 9)
    names = {id(gallery): name for name, gallery in galleries.items()}
    assert [(names[id(gallery)], index) for gallery, index, _ in found] == [("a", 2), ("b", 0), ("a", 0), ("b", 1)]
    assert [score for *_, score in found] == pytest.approx([1, 1, 0.6, 0])
    assert best(galleries, np.array([nan, 0], np.float32), 9) == []


def test_mistakes_have_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config(tmp_path / "own", run.parent / "data", strategy={"name": "local"})
    own = make_run(tmp_path / "own", config, [make_line(0)])
    for client in ("north", "south_and_the_islands", "west"):
        add_model(own / "model" / client, config)
    for words, message in (
        ((" ", "--model", run), "QUERY: is empty"),
        (("x", "--model", run, "--out", tmp_path / "no" / "x.html"), f"--out: {tmp_path / 'no'} is not a folder"),
        (("x", "--model", own), f"--clients: each client of {own} has a model of its own"),
    ):
        assert code("search", *words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"feddra-ds: {message}")
    assert len(search("x", own, clients=["north"], top=3).hits) == 3
