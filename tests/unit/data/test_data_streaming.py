"""Streaming order: shards split over readers without overlap or loss, shuffled by seed, resumed without reading."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import BROKEN, client_data, make_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from feddra_ds.common.errors import DataError
from feddra_ds.config.schema import DataConfig, StreamingConfig
from feddra_ds.data.format.dataset import Dataset
from feddra_ds.data.loading.client_data import ClientData
from feddra_ds.data.loading.order import EvaluationOrder, Position
from feddra_ds.data.loading.pool import DecodePool
from feddra_ds.data.loading.streaming import StreamingData, build_data
from feddra_ds.data.loading.streaming_order import StreamOrder, shuffle_through_buffer, split_shards


@given(counts=st.lists(st.integers(1, 50), min_size=1, max_size=20), readers=st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_shards_are_split_without_overlap_or_loss(counts: list[int], readers: int) -> None:
    split = split_shards(counts, readers)
    if len(counts) < readers:
        assert split is None
        return
    assert split is not None
    assert sorted(s for own in split for s in own) == list(range(len(counts)))
    loads = [sum(counts[s] for s in own) for own in split]
    assert min(loads) > 0
    assert max(loads) - min(loads) <= max(counts)


@given(n=st.integers(0, 200), size=st.integers(1, 50), seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_the_buffer_loses_nothing_and_reaches_no_further_ahead(n: int, size: int, seed: int) -> None:
    stream = np.arange(n)
    out = shuffle_through_buffer(stream, size, seed)
    assert sorted(out.tolist()) == list(range(n))
    assert all(sample <= place + size - 1 for place, sample in enumerate(out.tolist()))
    assert np.array_equal(out, shuffle_through_buffer(stream, size, seed))


def test_the_buffer_shuffles() -> None:
    stream = np.arange(500)
    assert np.array_equal(shuffle_through_buffer(stream, 1, 0), stream)
    moved = shuffle_through_buffer(stream, 100, 0)
    assert np.abs(moved - stream).mean() > 20
    assert not np.array_equal(moved, shuffle_through_buffer(stream, 100, 1))


SHARDS = np.repeat(np.arange(8), [9, 12, 7, 10, 11, 8, 13, 10])  # 80 samples


def orders(
    num_ranks: int, num_workers: int, batch: int = 8, shard_of: np.ndarray = SHARDS, seed: int = 0
) -> list[StreamOrder]:
    return [
        StreamOrder(seed, "a", shard_of, batch, rank=rank, num_ranks=num_ranks, num_workers=num_workers, buffer=15)
        for rank in range(num_ranks)
    ]


@pytest.mark.parametrize(("num_ranks", "num_workers"), [(1, 1), (2, 2), (4, 2), (8, 1), (2, 8)])
def test_readers_pass_over_the_whole_client_and_overlap_nowhere(num_ranks: int, num_workers: int) -> None:
    """With 16 readers for 8 shards the samples are split instead."""
    seen: dict[tuple[int, int], list[int]] = {}
    for rank, order in enumerate(orders(num_ranks, num_workers)):
        assert (order.split is None) == (num_ranks * num_workers > 8)
        for step in range(80):
            for epoch, sample in order.batch(order.advance(Position(), step)).tolist():
                if epoch == 0:
                    seen.setdefault((rank, step % num_workers), []).append(sample)
    assert sorted(s for own in seen.values() for s in own) == list(range(80))
    if num_ranks * num_workers <= 8:
        owners = [{int(SHARDS[s]) for s in own} for own in seen.values()]
        assert sum(map(len, owners)) == 8


def test_batches_have_the_rank_s_part_without_repeats_and_are_replayable() -> None:
    for order, again in zip(orders(2, 2), orders(2, 2), strict=True):
        long = [order.batch(order.advance(Position(), step)) for step in range(60)]
        assert all(batch.shape == (4, 2) and len(set(batch[:, 1].tolist())) == 4 for batch in long)
        for step in (59, 13, 31):
            assert np.array_equal(again.batch(again.advance(Position(), step)), long[step])


def test_shards_are_read_one_after_the_other() -> None:
    (order,) = orders(1, 1)
    stream = [s for step in range(10) for s in order.batch(order.advance(Position(), step))[:, 1].tolist()]
    middle = {shard: np.mean([i for i, s in enumerate(stream) if SHARDS[s] == shard]) for shard in range(8)}
    turn = sorted(middle, key=middle.get)
    assert turn != list(range(8))
    assert all(middle[later] - middle[earlier] > 10 for earlier, later in zip(turn, turn[2:], strict=False))
    upcoming = order.shards_from(Position(), 2)
    assert upcoming[0] in turn[:2]
    assert len(upcoming) >= 3
    assert order.shards_from(order.advance(Position(), 9), 2) != []


def test_passes_and_seeds_differ() -> None:
    def stream(seed: int, epoch: int) -> list[int]:
        (order,) = orders(1, 1, batch=80, seed=seed)
        return order.batch(Position(epoch, 0))[:, 1].tolist()

    assert len({tuple(stream(0, 0)), tuple(stream(0, 1)), tuple(stream(1, 0))}) == 3


def test_substitutes_come_from_shards_at_hand_first() -> None:
    (order,) = orders(1, 1)
    position = order.advance(Position(), 3)
    own = set(order.batch(position)[:, 1].tolist())
    here = {int(SHARDS[s]) for s in own}
    streams = [list(order.substitutes(position, entry)) for entry in range(8)]
    for stream in streams:
        assert set(stream) == set(range(80))
        assert int(SHARDS[stream[0]]) in here
    assert len({stream[0] for stream in streams} | own) == 16


def test_too_many_readers_are_refused_with_the_counts() -> None:
    message = (
        "data.order: streaming splits client a's 80 pairs over 2 ranks × 32 workers, 1 each, fewer than a rank's 4 of a batch; "
        "use data.order=exact, or lower data.num_workers"
    )
    with pytest.raises(DataError, match=message):
        orders(2, 32)


def test_too_few_shards_are_said(caplog: pytest.LogCaptureFixture) -> None:
    import logging

    logging.getLogger("feddra_ds").propagate = True
    (order,) = orders(1, 2, shard_of=np.zeros(40, dtype=int))
    assert order.split is None
    assert "its 1 shards do not split over 1 ranks × 2 workers, so its 40 samples do" in caplog.text


def test_evaluation_samples_come_from_few_shards() -> None:
    shards = np.repeat(np.arange(50), 20)
    near = EvaluationOrder(0, "a", 1000, 30, 8, shards).samples
    assert len(set(near.tolist())) == 30
    assert len(set(shards[near].tolist())) <= 4
    assert len(set(shards[EvaluationOrder(0, "a", 1000, 30, 8).samples].tolist())) > 15
    assert sorted(EvaluationOrder(0, "a", 1000, None, 8, shards).samples.tolist()) == list(range(1000))


# --- the data --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    wrong = {("a", "train", 4 * n): members for n, members in enumerate(BROKEN.values())}
    return make_dataset(
        tmp_path_factory.mktemp("stream") / "data",
        {"a": {"train": 60, "val": 9}, "b": {"train": 30}},
        wrong,
        max_shard_bytes=20_000,
    )


def streaming(dataset: Dataset, split: str = "train", **kwargs) -> ClientData:
    return client_data(dataset, ["a"], split, kind=StreamingData, **kwargs)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_same_batches_from_threads_processes_and_resumes(dataset: Dataset, num_workers: int) -> None:
    with DecodePool(num_workers, 2) as pool:
        data = streaming(dataset, pool=pool, max_bad_fraction=0.2)
        batches = list(data.batches(Position(), 30))
        assert all(len(set(batch.keys)) == 4 for batch in batches)
        assert data.take_skipped() == dict.fromkeys(sorted(BROKEN), 2), "two passes"
        late = list(streaming(dataset, pool=pool, max_bad_fraction=0.2).batches(data.advance(Position(), 21), 4))
        for one, other in zip(batches[21:], late, strict=False):
            assert one.keys == other.keys
            assert torch.equal(one.pixels, other.pixels)
    counts = Counter(key for batch in batches for key in batch.keys)
    assert set(counts.values()) <= {1, 2, 3, 4}
    assert len(counts) == 56, "all that can be read"


@pytest.mark.parametrize("kind", [ClientData, StreamingData])
def test_workers_never_load_torch(dataset: Dataset, kind: type[ClientData]) -> None:
    with DecodePool(1, 1) as pool:
        next(client_data(dataset, ["a"], pool=pool, kind=kind, max_bad_fraction=0.2).batches(Position(), 1))
        maps = Path(f"/proc/{pool._backend.workers[0].process.pid}/maps").read_text()
    assert "numpy" in maps
    assert "libtorch" not in maps


def test_evaluation_parts_are_the_same_for_any_number_of_ranks(dataset: Dataset) -> None:
    with DecodePool(0, 2) as pool:
        ranks = [(0, 1), (0, 2), (1, 2)]
        data = [streaming(dataset, "val", pool=pool, slot_rank=shard, ranks_per_slot=of) for shard, of in ranks]
        whole, *parts = ([k for b in own.evaluation_batches(None, 2) for k in b.keys] for own in data)
        assert whole == parts[0] + parts[1]
        assert len(set(whole)) == 9


def test_the_config_chooses_the_order(dataset: Dataset) -> None:
    from data_helpers import MEAN, STD

    from feddra_ds.data.loading.tokens import load_tokenizer

    common = {"seed": 0, "tokenizer": load_tokenizer(None), "image_mean": MEAN, "image_std": STD}
    for order, kind in (("exact", ClientData), ("streaming", StreamingData)):
        config = DataConfig(order=order, batch_size=4, image_size=16, text_length=12)
        assert type(build_data(dataset, ["a"], "train", config=config, **common)) is kind


def test_a_large_client_streams_cheaply() -> None:
    """200,000 pairs in 400 shards: a position late in the run is reached in a second or two."""
    shard_of = np.repeat(np.arange(400), 500)
    order = StreamOrder(0, "big", shard_of, 72, rank=1, num_ranks=2, num_workers=2, buffer=1000)
    position = order.advance(Position(), 50_000)
    assert order.batch(position).shape == (36, 2)
    assert order.shards_from(position, 2)


def test_local_roots_take_options_too(tmp_path: Path) -> None:
    make_dataset(tmp_path / "d", {"a": {"train": 8}})
    assert Dataset(tmp_path / "d", options=StreamingConfig(shuffle_buffer=7)).options.shuffle_buffer == 7
