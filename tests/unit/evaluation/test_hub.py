"""Uploading an export and loading it again by its hub id, through the real client, against a small stand-in of the hub."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
from model_helpers import batch, build, config, scramble, tokenizer

from feddra_ds.cli import main
from feddra_ds.model.folder import load_pretrained, save_model
from feddra_ds.model.processor import build_processor

pytestmark = pytest.mark.slow

NAME = "hospital/model"
COMMIT = "0" * 40


class Hub(BaseHTTPRequestHandler):
    """One repository, in memory: as much of the hub's protocol as upload_folder and snapshot_download speak."""

    files: dict[str, bytes]
    created: list[dict]
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.headers.get("Authorization") != "Bearer hf_right":
            return self.answer({"error": "Invalid username or password."}, 401)
        if self.path == "/api/repos/create":
            self.created.append(json.loads(body))
            return self.answer({"url": f"http://{self.headers['Host']}/{NAME}", "name": NAME})
        if self.path.endswith("/preupload/main"):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        if self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    del self.files[line["value"]["path"]]
            return self.answer(
                {"commitUrl": f"http://{self.headers['Host']}/{NAME}/commit/{COMMIT}", "commitOid": COMMIT}
            )
        return self.answer({})  # validate-yaml

    def do_GET(self) -> None:
        asked = re.fullmatch(rf"/{NAME}/resolve/[^/]+/(.*)", self.path)
        if asked is not None:
            content = self.files.get(asked[1])
            headers = {"ETag": f'"{hash(content)}"', "X-Repo-Commit": COMMIT}
            return self.answer(content, 200 if content is not None else 404, headers)
        if "/tree/" in self.path:
            return self.answer(
                [{"type": "file", "path": p, "size": len(c), "oid": COMMIT} for p, c in self.files.items()]
            )
        siblings = [{"rfilename": path} for path in self.files]
        return self.answer({"id": NAME, "sha": COMMIT, "siblings": siblings, "private": True, "tags": []})

    do_HEAD = do_GET

    def answer(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {
            "Content-Length": str(len(data)),
            "Content-Type": "application/json",
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Hub]]:
    handler = type("OneHub", (Hub,), {"files": {}, "created": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    yield handler
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = build().eval()
    scramble(model)
    processor = build_processor(config(), tokenizer(), 32, 12)
    return save_model(model.state_dict(), model.config, processor, tmp_path_factory.mktemp("hub") / "model")


def test_an_upload_loads_by_its_id(
    hub: type[Hub], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    hub.files |= {"model-00001-of-00002.safetensors": b"of an earlier upload", "LICENSE": b"ours"}
    words = ["export", str(folder), "--out", str(tmp_path / "out"), "--push-to-hub", NAME]
    assert main(words) == 0, capsys.readouterr().err
    assert "uploaded to http" in capsys.readouterr().out
    assert hub.created[0]["visibility"] == "private"
    here = {str(p.relative_to(tmp_path / "out")): p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert "README.md" in here
    assert hub.files == here | {"LICENSE": b"ours"}, "weights of before are gone, and what is not ours stays"
    (ours, _), (theirs, processor) = load_pretrained(folder), load_pretrained(NAME)
    with torch.no_grad():
        assert torch.equal(ours(**batch()).text_embeds, theirs(**batch()).text_embeds)
    assert processor.text_length == 12


def test_what_goes_wrong_is_one_line(
    hub: type[Hub], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(name: str) -> str:
        assert main(["export", str(folder), "--out", str(tmp_path / "out"), "--push-to-hub", name]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "--push-to-hub: model is not of the form org/name" in refused("model")
    assert not (tmp_path / "out").exists(), "nothing was written yet"
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert re.search(r"--push-to-hub: hospital/model could not be written: .*; .*out is whole", refused(NAME))
    monkeypatch.setattr("feddra_ds.model.hub.get_token", lambda: None)
    assert "needs a token" in refused(NAME)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "do_GET", lambda self: self.answer({"error": "Repository not found"}, 404))
    with pytest.raises(
        ValueError, match="hospital/none is not a folder here and could not be fetched from the Hugging Face"
    ):
        load_pretrained("hospital/none")


def test_weights_that_are_not_finite_are_not_uploaded(
    hub: type[Hub], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, processor = load_pretrained(folder)
    state = dict(model.state_dict())
    name = next(iter(state))
    state[name] = torch.full_like(state[name], torch.nan)
    spoilt = save_model(state, model.config, processor, tmp_path / "spoilt")
    assert main(["export", str(spoilt), "--out", str(tmp_path / "out"), "--push-to-hub", NAME]) == 1
    assert f"weights that are not finite: {name}" in capsys.readouterr().err
    assert (hub.files, hub.created) == ({}, [])
