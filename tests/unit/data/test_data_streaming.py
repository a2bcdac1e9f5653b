"""Streaming order: every shard of a rank read once a pass, in webdataset's shuffle, and gone on with in the middle unread."""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
import webdataset
from data_helpers import BROKEN, client_data, make_dataset
from test_data_shards_elsewhere import opened, write_tar

from feddra_ds.common.errors import ConfigError, DataError
from feddra_ds.config.schema import DataConfig, StreamingConfig
from feddra_ds.data.format.dataset import Dataset
from feddra_ds.data.format.stream import Raw, Shards
from feddra_ds.data.loading.client_data import ClientData
from feddra_ds.data.loading.order import Position
from feddra_ds.data.loading.pool import DecodePool
from feddra_ds.data.loading.stream import Stream
from feddra_ds.data.loading.streaming import StreamingData, build_data

SIZES = [9, 12, 7, 10, 11, 8, 13, 10]  # 80 samples


class Told(Shards):
    """Shards without files, which note each reading."""

    read_shards: list[int]

    def read(self, shard, ahead=None):
        self.read_shards.append(shard)
        for number in range(SIZES[shard]):
            yield Raw(f"{shard}-{number}", {})
        self.counts[shard] = SIZES[shard]


def shards(counts: list[int | None] | None = None, num: int = 8) -> Told:
    made = Told("a", "train", [f"{n}.tar" for n in range(num)], counts or [None] * num)
    made.read_shards = []
    return made


def stream(part: Told, *, rank: int = 0, num_ranks: int = 1, seed: int = 0, buffer: int = 15) -> Stream:
    return Stream([part], seed, "a", buffer=buffer, rank=rank, num_ranks=num_ranks)


def keys(source: Stream, size: int, num: int, skip: int = 0) -> list[list[str]]:
    return [[item.raw.key for item in batch] for batch, _ in islice(source.batches(size, skip), num)]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8, 16])
def test_a_pass_of_all_ranks_is_the_client_once(num_ranks: int) -> None:
    """With 16 ranks for 8 shards every rank reads all shards and takes its share of their samples."""
    seen = []
    for rank in range(num_ranks):
        source = stream(shards(), rank=rank, num_ranks=num_ranks)
        assert source.shares_shards == (num_ranks > 8)
        seen.append([item.raw.key for item in source.sample(None)])
    assert sorted(key for own in seen for key in own) == sorted(
        f"{s}-{n}" for s, size in enumerate(SIZES) for n in range(size)
    )
    again = [item.raw.key for item in stream(shards(), rank=0, num_ranks=num_ranks).sample(None)]
    assert again == seen[0]


def test_passes_and_seeds_differ_and_no_key_is_twice_in_a_batch() -> None:
    batches = keys(stream(shards()), 12, 60)
    assert all(len(set(batch)) == 12 for batch in batches)
    counts = Counter(key for batch in batches for key in batch)
    assert set(counts.values()) == {9}, "60 batches of 12 are nine passes of 80"
    assert batches[:6] != batches[20:26], "another pass is another order"
    assert batches != keys(stream(shards(), seed=1), 12, 60)


@pytest.mark.parametrize("buffer", [1, 15, 1000])
@pytest.mark.parametrize("skip", [1, 4, 6, 7, 13, 50])
def test_going_on_gives_the_same_and_reads_no_shard_that_was_consumed(skip: int, buffer: int) -> None:
    whole = keys(stream(shards(), buffer=buffer), 12, skip + 20)
    assert keys(stream(shards(list(SIZES)), buffer=buffer), 12, 20, skip) == whole[skip:]
    just = shards(list(SIZES))
    next(stream(just, buffer=buffer).batches(12, skip))
    if skip <= 4:  # the two batches that are read then are of the first pass too
        taken = Counter(key.split("-")[0] for batch in whole[:skip] for key in batch)
        consumed = {shard for shard in range(8) if taken[str(shard)] == SIZES[shard]}
        assert not consumed & set(just.read_shards)
        assert buffer > 1 or skip < 4 or len(consumed) >= 3
        assert buffer == 1000 or len(set(just.read_shards)) < 8, "what is far ahead is not read either"


@pytest.mark.parametrize("skip", [3, 20, 47])
def test_going_on_in_the_middle_of_a_shard_larger_than_many_batches(skip: int) -> None:
    def large(counts: list[int | None]) -> Shards:
        part = Shards("a", "train", [f"{n}" for n in range(4)], counts)
        part.read = lambda shard, ahead: iter([Raw(f"{shard}-{n}", {}) for n in range(60)])
        return part

    whole = keys(Stream([large([None] * 4)], 0, "a", buffer=10), 4, skip + 30)
    assert keys(Stream([large([60] * 4)], 0, "a", buffer=10), 4, 30, skip) == whole[skip:]


def test_counts_that_are_not_known_are_learned_by_reading() -> None:
    whole = keys(stream(shards()), 12, 30)
    some = shards([9, None, 7, None, None, 8, None, 10])
    assert keys(stream(some), 12, 10, 20) == whole[20:30]
    assert some.counts == SIZES


def test_no_more_is_counted_than_asked_for() -> None:
    part = shards([None, None, 7, *[None] * 5])
    assert part.up_to(20) == 20
    assert part.read_shards == [0, 1]
    assert part.up_to(1000) == 80
    assert shards(list(SIZES)).up_to(20) == 20, "the same whatever is known"


def test_a_shard_that_changed_is_told() -> None:
    with pytest.raises(DataError, match=r"has fewer samples than when it was counted"):
        keys(stream(shards([99, *SIZES[1:]]), buffer=4), 12, 20, 3)


def test_too_few_samples_for_a_batch_are_told() -> None:
    with pytest.raises(DataError, match=r"data.order: streaming gives this rank of client a fewer pairs than its 12"):
        keys(stream(shards(num=1)), 12, 2)


# --- shards elsewhere ------------------------------------------------------------------------------------------------


def elsewhere(tmp_path: Path, **more) -> Dataset:
    options = {"streaming": {"cache_dir": str(tmp_path / "cache"), "shuffle_buffer": 10}, "order": "streaming"}
    return opened(clients={"n": str(tmp_path / "n")}, **options, **more)


def test_no_index_is_made_and_the_samples_are_webdataset_s(tmp_path: Path) -> None:
    for shard in range(4):
        write_tar(tmp_path / "n" / f"{shard:05d}.tar", range(10 * shard, 10 * shard + 10))
    dataset = elsewhere(tmp_path)
    assert dataset.is_uncounted("n")
    theirs = webdataset.WebDataset(str(tmp_path / "n" / "{00000..00003}.tar"), shardshuffle=False)
    with DecodePool() as pool:
        data = client_data(dataset, ["n"], kind=StreamingData, pool=pool, batch_size=8)
        read = [batch.keys for batch in data.batches(Position(), 5)]
        assert sorted(key for batch in read for key in batch) == sorted(one["__key__"] for one in theirs)
        again = client_data(elsewhere(tmp_path), ["n"], kind=StreamingData, pool=pool, batch_size=8)
        position = again.advance(Position(), 2)
        assert [batch.keys for batch in again.batches(position, 3)] == read[2:]
        assert [batch.keys for batch in again.batches(position, 3)] == read[2:], "twice, as a replay does"
    assert not (tmp_path / "cache" / "indexes").exists()
    assert not elsewhere(tmp_path).stream("n", "train").counts.count(None), "the next process knows the counts"


def test_a_shard_of_uids_has_no_sample_and_says_why(tmp_path: Path) -> None:
    write_tar(tmp_path / "n" / "0.tar", range(3), name="1.2.840.{}")
    with pytest.raises(DataError, match=r"0.tar: has no sample of client n: webdataset reads e.g. 1 with 2.840.\d.jpg"):
        elsewhere(tmp_path).num_samples("n", "train")


def test_a_shard_that_is_cut_off_is_an_error_of_its_client(tmp_path: Path) -> None:
    write_tar(tmp_path / "n" / "0.tar", range(30))
    whole = (tmp_path / "n" / "0.tar").stat().st_size
    with open(tmp_path / "n" / "0.tar", "r+b") as file:
        file.truncate(whole // 2)
    with pytest.raises(DataError, match=r"0.tar: cannot be read to its end for client n: "):
        elsewhere(tmp_path).num_samples("n", "train")


def test_val_fraction_is_the_one_of_the_exact_order(tmp_path: Path) -> None:
    write_tar(tmp_path / "n" / "0.tar", range(120), patient=[f"p{n // 2}" for n in range(120)])
    streamed = elsewhere(tmp_path, val_fraction=0.3)
    assert streamed.splits("n") == ["train", "val"]
    exact = opened(
        clients={"n": str(tmp_path / "n")}, val_fraction=0.3, streaming={"cache_dir": str(tmp_path / "other")}
    )
    for split in ("train", "val"):
        assert [raw.key for raw in streamed.stream("n", split).read(0)] == exact.samples("n", split).keys
        assert streamed.num_samples("n", split) == exact.num_samples("n", split)


def test_one_set_split_by_a_field_streams_each_client_its_own(tmp_path: Path, caplog) -> None:
    """The same keys in every shard, some pairs of nobody, one shard of one client alone."""
    hospitals = [["a", "b", "a"], ["b", "a", ""], ["b", "b", "b"]]
    for shard, own in enumerate(hospitals):
        write_tar(tmp_path / "set" / f"{shard:05d}.tar", range(30), hospital=own, patient=[f"p{n}" for n in range(30)])
    options = {"root": str(tmp_path / "set"), "client_field": "hospital", "val_fraction": 0.2}
    options["streaming"] = {"cache_dir": str(tmp_path / "cache"), "shuffle_buffer": 10}
    exact, streamed = opened(**options), opened(**options, order="streaming")
    assert streamed.client_ids == ["a", "b"]
    for client in ("a", "b"):
        for split in ("train", "val"):
            part, shards = exact.samples(client, split), streamed.stream(client, split)
            read = [[raw.text() for raw in shards.read(shard)] for shard in range(len(shards.places))]
            assert [text for own in read for text in own] == [part.read_text(n) for n in range(len(part))]
            assert [len(own) for own in read] == shards.counts
    assert [Path(place).name for place in streamed.stream("a", "train").places] == ["00000.tar", "00001.tar"]
    with DecodePool() as pool:
        data = client_data(streamed, ["a"], kind=StreamingData, pool=pool, batch_size=4)
        whole = [batch.text_ids.tolist() for batch in data.batches(Position(), 14)]
        again = client_data(opened(**options, order="streaming"), ["a"], kind=StreamingData, pool=pool, batch_size=4)
        assert [b.text_ids.tolist() for b in again.batches(again.advance(Position(), 9), 5)] == whole[9:]
    assert "10 pairs have no hospital in their json and are left out" in caplog.text


def test_a_shard_that_webdataset_reads_otherwise_than_its_index_is_told(tmp_path: Path) -> None:
    write_tar(tmp_path / "n" / "0.tar", range(6))
    with tarfile.open(tmp_path / "n" / "0.tar", "a") as out:
        member = tarfile.TarInfo("00002.png")  # apart from the others of its sample
        member.size = 5
        out.addfile(member, io.BytesIO(b"again"))
    dataset = elsewhere(tmp_path)
    dataset.index("n")
    assert not dataset.is_uncounted("n")
    line = r"0.tar: has 7 samples as webdataset reads them, and 6 in its index: .* members of a sample are apart; data.order="
    with pytest.raises(DataError, match=line):
        list(dataset.stream("n", "train").read(0))


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
        assert set(data.take_skipped()) == set(BROKEN)
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
        cut = [[b.keys for b in own.evaluation_batches(None, 2, whole_batches=True)] for own in data]
        assert cut[0] == cut[1] + cut[2], "the same batches, not the same pairs alone"
        assert [len(batches) for batches in cut] == [5, 3, 2]


def test_the_config_chooses_the_order(dataset: Dataset) -> None:
    from data_helpers import MEAN, STD

    from feddra_ds.data.loading.tokens import load_tokenizer

    common = {"seed": 0, "tokenizer": load_tokenizer(None), "image_mean": MEAN, "image_std": STD}
    for order, kind in (("exact", ClientData), ("streaming", StreamingData)):
        config = DataConfig(order=order, batch_size=4, image_size=16, text_length=12)
        assert type(build_data(dataset, ["a"], "train", config=config, **common)) is kind


def test_a_late_place_is_reached_soon() -> None:
    """200,000 pairs were taken of 400 shards."""
    part = Shards("big", "train", [f"{n}" for n in range(400)], [500] * 400)
    part.read = lambda shard, ahead: iter([Raw(f"{shard}-{n}", {}) for n in range(500)])
    source = Stream([part], 0, "big", buffer=1000)
    for batch, _ in islice(source.batches(72, 2700), 5):
        assert len([item.raw.key for item in batch]) == 72


def test_local_roots_take_options_too(tmp_path: Path) -> None:
    make_dataset(tmp_path / "d", {"a": {"train": 8}})
    assert Dataset(tmp_path / "d", options=StreamingConfig(shuffle_buffer=7)).options.shuffle_buffer == 7


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (
            {"center": "samples", "evaluate_on": "train"},
            "dro.center: samples needs all pairs counted, and those of n are not",
        ),
        (
            {"evaluate_on": "val"},
            "dro.evaluate_on: val needs a val split, and client n has none; data.val_fraction makes one",
        ),
    ],
)
def test_what_needs_all_pairs_is_refused_where_they_are_not_counted(
    tmp_path: Path, keys: dict[str, str], line: str
) -> None:
    from feddra_ds.config.load import from_dict
    from feddra_ds.distributed.launch import Launch
    from feddra_ds.run.checks import check

    write_tar(tmp_path / "n" / "0.tar", range(40))
    data = {"clients": {"n": str(tmp_path / "n")}, "order": "streaming", "batch_size": 8}
    run = {"output_dir": str(tmp_path / "run"), "device": "cpu"}
    dro = {"evaluation_batch_size": 4, "evaluation_pairs": 8, **keys}
    config = from_dict({"run": run, "data": data, "evaluation": {"every": 0}, "dro": dro})
    with pytest.raises(ConfigError, match=line):
        check(config, Launch(0, 1, 0, "127.0.0.1", 0))
