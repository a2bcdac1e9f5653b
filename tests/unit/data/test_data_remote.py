"""Shards at an address: fetched with retries and checks, within a bound, one clear line when it cannot be done."""

from __future__ import annotations

import http.server
import io
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from data_helpers import client_data, make_dataset, preflight_lines

from feddra_ds.common.errors import DataError
from feddra_ds.config.load import from_dict
from feddra_ds.config.schema import DataConfig, StreamingConfig
from feddra_ds.data.format import remote
from feddra_ds.data.format.dataset import Dataset, open_dataset
from feddra_ds.data.format.remote import OpenAhead, Store, is_remote
from feddra_ds.data.loading.order import Position
from feddra_ds.data.loading.pool import DecodePool
from feddra_ds.data.loading.stream import Stream
from feddra_ds.distributed.launch import Launch
from feddra_ds.run.checks import check

CHECK = {"batch_size": 4, "eval_batch_size": 2, "eval_split": None, "verify": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("remote") / "data"
    make_dataset(root, {"a": {"train": 24, "val": 6}, "b": {"train": 8}}, max_shard_bytes=20_000)
    return root


class Server:
    """An HTTP server of a folder whose misbehaviour a test decides: `behave(handler, number) -> bool` says it answered."""

    def __init__(self, folder: Path):
        self.requests: list[str] = []
        self.behave: Callable[[http.server.BaseHTTPRequestHandler, int], bool] = lambda handler, number: False
        outer = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *args: object) -> None:
                super().__init__(*args, directory=str(folder))  # type: ignore[arg-type]

            def do_GET(self) -> None:
                outer.requests.append(self.path)
                if not outer.behave(self, len(outer.requests)):
                    super().do_GET()

            def log_message(self, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    server = Server(folder)
    yield server
    server.server.shutdown()
    server.server.server_close()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_FIRST_PAUSE_S", 0.01)


@pytest.fixture
def options(tmp_path: Path) -> StreamingConfig:
    return StreamingConfig(timeout_s=1.0, retries=3, cache_dir=str(tmp_path / "cache"))


def contents(dataset: Dataset) -> dict[str, tuple[bytes | None, bytes | None]]:
    out = {}
    for client in dataset.client_ids:
        for split in dataset.splits(client):
            part = dataset.samples(client, split)
            out |= {
                f"{client}/{split}/{part.keys[i]}": (part.read_image(i), part.read_text(i)) for i in range(len(part))
            }
    return out


def every_third_fails(handler: http.server.BaseHTTPRequestHandler, number: int) -> bool:
    if number % 3 == 0:
        handler.send_error(503)
        return True
    return False


def cut_every_third(handler: http.server.BaseHTTPRequestHandler, number: int) -> bool:
    if number % 3 == 0:
        handler.send_response(200)
        handler.send_header("Content-Length", "100000")
        handler.end_headers()
        handler.wfile.write(b"x" * 1000)
        return True
    return False


@pytest.mark.parametrize("behave", [lambda h, n: False, every_third_fails, cut_every_third], ids=["good", "503", "cut"])
def test_everything_arrives(server: Server, folder: Path, options: StreamingConfig, behave) -> None:
    server.behave = behave
    assert preflight_lines(server.address, None, **CHECK, options=options) == []
    dataset = open_dataset(server.address, options=options)
    assert dataset.client_ids == ["a", "b"]
    assert contents(dataset) == contents(open_dataset(folder))


def test_a_second_reader_uses_the_cache(server: Server, options: StreamingConfig) -> None:
    first = contents(open_dataset(server.address, options=options))
    fetched = len([r for r in server.requests if r.endswith(".tar")])
    assert fetched == len(set(server.requests) - {"/dataset.json", "/a/index.json", "/b/index.json"})
    assert contents(open_dataset(server.address, options=options)) == first
    assert len([r for r in server.requests if r.endswith(".tar")]) == fetched


def test_a_run_opens_its_dataset_once(server: Server, options: StreamingConfig, tmp_path: Path) -> None:
    user = {
        "run": {"output_dir": str(tmp_path / "run"), "device": "cpu"},
        "data": {"root": server.address, "batch_size": 4, "streaming": options.model_dump()},
        "clients": {"ids": ["b"]},
        "dro": {"evaluation_batch_size": 4, "evaluate_on": "train"},
        "evaluation": {"every": 0},
    }
    dataset, ids, _ = check(from_dict(user), Launch(0, 1, 0, "127.0.0.1", 0))
    assert (ids, dataset.client_ids, len(dataset.samples("b", "train"))) == (["b"], ["b"], 8)
    assert server.requests == ["/dataset.json", "/b/index.json"]


def test_a_server_that_hangs_ends_in_a_named_error_within_the_bound(server: Server, options: StreamingConfig) -> None:
    stop = threading.Event()

    def hang(handler: http.server.BaseHTTPRequestHandler, number: int) -> bool:
        return handler.path.endswith(".tar") and (stop.wait(30) or True)

    server.behave = hang
    dataset = open_dataset(server.address, options=options.model_copy(update=dict(timeout_s=0.4, retries=2)))
    start = time.monotonic()
    with pytest.raises(
        DataError,
        match=r"a/train-000000.tar: not fetched in 3 attempts and \d s; the last one said: .*(no byte|timed out)",
    ):
        dataset.samples("a", "train").read_image(0)
    assert time.monotonic() - start < 6
    stop.set()


def test_a_library_that_ignores_timeouts_is_bounded_too(tmp_path: Path) -> None:
    """fsspec's file systems have no common timeout: the wait is watched from outside."""
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    class Stuck(MemoryFileSystem):
        protocol = "stuck"

        def open(self, *args: object, **kwargs: object) -> object:
            time.sleep(20)
            raise AssertionError

    fsspec.register_implementation("stuck", Stuck, clobber=True)
    options = StreamingConfig(timeout_s=0.3, retries=1, cache_dir=str(tmp_path))
    start = time.monotonic()
    lines = preflight_lines("stuck://bucket/data", None, **CHECK, options=options)
    assert time.monotonic() - start < 5
    assert len(lines) == 1
    assert lines[0].startswith("data.root: stuck://bucket/data/dataset.json: not fetched in 2 attempts")


def test_object_stores_through_fsspec(folder: Path, options: StreamingConfig) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in folder.rglob("*"):
        if path.is_file():
            memory.pipe(f"/bucket/{path.relative_to(folder)}", path.read_bytes())
    dataset = open_dataset("memory://bucket", ["b"], options)
    assert len(contents(dataset)) == 8
    (line,) = preflight_lines("memory://nowhere", None, **CHECK, options=options)
    assert line.startswith("data.root: memory://nowhere/dataset.json: FileNotFoundError")
    (line,) = preflight_lines("s4://bucket/data", None, **CHECK, options=options)
    assert line.startswith("data.root: s4://bucket/data/dataset.json: Protocol not known: s4")


def test_a_missing_file_is_said_at_once(server: Server, options: StreamingConfig) -> None:
    (line,) = preflight_lines(f"{server.address}/nothing", None, **CHECK, options=options)
    assert line == f"data.root: {server.address}/nothing/dataset.json: the server says 404 File not found"
    assert len(server.requests) == 1, "a 404 is not tried again"
    (line,) = preflight_lines(server.address, ["a", "c"], **CHECK, options=options)
    assert line == f"clients.ids: no client c under {server.address}; there are: a, b"


def test_nobody_listening(options: StreamingConfig) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (line,) = preflight_lines(f"http://127.0.0.1:{port}/data", None, **CHECK, options=options)
    assert "not fetched in 4 attempts" in line
    assert "Connection refused" in line


def test_wrong_bytes_are_never_used(server: Server, options: StreamingConfig) -> None:
    def damage(handler: http.server.BaseHTTPRequestHandler, number: int) -> bool:
        if not handler.path.endswith(".tar"):
            return False
        size = next(s["bytes"] for s in index["splits"]["train"]["shards"])
        handler.send_response(200)
        handler.send_header("Content-Length", str(size))
        handler.end_headers()
        handler.wfile.write(bytes(size))
        return True

    dataset = open_dataset(server.address, options=options)
    index = dataset.index("a")
    server.behave = damage
    with pytest.raises(
        DataError, match=r"train-000000.tar: not fetched in 4 attempts .* its sha256 differs from index.json"
    ):
        dataset.samples("a", "train").read_image(0)
    assert any(
        "sha256 differs" in line
        for line in preflight_lines(server.address, ["a"], **CHECK | {"verify": True}, options=options)
    )
    short = server.behave
    server.behave = lambda h, n: (
        h.path.endswith(".tar") and (h.send_response(200), h.end_headers(), h.wfile.write(b"xy")) is not None
    )
    with pytest.raises(DataError, match=r"2 bytes came, index.json says"):
        dataset.samples("a", "train").read_image(0)
    assert short is not server.behave
    store = dataset.store
    assert store is not None
    assert not list(store.folder.rglob("*.tar"))
    assert not list(store.folder.rglob(".*")), "nothing half fetched stays"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("dataset.json", '{"clients": ["../../etc"], "held_out": []}'),
        ("dataset.json", '{"clients": []}'),
        ("dataset.json", "{"),
    ],
)
def test_a_bad_description_is_refused(tmp_path: Path, options: StreamingConfig, name: str, content: str) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / name).write_text(content)
    server = Server(tmp_path / "bad")
    (line,) = preflight_lines(server.address, None, **CHECK, options=options)
    assert line.startswith("data.root: ")
    server.server.shutdown()


@pytest.mark.parametrize(
    "file", ["../../../etc/passwd", "/etc/passwd.tar", "pipe:touch x.tar", ".hidden.tar", "a/b.tar"]
)
def test_an_index_cannot_name_files_elsewhere(tmp_path: Path, folder: Path, file: str) -> None:
    import json
    import shutil

    shutil.copytree(folder, tmp_path / "data")
    index = json.loads((folder / "b" / "index.json").read_text())
    index["splits"]["train"]["shards"][0]["file"] = file
    (tmp_path / "data" / "b" / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="is not a feddra-shards file"):
        open_dataset(tmp_path / "data").samples("b", "train")


def test_pipes_are_refused_unless_opted_in(folder: Path, options: StreamingConfig, tmp_path: Path) -> None:
    root = f"pipe:cat {folder}/{{path}}"
    assert is_remote(root)
    (line,) = preflight_lines(root, None, **CHECK, options=options)
    assert line.startswith("data.root: pipe: runs a program here; it is refused")
    allowed = options.model_copy(update=dict(allow_pipe=True))
    (line,) = preflight_lines("pipe:cat x", None, **CHECK, options=allowed)
    assert "needs {path}" in line
    assert contents(open_dataset(root, options=allowed)) == contents(open_dataset(folder))
    (line,) = preflight_lines(f"pipe:{sys.executable} -c exit(3) {{path}}", None, **CHECK, options=allowed)
    assert "ended with status 3" in line


def test_the_cache_stays_within_its_bytes_and_drops_the_oldest(server: Server, options: StreamingConfig) -> None:
    dataset = open_dataset(server.address, ["a"], options.model_copy(update=dict(cache_bytes=45_000)))
    part = dataset.samples("a", "train")
    store = dataset.store
    assert store is not None
    assert len(part.paths) >= 4
    for path in part.paths:
        store.local(path)
        time.sleep(0.02)
        assert sum(p.stat().st_size for p in store.folder.rglob("*.tar")) <= 45_000
    assert store.copy_of(part.paths[-1]).exists()
    assert not store.copy_of(part.paths[0]).exists()


def test_two_readers_fetch_a_shard_once(server: Server, options: StreamingConfig) -> None:
    server.behave = lambda handler, number: time.sleep(0.2) or False
    dataset = open_dataset(server.address, ["a"], options)
    part = dataset.samples("a", "train")
    store = dataset.store
    assert store is not None
    threads = [threading.Thread(target=store.local, args=(part.paths[0],)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert server.requests.count("/a/train-000000.tar") == 1


def test_waiting_for_another_reader_has_a_bound(server: Server, options: StreamingConfig, tmp_path: Path) -> None:
    import fcntl

    dataset = open_dataset(server.address, ["a"], options)
    part = dataset.samples("a", "train")
    store = dataset.store
    assert store is not None
    store.options = options.model_copy(update=dict(timeout_s=0.02, retries=0))
    path = store.copy_of(part.paths[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process did not finish fetching it in 0 s"):
            store.local(part.paths[0])


def eventually(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not holds() and time.monotonic() < end:
        time.sleep(0.01)
    assert holds()


def test_shards_are_opened_ahead_in_order() -> None:
    seen: list[str] = []
    files: dict[str, io.BytesIO] = {}
    go = threading.Event()

    def open_shard(place: str) -> io.BytesIO:
        seen.append(place)
        if place == "bad":
            raise DataError("no")
        if place == "late":
            go.wait(5)
        return files.setdefault(place, io.BytesIO(place.encode()))

    ahead = OpenAhead(open_shard)
    ahead.want(["one", "bad", "two"])
    ahead.want(["one", "bad", "two"])
    assert ahead.take("two") is files["two"], "it is waited for"
    with pytest.raises(DataError, match="no"):
        ahead.take("bad")
    assert ahead.take("other") is None
    ahead.want(["three"])
    assert ahead.take("three") is files["three"]
    assert seen == ["one", "bad", "two", "three"], "each once, in order"
    assert [files[name].closed for name in ("one", "two", "three")] == [True, False, False], "not wanted any more"
    ahead.want(["late"])
    eventually(lambda: "late" in seen)
    ahead.want([])
    go.set()
    eventually(lambda: "late" in files and files["late"].closed)
    assert ahead.take("late") is None


def test_a_cache_that_keeps_nothing_fetches_each_shard_once(server: Server, options: StreamingConfig) -> None:
    options = options.model_copy(update=dict(cache_bytes=0))
    shards = open_dataset(server.address, ["a"], options, DataConfig(order="streaming")).stream("a", "train")
    assert len(shards.places) >= 4
    for seed in range(3):
        server.requests.clear()
        assert len(Stream([shards], seed, buffer=3).sample(None)) == 24
        assert len(set(server.requests)) == len(server.requests), "no shard twice in a pass"


def test_a_store_can_be_sent_to_workers(server: Server, options: StreamingConfig) -> None:
    dataset = open_dataset(server.address, ["a"], options)
    with DecodePool(1, 2) as pool:
        (batch,) = client_data(dataset, ["a"], pool=pool).batches(Position(), 1)
    assert len(batch) == 4


def test_what_is_remote() -> None:
    assert [is_remote(r) for r in ("data", Path("/data"), "s3://b/d", "https://h/d", "pipe:cat {path}")] == [
        False,
        False,
        True,
        True,
        True,
    ]
    assert Store("https://h/d/").address("a/x.tar") == "https://h/d/a/x.tar"
