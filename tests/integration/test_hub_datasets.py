"""`data convert --from huggingface` with an id: a server on this machine stands in for the hub."""

from __future__ import annotations

import http.server
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from feddra_ds.data.format.dataset import open_dataset

COMMIT = "a" * 40
CONVERT = """
import sys
from feddra_ds.cli import main
for name, out in zip(sys.argv[1::2], sys.argv[2::2]):
    words = ["--image-column", "image", "--text-column", "text", "--client-column", "hospital", "--out", out]
    print("exit code", main(["data", "convert", "--from", "huggingface", "--path", name, *words]))
"""


def picture(number: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (40, 30), (number * 9, 100, 50)).save(out, "JPEG")
    return out.getvalue()


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers what `datasets` and huggingface_hub ask of the hub, for the folders OWNER/NAME under `root`."""

    root: Path
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        owner, name, *rest = path.removeprefix("/api").removeprefix("/datasets/").split("/")
        folder = self.root / owner / name
        if not folder.is_dir():
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif not path.startswith("/api/"):
            self.give(folder / "/".join(rest[2:]))  # resolve/COMMIT/FILE
        elif rest[:1] == ["tree"]:
            recursive = "recursive=true" in self.path.lower()
            self.list(folder, folder / "/".join(rest[2:]), recursive)
        else:
            about = {"_id": "0", "id": f"{owner}/{name}", "sha": COMMIT, "private": False, "tags": [], "siblings": []}
            self.answer(200, json.dumps(about).encode())

    def list(self, folder: Path, within: Path, recursive: bool) -> None:
        if not within.is_dir():
            self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            return
        entries = []
        for path in sorted(within.rglob("*") if recursive else within.iterdir()):
            kind = "directory" if path.is_dir() else "file"
            size = 0 if path.is_dir() else path.stat().st_size
            entries.append({"type": kind, "oid": "1" * 40, "size": size, "path": str(path.relative_to(folder))})
        self.answer(200, json.dumps(entries).encode())

    def give(self, path: Path) -> None:
        about = {"X-Repo-Commit": COMMIT, "ETag": f'"{abs(hash(path)):040d}"', "Accept-Ranges": "bytes"}
        if not path.is_file():
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound", **about})
            return
        data = path.read_bytes()
        wanted = self.headers.get("Range")
        if wanted is None:
            self.answer(200, data, about)
            return
        first, last = wanted.removeprefix("bytes=").split("-")
        start, stop = int(first), min(int(last or len(data)) + 1, len(data))
        self.answer(206, data[start:stop], about | {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {"Content-Type": "application/json"}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    """The address of a hub with acme/tables (Parquet that holds the pictures) and acme/pictures (files with a metadata.csv)."""
    tables, pictures = tmp_path / "hub" / "acme" / "tables" / "data", tmp_path / "hub" / "acme" / "pictures"
    tables.mkdir(parents=True)
    for split in ("train", "validation"):
        columns = {
            "image": [{"bytes": picture(n), "path": None} for n in range(8)],
            "text": [f"{split} report {n}" for n in range(8)],
            "hospital": [f"H{n % 2}" for n in range(8)],
        }
        pyarrow.parquet.write_table(pyarrow.table(columns), tables / f"{split}-00000-of-00001.parquet")
        (pictures / split).mkdir(parents=True)
        for n in range(8):
            (pictures / split / f"{n}.jpg").write_bytes(picture(n))
        rows = "".join(f"{n}.jpg,{split} report {n},H{n % 2}\n" for n in range(8))
        (pictures / split / "metadata.csv").write_text(f"file_name,text,hospital\n{rows}")
    handler = type("Here", (Hub,), {"root": tmp_path / "hub"})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_datasets_of_the_hub_are_converted_by_their_ids(hub: str, tmp_path: Path) -> None:
    names = {
        "acme/tables": tmp_path / "tables",
        "acme/pictures": tmp_path / "pictures",
        "acme/nothing": tmp_path / "none",
    }
    words = [str(word) for pair in names.items() for word in pair]
    more = {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", CONVERT, *words], env=os.environ | more, capture_output=True, text=True, timeout=240
    )
    codes = [line for line in done.stdout.splitlines() if line.startswith("exit code")]
    assert codes == ["exit code 0", "exit code 0", "exit code 2"], done.stdout + done.stderr
    for out in list(names.values())[:2]:
        dataset, found = open_dataset(out), {}
        for client in ("H0", "H1"):
            for split in ("train", "val"):
                part = dataset.samples(client, split)
                found |= {(client, part.read_text(i).decode()): part.read_image(i) for i in range(len(part))}
        assert found == {
            (f"H{n % 2}", f"{split} report {n}"): picture(n) for split in ("train", "validation") for n in range(8)
        }
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("feddra-ds: ")]
    assert line.startswith(
        "feddra-ds: --path: cannot open acme/nothing with datasets: Dataset 'acme/nothing' doesn't exist"
    )
