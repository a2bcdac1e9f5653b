"""From a task (which batch, which part of it) to arrays. Runs in the loader's thread or worker; knows no torch.

Legend: b pairs of this rank's part, S side of the image, T tokens.
"""

from __future__ import annotations

import functools
import itertools
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from feddra_ds.common.errors import DataError
from feddra_ds.config.schema import AugmentConfig
from feddra_ds.data.format.samples import Samples, text_id
from feddra_ds.data.format.stream import Raw
from feddra_ds.data.format.text import is_lfs_pointer, no_report
from feddra_ds.data.loading.images import BadSample, evaluation_pixels, training_pixels
from feddra_ds.data.loading.order import EvaluationOrder, Order, Position, seeded
from feddra_ds.data.loading.tokens import pad_batch

_MAX_SUBSTITUTES = 1000


@dataclass
class Source:
    """One data owner's split (or several pooled), with all that decoding needs. Picklable; sent once to each worker."""

    name: str
    parts: list[Samples]
    seed: int
    order: Order | None
    image_size: int
    augment: AugmentConfig
    tokenizer: str
    pad_id: int
    text_length: int
    uid: int = field(default_factory=itertools.count().__next__)
    _decoder: Decoder | None = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_decoder": None}  # each process builds its own

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, tokenizer=sys.intern(state["tokenizer"]))  # sources share one copy of this text

    def decode(self, task: Task) -> Decoded:
        """See `Decoder.decode`."""
        if self._decoder is None:
            self._decoder = Decoder(self)
        return self._decoder.decode(task)

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def locate(self, sample: int) -> tuple[Samples, int]:
        """The part that holds `sample`, and its index there."""
        for part in self.parts:
            if sample < len(part):
                return part, sample
            sample -= len(part)
        raise IndexError(sample)

    def key(self, sample: int) -> str:
        """The sample's key; with the client before it where several are pooled."""
        part, index = self.locate(sample)
        return part.keys[index] if len(self.parts) == 1 else f"{part.client}/{part.keys[index]}"


class RawSample(NamedTuple):
    """A sample that streaming has read: its key, its pass (-1 in evaluation), what its shard holds of it."""

    key: str
    epoch: int
    raw: Raw


@dataclass(frozen=True)
class Task:
    """Entries [start, stop) of a training batch (`position`) or of an evaluation sample (`evaluate`: pairs, batch, draw); or
    `raws`, read already, and `spares` that stand in for bad ones."""

    start: int
    stop: int
    position: Position | None = None
    evaluate: tuple[int | None, int, int | None] | None = None
    raws: tuple[RawSample, ...] = ()
    spares: tuple[RawSample, ...] = ()

    def __str__(self) -> str:
        if self.raws:
            return f"{len(self.raws)} pairs from {self.raws[0].key} on"
        if self.position is not None:
            return f"epoch {self.position.epoch} step {self.position.step}"
        return f"evaluation pairs {self.start} to {self.stop}"


@dataclass
class Decoded:
    """pixels (b, 3, S, S) uint8; input_ids, attention_mask (b, T) int64; text_ids (b,) int64; keys, b of them.

    bad: (epoch or -1, sample's number, or its key in streaming, reason) of every sample that was substituted.
    """

    pixels: np.ndarray
    input_ids: np.ndarray
    attention_mask: np.ndarray
    text_ids: np.ndarray
    keys: list[str]
    bad: list[tuple[int, int | str, str]] = field(default_factory=list)


_tokenizer = functools.lru_cache(maxsize=2)(Tokenizer.from_str)  # megabytes each, and all sources have the same


class Decoder:
    """Decodes one source's tasks; holds what a process needs to keep between them."""

    def __init__(self, source: Source):
        self._source = weakref.ref(source)  # the source owns its decoder
        self.tokenizer = _tokenizer(source.tokenizer)
        self._evaluations: dict[tuple[int | None, int, int | None], EvaluationOrder] = {}

    @property
    def source(self) -> Source:
        source = self._source()
        assert source is not None
        return source

    def decode(self, task: Task) -> Decoded:
        """Raises DataError where a shard cannot be opened or no substitute for a bad sample can be read."""
        if task.raws:
            return self._decode_raws(task)
        source = self.source
        pixels = np.empty((task.stop - task.start, 3, source.image_size, source.image_size), dtype=np.uint8)
        rows, text_ids, keys = [], np.empty(len(pixels), dtype=np.int64), []
        bad: list[tuple[int, int | str, str]] = []
        for number, (epoch, sample, others) in enumerate(self._entries(task)):
            found, text = self._first_good(pixels[number], epoch, sample, others, bad)
            rows.append(self.tokenizer.encode(text).ids)
            text_ids[number] = text_id(text)
            keys.append(source.key(found))
        ids, mask = pad_batch(rows, source.pad_id, source.text_length)
        return Decoded(pixels, ids, mask, text_ids, keys, bad)

    def _decode_raws(self, task: Task) -> Decoded:
        """A bad sample's place is taken by the next spare, and where there is none left, by another of the batch."""
        source = self.source
        pixels = np.empty((len(task.raws), 3, source.image_size, source.image_size), dtype=np.uint8)
        rows, text_ids, keys = [], np.empty(len(pixels), dtype=np.int64), []
        bad: dict[tuple[int, str], str] = {}
        spares = iter(task.spares)
        for number, wanted in enumerate(task.raws):
            for one in itertools.chain([wanted], spares, task.raws):
                try:
                    text = fill_raw(pixels[number], one, source)
                    break
                except BadSample as error:
                    bad[one.epoch, one.key] = error.reason
            else:
                raise DataError(f"client {source.name}: {len(bad)} samples in a row are unreadable, the first is {wanted.key} "
                                f"({bad[wanted.epoch, wanted.key]})")  # fmt: skip
            rows.append(self.tokenizer.encode(text).ids)
            text_ids[number] = text_id(text)
            keys.append(one.key)
        ids, mask = pad_batch(rows, source.pad_id, source.text_length)
        told: list[tuple[int, int | str, str]] = [(epoch, key, reason) for (epoch, key), reason in bad.items()]
        return Decoded(pixels, ids, mask, text_ids, keys, told)

    def _entries(self, task: Task) -> Iterator[tuple[int, int, Iterator[int]]]:
        """(epoch or -1, sample, its substitutes) of each entry."""
        entries = range(task.start, task.stop)
        if task.position is not None:
            order, position = self.source.order, task.position
            assert order is not None
            batch = order.batch(position)[task.start : task.stop].tolist()
            for entry, (epoch, sample) in zip(entries, batch, strict=True):
                yield epoch, sample, order.substitutes(position, entry)
        else:
            assert task.evaluate is not None
            if task.evaluate not in self._evaluations:
                pairs, batch_size, draw = task.evaluate
                for old in [key for key in self._evaluations if key[2] is not None and key[2] != draw]:
                    del self._evaluations[old]  # a round that is over
                self._evaluations[task.evaluate] = EvaluationOrder(
                    self.source.seed, self.source.name, len(self.source), pairs, batch_size, draw
                )
            evaluation = self._evaluations[task.evaluate]
            for entry in entries:
                yield -1, int(evaluation.samples[entry]), evaluation.substitutes(entry)

    def _first_good(
        self, out: np.ndarray, epoch: int, sample: int, others: Iterator[int], bad: list[tuple[int, int | str, str]]
    ) -> tuple[int, str]:
        """Fill `out` (3, S, S) from the first of sample, others that can be read; returns it with its text."""
        reasons: dict[int, str] = {}
        while True:
            if sample not in reasons:
                try:
                    text = self._read(out, epoch, sample)
                    return sample, text
                except BadSample as error:
                    reasons[sample] = error.reason
                    bad.append((epoch, sample, error.reason))
            following = next(others, None)
            if following is None or len(reasons) > _MAX_SUBSTITUTES:
                first, reason = next(iter(reasons.items()))
                raise DataError(
                    f"client {self.source.name}: {len(reasons)} samples in a row are unreadable, "
                    f"the first is {self.source.key(first)} ({reason})"
                )
            sample = following

    def _read(self, out: np.ndarray, epoch: int, sample: int) -> str:
        part, index = self.source.locate(sample)
        try:
            text, image = part.read_text(index, caption_of(self.source, epoch, sample)), part.read_image(index)
        except EOFError as error:
            raise BadSample("truncated_shard") from error
        except OSError as error:
            path = part.paths[int(part.shard[index])]
            raise DataError(f"{path}: cannot be read for client {part.client}: {error.strerror}") from error
        return fill(out, image, text, self.source, epoch, sample)


def caption_of(source: Source, epoch: int, sample: object) -> int:
    """Which of a sample's texts to take, where it has several: one drawn in each epoch, the first in evaluation (-1)."""
    if epoch < 0:
        return 0
    return int.from_bytes(seeded("caption", source.seed, source.name, epoch, sample)[:8], "big")


def fill_raw(out: np.ndarray, sample: RawSample, source: Source) -> str:
    """Decode a pair that streaming has read: see `fill`."""
    text = sample.raw.text(caption_of(source, sample.epoch, sample.key))
    return fill(out, sample.raw.image, text, source, sample.epoch, sample.key)


def fill(out: np.ndarray, image: bytes | None, text: bytes | None, source: Source, epoch: int, sample: object) -> str:
    """Decode one pair: pixels into `out` (3, S, S) uint8, augmented unless epoch is -1; the text is returned.

    Raises BadSample.
    """
    image, told = checked(image, text)
    if epoch < 0:
        out[...] = evaluation_pixels(image, source.image_size)
    else:
        out[...] = training_pixels(image, source.image_size, source.augment, source.seed, source.name, epoch, sample)
    return told


def checked(image: bytes | None, text: bytes | None) -> tuple[bytes, str]:
    """A pair's encoded image, not decoded here, and its report. Raises BadSample where one is missing, or is none."""
    if text is None:
        raise BadSample("missing_text")
    if image is None:
        raise BadSample("missing_image")
    if is_lfs_pointer(image):
        raise BadSample("git_lfs_pointer")
    try:
        told = text.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise BadSample("corrupt_text") from error
    reason = no_report(told)
    if reason is not None:
        raise BadSample(reason)
    return image, told
