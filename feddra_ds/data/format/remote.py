"""Datasets at an address: shards come through a local cache, with retries, a bound on every wait, and a check.

http(s) goes through the standard library, whose timeouts hold; s3, gs, … through fsspec (each needs its own package);
`pipe:COMMAND {path}` runs a program and is refused unless the user opts in.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shlex
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, BinaryIO

from feddra_ds.common.errors import DataError
from feddra_ds.common.files import sha256
from feddra_ds.common.text import first_line, printable
from feddra_ds.config.schema import StreamingConfig

_BLOCK = 1 << 20
_FIRST_PAUSE_S = 0.5  # doubles with every further attempt
_LONGEST_PAUSE_S = 30.0
_OPENINGS = 5
_FINAL_STATUS = frozenset({400, 401, 403, 404, 405, 410})


class _GiveUp(Exception):
    """An attempt failed in a way that another attempt cannot mend."""


def is_remote(root: str | Path) -> bool:
    """Whether a data root is an address rather than a folder."""
    return "://" in str(root) or str(root).startswith("pipe:")


@dataclass
class Store:
    """A dataset's files at an address, and their copies here. Picklable; safe for many processes at once.

    expected: address → (bytes, sha256) of every file that has to be checked.
    """

    root: str
    options: StreamingConfig = field(default_factory=StreamingConfig)
    expected: dict[str, tuple[int, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.root.startswith("pipe:") and not self.options.allow_pipe:
            raise DataError(
                "data.root: pipe: runs a program here; it is refused unless data.streaming.allow_pipe is true"
            )
        if self.root.startswith("pipe:") and "{path}" not in self.root:
            raise DataError("data.root: a pipe: command needs {path} where the file's path under the root goes")

    @property
    def folder(self) -> Path:
        """Where the copies are."""
        base = self.options.cache_dir or str(Path.home() / ".cache" / "feddra_ds")
        return Path(base) / hashlib.sha256(self.root.encode()).hexdigest()[:16]

    def address(self, relative: str) -> str:
        """The address of a file under the root."""
        return self.root.replace("{path}", relative) if "{path}" in self.root else f"{self.root.rstrip('/')}/{relative}"

    def expect(self, address: str, size: int, sha256: str) -> str:
        """Remember what a shard must be; returns its address."""
        self.expected[address] = (size, sha256)
        return address

    def first(self, address: str) -> Path:
        """The local copy of a shard of which nothing is known yet, fetched when it is not here. Raises DataError."""
        path = self.copy_of(address)
        if not path.is_file():
            with self._locked(path, address):
                if not path.is_file():
                    self._fetch(address, path, None)
                    self._make_room(path)
        with contextlib.suppress(FileNotFoundError):  # `opened` will see it
            os.utime(path)  # `_make_room` drops what was used longest ago
        return path

    def refresh(self, relative: str) -> None:
        """Fetch a small file afresh into `folder`. Raises DataError."""
        self._fetch(self.address(relative), self.folder / relative, None)

    def copy_of(self, address: str) -> Path:
        """Where the copy of an expected file is, or will be."""
        name = hashlib.sha256(address.encode()).hexdigest()[:24]
        return self.folder / "shards" / f"{name}.tar"

    def local(self, address: str) -> Path:
        """The local copy of a shard, fetched when it is not here; a path stays what it is. Raises DataError in bounded time."""
        if not is_remote(address):
            return Path(address)
        path, expected = self.copy_of(address), self.expected[address]
        if not _has_size(path, expected[0]):
            with self._locked(path, address):
                if not _has_size(path, expected[0]):  # another process may have fetched it while this one waited
                    self._fetch(address, path, expected)
                    self._make_room(path)
        os.utime(path)  # `_make_room` drops what was used longest ago
        return path

    def at_hand(self, place: str) -> Path:
        """A shard here: the path itself, or the copy of an address, which is checked where something is known of it."""
        return self.local(place) if place in self.expected or not is_remote(place) else self.first(place)

    def opened(self, place: str) -> BinaryIO:
        """A shard, open for reading; closing it is up to the caller. Raises DataError and OSError."""
        for _ in range(_OPENINGS):
            with contextlib.suppress(FileNotFoundError):  # another reader needed the room before this one had it open
                return open(self.at_hand(place), "rb")
        return open(self.at_hand(place), "rb")

    @contextlib.contextmanager
    def _locked(self, path: Path, address: str) -> Iterator[None]:
        """One process fetches a file; the others wait for it, as long as it might take and no longer."""
        path.parent.mkdir(parents=True, exist_ok=True)
        patience = 10 * self.options.timeout_s * (self.options.retries + 1)
        with open(path.with_suffix(".lock"), "w") as lock:
            end = time.monotonic() + patience
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > end:
                        raise DataError(
                            f"{address}: another process did not finish fetching it in {patience:.0f} s"
                        ) from None
                    time.sleep(0.05)
            yield

    def _fetch(self, address: str, path: Path, expected: tuple[int, str] | None) -> None:
        attempts, last = self.options.retries + 1, ""
        start = time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
        for attempt in range(attempts):
            if attempt:
                time.sleep(min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** (attempt - 1)))
            try:
                _download(address, aside, self.options.timeout_s)
                if expected is not None:
                    _check(aside, expected)
                os.replace(aside, path)
                return
            except _GiveUp as error:
                raise DataError(f"{address}: {error}") from error
            except Exception as error:  # http.client and the packages behind fsspec have many types of their own
                last = _reason(error)
            finally:
                aside.unlink(missing_ok=True)
        waited = time.monotonic() - start
        raise DataError(f"{address}: not fetched in {attempts} attempts and {waited:.0f} s; the last one said: {last}")

    def _make_room(self, keep: Path) -> None:
        """Drop the copies that were used longest ago. A process that has one open goes on reading it."""
        copies = []
        for path in keep.parent.glob("*.tar"):
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                copies.append((stat.st_mtime, stat.st_size, path))
        total = sum(size for _, size, _ in copies)
        for _, size, path in sorted(copies):
            if total <= self.options.cache_bytes:
                break
            if path != keep:
                path.unlink(missing_ok=True)
                total -= size


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False


def _check(path: Path, expected: tuple[int, str]) -> None:
    size, digest = expected
    if path.stat().st_size != size:
        raise ValueError(f"{path.stat().st_size} bytes came, index.json says {size}")
    if sha256(path) != digest:
        raise ValueError("its sha256 differs from index.json")


def _download(address: str, path: Path, timeout_s: float) -> None:
    """Copy an address to a file. Raises TimeoutError when no byte comes for `timeout_s`, whatever the library does."""
    last_byte = [time.monotonic()]
    outcome: list[BaseException | None] = []

    def work() -> None:
        try:
            with _open(address, timeout_s) as source, path.open("wb") as out:
                while block := source.read(_BLOCK):
                    last_byte[0] = time.monotonic()
                    out.write(block)
            outcome.append(None)
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=work, name="feddra-fetch", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(min(0.2, timeout_s))
        if thread.is_alive() and time.monotonic() - last_byte[0] > timeout_s:
            raise TimeoutError(f"no byte for {timeout_s:g} s")
    if outcome[0] is not None:
        raise outcome[0]


@contextlib.contextmanager
def _open(address: str, timeout_s: float) -> Iterator[Any]:
    if address.startswith(("http://", "https://")):
        try:
            with urllib.request.urlopen(address, timeout=timeout_s) as response:
                yield _Whole(response)
        except urllib.error.HTTPError as error:
            if error.code in _FINAL_STATUS:
                raise _GiveUp(_reason(error)) from error
            raise
    elif address.startswith("pipe:"):
        with _program(shlex.split(address[len("pipe:") :])) as out:
            yield out
    else:
        import fsspec

        try:
            opened = fsspec.open(address, "rb")
        except (ImportError, ValueError) as error:  # the protocol needs a package of its own, or is not known
            raise _GiveUp(first_line(error)) from error
        try:
            with opened as source:
                yield source
        except (FileNotFoundError, PermissionError) as error:
            raise _GiveUp(_reason(error)) from error


class _Whole:
    """A response that raises when the connection ends before the announced length."""

    def __init__(self, response: Any):
        self.response, self.got = response, 0
        length = response.headers.get("Content-Length")
        self.length = None if length is None else int(length)

    def read(self, size: int) -> bytes:
        block: bytes = self.response.read1(size)
        self.got += len(block)
        if not block and self.length is not None and self.got < self.length:
            raise EOFError(f"the connection ended after {self.got} of {self.length} bytes")
        return block


@contextlib.contextmanager
def _program(command: list[str]) -> Iterator[IO[bytes]]:
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        try:
            yield child.stdout
            if child.wait(10):
                raise OSError(f"{command[0]} ended with status {child.returncode}")
        finally:
            child.kill()


def _reason(error: BaseException) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server says {error.code} {printable(error.reason)[:200]}"
    if isinstance(error, urllib.error.URLError):
        return printable(str(error.reason))
    said = first_line(error)
    return said if said.startswith(type(error).__name__) else f"{type(error).__name__}: {said}"


class OpenAhead:
    """Opens shards before they are needed, one after the other, in a background thread.

    An open file can be read whatever the cache drops meanwhile, so that nothing is fetched twice.
    """

    def __init__(self, open_shard: Callable[[str], BinaryIO]):
        self._open = open_shard
        self._wanted: list[str] = []  # those to open, in order, and the one that is being opened
        self._done: dict[str, BinaryIO | BaseException] = {}
        self._changed = threading.Condition()
        self._running = False

    def want(self, places: list[str]) -> None:
        """Open these, in order, and no others any more."""
        with self._changed:
            for place in [place for place in self._done if place not in places]:
                _close(self._done.pop(place))
            self._wanted = [place for place in places if place not in self._done]
            if self._wanted and not self._running:
                self._running = True
                threading.Thread(target=self._work, name="feddra-ahead", daemon=True).start()

    def take(self, place: str) -> BinaryIO | None:
        """The open shard, waited for, which the caller closes; None where it was not wanted. Raises what opening it raised."""
        with self._changed:
            self._changed.wait_for(lambda: place not in self._wanted)  # as long as opening it takes, which has a bound
            found = self._done.pop(place, None)
        if isinstance(found, BaseException):
            raise found
        return found

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._wanted:
                    self._running = False
                    return
                place = self._wanted[0]
            found: BinaryIO | BaseException
            try:
                found = self._open(place)
            except BaseException as error:
                found = error
            with self._changed:
                if place in self._wanted:
                    self._wanted.remove(place)
                    self._done[place] = found
                    self._changed.notify_all()
                else:
                    _close(found)


def _close(found: BinaryIO | BaseException) -> None:
    if not isinstance(found, BaseException):
        found.close()
