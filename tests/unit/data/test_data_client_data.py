"""Batches: the same for any number of ranks and workers, replayable, with bad samples substituted and counted."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from data_helpers import BROKEN, MEAN, STD, client_data, encoded, huge_png, make_dataset

from feddra_ds.common.errors import DataError
from feddra_ds.data.format.dataset import Dataset
from feddra_ds.data.format.samples import text_id
from feddra_ds.data.loading.batch import Batch
from feddra_ds.data.loading.decode import Task
from feddra_ds.data.loading.order import Position
from feddra_ds.data.loading.pool import DecodePool

AUGMENT = {"augment": {"crop_scale": 0.5, "flip": True, "brightness": 0.2}}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    root = tmp_path_factory.mktemp("data") / "data"
    return make_dataset(root, {"a": {"train": 23, "val": 7}, "b": {"train": 9}}, max_shard_bytes=20_000)


@pytest.fixture
def pool():
    with DecodePool(0, 2, timeout_s=30) as pool:
        yield pool


def same(one: Batch, other: Batch) -> bool:
    return one.keys == other.keys and all(
        torch.equal(getattr(one, name), getattr(other, name)) for name in ("pixels", "text_ids")
    )


def test_shapes_dtypes_and_values(dataset: Dataset, pool: DecodePool) -> None:
    (batch,) = client_data(dataset, ["a"], pool=pool).batches(Position(), 1)
    assert (batch.pixels.shape, batch.pixels.dtype) == ((4, 3, 16, 16), torch.uint8)
    assert (batch.pixel_values.shape, batch.pixel_values.dtype) == ((4, 3, 16, 16), torch.float32)
    assert batch.input_ids.shape == batch.attention_mask.shape == (4, 8)
    assert (batch.input_ids.dtype, batch.attention_mask.dtype, batch.text_ids.dtype) == (torch.int64,) * 3
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in (MEAN, STD))
    torch.testing.assert_close(batch.pixel_values, (batch.pixels / 255 - mean) / std)
    for key, number in zip(batch.keys, batch.text_ids.tolist(), strict=True):
        assert number == text_id(f"report {int(key[5:])} of a")
    assert torch.equal(batch.attention_mask.sum(1), torch.full((4,), 6))  # [CLS] report N of a [SEP]


def test_slicing_and_moving_keep_the_fields_together(dataset: Dataset, pool: DecodePool) -> None:
    (batch,) = client_data(dataset, ["a"], pool=pool).batches(Position(), 1)
    part = batch[1:3]
    assert (len(batch), len(part), part.keys) == (4, 2, batch.keys[1:3])
    assert torch.equal(part.pixel_values, batch.pixel_values[1:3])
    assert same(batch.to("cpu"), batch)
    assert batch.to("meta").pixel_values.device.type == "meta"


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("ranks_per_slot", [1, 2, 4])
def test_ranks_and_workers_change_nothing(dataset: Dataset, num_workers: int, ranks_per_slot: int) -> None:
    with DecodePool(0, 1) as one, DecodePool(num_workers, 2) as many:
        whole = list(client_data(dataset, ["a"], pool=one, **AUGMENT).batches(Position(), 14))
        parts = [
            list(
                client_data(
                    dataset, ["a"], pool=many, slot_rank=slot_rank, ranks_per_slot=ranks_per_slot, **AUGMENT
                ).batches(Position(), 14)
            )
            for slot_rank in range(ranks_per_slot)
        ]
    for step, batch in enumerate(whole):
        assert [key for part in parts for key in part[step].keys] == batch.keys
        assert torch.equal(torch.cat([part[step].pixels for part in parts]), batch.pixels)
        assert torch.equal(torch.cat([part[step].text_ids for part in parts]), batch.text_ids)


def test_replay_and_resume_are_exact(dataset: Dataset, pool: DecodePool) -> None:
    data = client_data(dataset, ["a"], pool=pool, **AUGMENT)
    long = list(data.batches(Position(), 12))
    assert all(map(same, long, data.batches(Position(), 12)))
    middle = data.advance(Position(), 7)
    fresh = client_data(dataset, ["a"], pool=pool, **AUGMENT)
    assert all(map(same, long[7:], fresh.batches(middle, 5)))


def test_augmentation_differs_between_epochs_seeds_and_clients(dataset: Dataset, pool: DecodePool) -> None:
    def pixels(seed: int, epoch: int) -> dict[str, torch.Tensor]:
        data = client_data(dataset, ["b"], pool=pool, seed=seed, batch_size=9, **AUGMENT)
        (batch,) = data.batches(Position(epoch, 0), 1)
        return dict(zip(batch.keys, batch.pixels, strict=True))

    first, later, other = pixels(0, 0), pixels(0, 1), pixels(1, 0)
    assert set(first) == set(later) == set(other)
    assert all(not torch.equal(first[key], later[key]) for key in first)
    assert all(not torch.equal(first[key], other[key]) for key in first)


def test_prefetch_gives_the_same_batches_and_forgets_what_nobody_wants(dataset: Dataset, pool: DecodePool) -> None:
    data = client_data(dataset, ["a"], pool=pool)
    plain = list(data.batches(Position(1, 0), 3))
    data.prefetch(Position(), 5)
    data.prefetch(Position(1, 0), 5)
    assert len(data._ahead) == pool.depth
    assert all(map(same, plain, data.batches(Position(1, 0), 3)))
    assert not data._ahead


def test_a_stream_that_is_left_early_leaves_the_pool_usable(dataset: Dataset, pool: DecodePool) -> None:
    data = client_data(dataset, ["a"], pool=pool)
    for _ in data.batches(Position(), 10):
        break
    assert len(list(data.batches(Position(), 2))) == 2


def test_clients_share_what_tokenizes_their_texts(dataset: Dataset, pool: DecodePool) -> None:
    one, other = (client_data(dataset, [client], pool=pool) for client in ("a", "b"))
    for data in (one, other):
        next(iter(data.batches(Position(0, 0), 1)))
    assert one.source._decoder.tokenizer is other.source._decoder.tokenizer
    in_a_worker = [pickle.loads(pickle.dumps(data.source)) for data in (one, other)]
    assert in_a_worker[0].tokenizer is in_a_worker[1].tokenizer


def test_pooled_clients_are_one_owner(dataset: Dataset, pool: DecodePool) -> None:
    data = client_data(dataset, ["a", "b"], pool=pool, batch_size=8)
    assert data.num_samples == 32
    keys = [key for batch in data.batches(Position(), 4) for key in batch.keys]
    assert len(set(keys)) == 32
    assert sum(key.startswith("b/") for key in keys) == 9


def test_too_few_pairs_and_missing_splits_are_refused(dataset: Dataset, pool: DecodePool) -> None:
    with pytest.raises(ValueError, match="client b has 9 pairs, less than a batch of 12"):
        client_data(dataset, ["b"], pool=pool, batch_size=12)
    with pytest.raises(DataError, match="client b has no val split; it has train"):
        client_data(dataset, ["b"], "val", pool=pool)


@pytest.mark.parametrize("num_pairs", [None, 10, 7, 3])
@pytest.mark.parametrize("ranks_per_slot", [1, 2, 3, 4])
def test_evaluation_is_a_fixed_sample_in_contiguous_parts(
    dataset: Dataset, pool: DecodePool, num_pairs, ranks_per_slot
) -> None:
    kwargs = {"pool": pool, "batch_size": 12, **AUGMENT}
    whole = [k for b in client_data(dataset, ["a"], **kwargs).evaluation_batches(num_pairs, 4) for k in b.keys]
    size = client_data(dataset, ["a"], **kwargs).evaluation_size(num_pairs)
    assert len(set(whole)) == len(whole) == size == (23 if num_pairs is None else num_pairs)
    per_rank = -(-size // ranks_per_slot)
    for slot_rank in range(ranks_per_slot):
        data = client_data(dataset, ["a"], slot_rank=slot_rank, ranks_per_slot=ranks_per_slot, **kwargs)
        batches = list(data.evaluation_batches(num_pairs, 4, seed=7))
        assert [k for b in batches for k in b.keys] == whole[slot_rank * per_rank : (slot_rank + 1) * per_rank]
        assert all(len(batch) == 4 for batch in batches[:-1])


def test_evaluation_is_cut_between_batches_where_it_is_asked_to(dataset: Dataset, pool: DecodePool) -> None:
    batches = [
        [
            b.keys
            for rank in range(ranks)
            for b in client_data(
                dataset, ["a"], pool=pool, batch_size=12, slot_rank=rank, ranks_per_slot=ranks
            ).evaluation_batches(None, 4, whole_batches=True)
        ]
        for ranks in (1, 2, 4)
    ]
    assert batches[0] == batches[1] == batches[2]


def test_evaluation_is_not_augmented(dataset: Dataset, pool: DecodePool) -> None:
    plain = list(
        client_data(dataset, ["a"], pool=pool, augment={"crop_scale": 1.0, "brightness": 0}).evaluation_batches(8, 8)
    )
    augmented = list(client_data(dataset, ["a"], pool=pool, **AUGMENT).evaluation_batches(8, 8))
    assert all(map(same, plain, augmented))


# --- bad samples -----------------------------------------------------------------------------------------------------


def broken_dataset(root: Path, count: int = 40) -> Dataset:
    wrong = {
        **{("a", "train", 3 + 5 * n): members for n, members in enumerate(BROKEN.values())},
        ("a", "train", 30): {"image": encoded(30)[:150]},
        ("a", "train", 31): {"image": huge_png(), "suffix": "png"},
        ("a", "val", 1): {"text": ""},
    }
    dataset = make_dataset(root, {"a": {"train": count, "val": 6}}, wrong)
    raw = root / "a" / "train-000000.tar"  # a text that is not UTF-8
    samples = dataset.samples("a", "train")
    with raw.open("r+b") as file:
        file.seek(int(samples.text[35, 0]))
        file.write(b"\xff\xfe")
    return dataset


EXPECTED = {
    "missing_image": 1,
    "corrupt_image": 2,
    "missing_text": 1,
    "empty_text": 1,
    "oversized_image": 1,
    "corrupt_text": 1,
}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_samples_are_replaced_and_counted_by_reason(tmp_path: Path, num_workers: int) -> None:
    dataset = broken_dataset(tmp_path / "data")
    with DecodePool(num_workers, 2) as pool:
        data = client_data(dataset, ["a"], pool=pool, max_bad_fraction=0.2)
        epoch = list(data.batches(Position(), 10))
        keys = [key for batch in epoch for key in batch.keys]
        assert len(keys) == 40
        wrong = {f"train{n:04d}" for n in (3, 8, 13, 18, 30, 31, 35)}
        assert not wrong & set(keys)
        assert all(len(set(batch.keys)) == 4 for batch in epoch), "no pair twice in a batch"
        assert data.take_skipped() == EXPECTED
        assert data.take_skipped() == {}
        list(data.batches(Position(), 10))
        list(data.batches(Position(), 10))
        assert data.take_skipped() == EXPECTED, "a replay counts once"


def test_substitutes_depend_on_the_position_alone(tmp_path: Path) -> None:
    dataset = broken_dataset(tmp_path / "data")
    with DecodePool(0, 2) as pool:
        kwargs = {"pool": pool, "max_bad_fraction": 0.2, "batch_size": 8, **AUGMENT}
        whole = list(client_data(dataset, ["a"], **kwargs).batches(Position(), 10))
        late = list(client_data(dataset, ["a"], **kwargs).batches(Position(1, 2), 3))
        assert all(map(same, whole[7:], late))
        parts = [
            list(client_data(dataset, ["a"], slot_rank=s, ranks_per_slot=4, **kwargs).batches(Position(), 10))
            for s in range(4)
        ]
        for step, batch in enumerate(whole):
            assert [key for part in parts for key in part[step].keys] == batch.keys


def test_evaluation_keeps_its_size_over_bad_samples(tmp_path: Path) -> None:
    dataset = broken_dataset(tmp_path / "data")
    with DecodePool(0, 2) as pool:
        data = client_data(dataset, ["a"], "val", pool=pool)
        keys = [key for batch in data.evaluation_batches(None, 2) for key in batch.keys]
        assert len(keys) == 6
        assert "val0001" not in keys
        assert data.take_skipped() == {"empty_text": 1}
        train = client_data(dataset, ["a"], pool=pool, max_bad_fraction=0.2)
        keys = [key for batch in train.evaluation_batches(20, 4) for key in batch.keys]
        assert len(set(keys)) == 20, "stand-ins come from outside the sample"


def test_too_many_bad_samples_stop_the_run_with_names_and_counts(tmp_path: Path) -> None:
    dataset = broken_dataset(tmp_path / "data")
    with DecodePool(0, 2) as pool:
        data = client_data(dataset, ["a"], pool=pool, max_bad_fraction=0.1)
        with pytest.raises(
            DataError, match=r"data.max_bad_fraction: client a: 5 of its 40 train samples are unreadable .* 10.0%"
        ):
            list(data.batches(Position(), 10))
        strict = client_data(dataset, ["a"], "val", pool=pool, max_bad_fraction=0.0)
        with pytest.raises(
            DataError, match=r"1 of its 6 val samples are unreadable \(empty_text: 1\), more than 0.0%; e.g. val0001"
        ):
            list(strict.evaluation_batches(None, 2))


def test_a_client_without_one_good_sample_ends_at_once(tmp_path: Path) -> None:
    wrong = {("a", "train", n): {"image": b"x"} for n in range(6)}
    dataset = make_dataset(tmp_path / "data", {"a": {"train": 6}}, wrong)
    with (
        DecodePool(0, 2) as pool,
        pytest.raises(DataError, match=r"client a: 6 samples in a row are unreadable, the first is train"),
    ):
        list(client_data(dataset, ["a"], pool=pool, max_bad_fraction=1.0).batches(Position(), 1))


def test_a_shard_cut_off_after_the_checks_is_counted(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "data", {"a": {"train": 12}})
    samples = dataset.samples("a", "train")
    os.truncate(samples.paths[0], int(samples.text[10, 0]))
    with DecodePool(0, 2) as pool:
        data = client_data(dataset, ["a"], pool=pool, max_bad_fraction=0.5)
        keys = [key for batch in data.batches(Position(), 3) for key in batch.keys]
        assert not {"train0010", "train0011"} & set(keys)
        assert data.take_skipped() == {"truncated_shard": 2}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shard_that_vanishes_is_an_error_with_its_name(tmp_path: Path, num_workers: int) -> None:
    dataset = make_dataset(tmp_path / "data", {"a": {"train": 12}})
    path = Path(dataset.samples("a", "train").paths[0])
    path.unlink()
    message = rf"{path}: cannot be read for client a: No such file"
    with DecodePool(num_workers, 2) as pool, pytest.raises(DataError, match=message):
        list(client_data(dataset, ["a"], pool=pool).batches(Position(), 3))


# --- the pool --------------------------------------------------------------------------------------------------------


def test_a_killed_worker_is_named_and_nobody_waits(dataset: Dataset) -> None:
    with DecodePool(1, 2, timeout_s=30) as pool:
        data = client_data(dataset, ["a"], pool=pool)
        stream = data.batches(Position(), 1000)
        next(stream)
        pool._backend.workers[0].process.send_signal(signal.SIGKILL)
        start = time.monotonic()
        with pytest.raises(DataError, match=r"data worker 0 \(process \d+\) died \(killed by signal 9\)"):
            for _ in stream:
                pass
        assert time.monotonic() - start < 15
        with pytest.raises(DataError, match="died"):
            pool.submit(data.source, Task(0, 4, position=Position()))


def test_waiting_has_a_bound(dataset: Dataset) -> None:
    with DecodePool(1, 1, timeout_s=0.5) as pool:
        data = client_data(dataset, ["a"], pool=pool)
        pool.submit(data.source, Task(0, 4, position=Position())).result(30)
        pool._backend.workers[0].process.send_signal(signal.SIGSTOP)
        with pytest.raises(DataError, match=r"client a: no batch within 0 s \(epoch 0 step 0\)"):
            next(data.batches(Position(), 1))


def test_a_failure_inside_a_worker_comes_back_with_its_traceback(dataset: Dataset) -> None:
    with DecodePool(1, 1) as pool:
        data = client_data(dataset, ["a"], pool=pool)
        with pytest.raises(DataError, match=r"(?s)client a epoch 0 step 0: a data worker failed:.*ValueError"):
            pool.submit(data.source, Task(3, 2, position=Position())).result(60)


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


def test_workers_end_with_the_pool_and_ignore_ctrl_c(dataset: Dataset) -> None:
    pool = DecodePool(2, 1)
    data = client_data(dataset, ["a"], pool=pool)
    assert len(list(data.batches(Position(), 2))) == 2
    pids = [worker.process.pid for worker in pool._backend.workers]
    for pid in pids:
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
    assert len(list(data.batches(Position(), 2))) == 2
    pool.close()
    assert not any(alive(pid) for pid in pids)


def test_workers_end_when_their_parent_is_killed(dataset: Dataset) -> None:
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[2])\n"
        "from data_helpers import client_data\n"
        "from feddra_ds.data.loading.order import Position\n"
        "from feddra_ds.data.loading.pool import DecodePool\n"
        "from feddra_ds.data.format.dataset import Dataset\n"
        "pool = DecodePool(2, 1)\n"
        "data = client_data(Dataset(sys.argv[1]), ['a'], pool=pool)\n"
        "list(data.batches(Position(), 2))\n"
        "print(*[w.process.pid for w in pool._backend.workers], flush=True)\n"
        "time.sleep(600)\n"
    )
    helpers = str(Path(__file__).parents[1])
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(dataset.root), helpers], stdout=subprocess.PIPE, text=True
    )
    try:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert all(alive(pid) for pid in pids)
    finally:
        parent.kill()
        parent.wait(10)
        parent.stdout.close()
    assert wait_until(lambda: not any(alive(pid) for pid in pids), 15)


def test_workers_know_no_torch() -> None:
    heavy = "('torch', 'transformers', 'deepspeed')"
    code = f"import sys, feddra_ds.data.loading.pool; sys.exit(any(m in sys.modules for m in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_the_calling_process_does_not_grow_with_use(dataset: Dataset, pool: DecodePool) -> None:
    data = client_data(dataset, ["a"], pool=pool)
    for _ in data.batches(Position(), 200):
        pass
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        list(client_data(dataset, ["a"], pool=pool).batches(Position(), 3))
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 8
