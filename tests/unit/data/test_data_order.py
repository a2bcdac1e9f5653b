"""The order of samples: every epoch whole, straddling batches without repeats, resumable, the same for ever."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feddra_ds.data.loading.order import EvaluationOrder, Order, Position, permutation, seeded

SIZES = [(4, 4), (5, 4), (7, 4), (8, 4), (9, 4), (23, 4), (64, 8), (100, 33), (12, 1), (1, 1)]


def walk(order: Order, steps: int, start: Position = Position()) -> list[np.ndarray]:  # noqa: B008
    return [order.batch(order.advance(start, step)) for step in range(steps)]


@pytest.mark.parametrize(("n", "batch"), SIZES)
def test_every_epoch_gives_every_sample_once(n: int, batch: int) -> None:
    order = Order(3, "a", n, batch)
    epochs = 6
    taken = np.concatenate(walk(order, epochs * n // batch))
    for epoch in range(epochs - 1):
        samples = taken[taken[:, 0] == epoch][:, 1]
        assert sorted(samples.tolist()) == list(range(n)), f"epoch {epoch}"


@given(n=st.integers(1, 60), batch=st.integers(1, 30), seed=st.integers(0, 5), skip=st.integers(0, 200))
@settings(max_examples=60, deadline=None)
def test_batches_are_full_and_repeat_no_pair(n: int, batch: int, seed: int, skip: int) -> None:
    batch = min(n, batch)
    order = Order(seed, "c", n, batch)
    for entries in walk(order, 12, order.advance(Position(), skip)):
        assert entries.shape == (batch, 2)
        assert len(set(entries[:, 1].tolist())) == batch


@pytest.mark.parametrize(("n", "batch"), SIZES)
def test_any_position_can_be_reached_directly(n: int, batch: int) -> None:
    """A fresh process at a late position gives what a long run gives there."""
    long_run = Order(1, "a", n, batch)
    entries = walk(long_run, 40)
    for step in (0, 7, 23, 39):
        position = Order(1, "a", n, batch).advance(Position(), step)
        assert np.array_equal(Order(1, "a", n, batch).batch(position), entries[step])
        restored = Position(**json.loads(json.dumps(position.to_dict())))
        assert np.array_equal(long_run.batch(restored), entries[step])


def test_advance_composes_and_names_positions_where_batches_start() -> None:
    order = Order(0, "a", 10, 4)
    assert [order.steps(epoch) for epoch in range(4)] == [2, 3, 2, 3]
    assert [order.advance(Position(), k) for k in range(6)] == [
        Position(0, 0), Position(0, 1), Position(1, 0), Position(1, 1), Position(1, 2), Position(2, 0),
    ]  # fmt: skip
    assert order.advance(order.advance(Position(), 3), 9) == order.advance(Position(), 12)


def test_the_tail_of_an_epoch_comes_first_in_the_next() -> None:
    order = Order(5, "a", 10, 4)
    straddling = order.batch(Position(1, 0))
    assert straddling[:, 0].tolist() == [0, 0, 1, 1]
    first = np.concatenate([order.batch(Position(0, s)) for s in range(2)])
    assert set(straddling[:2, 1]) == set(range(10)) - set(first[:, 1])


def test_seed_client_and_epoch_change_the_order() -> None:
    def first(seed: int, client: str, epoch: int) -> list[int]:
        return Order(seed, client, 50, 50).batch(Position(epoch, 0))[:, 1].tolist()

    orders = [first(0, "a", 0), first(1, "a", 0), first(0, "b", 0), first(0, "a", 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_the_order_is_pinned() -> None:
    """A change here would break the resume of every run that exists."""
    assert permutation(8, "epoch", 0, "a", 0).tolist() == [4, 2, 0, 7, 5, 3, 6, 1]
    assert seeded("x", 1, "y").hex()[:16] == "e99606de33195d51"


def test_a_client_smaller_than_a_batch_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"data.batch_size: client small has 3 pairs, less than a batch of 4"):
        Order(0, "small", 3, 4)


def test_substitutes_reach_everyone_and_entries_do_not_collide() -> None:
    order = Order(0, "a", 30, 4)
    position = Position(0, 2)
    own = set(order.batch(position)[:, 1].tolist())
    streams = [list(order.substitutes(position, entry)) for entry in range(4)]
    for stream in streams:
        assert set(stream) == set(range(30))
    heads = [stream[k] for stream in streams for k in range(5)]
    assert not set(heads) & own
    assert len(set(heads)) == len(heads)
    assert streams == [list(Order(0, "a", 30, 4).substitutes(position, entry)) for entry in range(4)]


def test_substitutes_of_the_smallest_clients() -> None:
    assert set(Order(0, "a", 4, 4).substitutes(Position(), 1)) == {0, 1, 2, 3}
    assert set(Order(0, "a", 1, 1).substitutes(Position(), 0)) == {0}


def test_evaluation_sample_is_fixed_without_repeats_and_nested() -> None:
    small, large = (EvaluationOrder(0, "a", 40, pairs, 8).samples.tolist() for pairs in (10, 20))
    assert len(set(large)) == 20
    assert large[:10] == small
    assert sorted(EvaluationOrder(0, "a", 40, None, 8).samples.tolist()) == list(range(40))
    assert EvaluationOrder(0, "a", 40, 100, 8).size == 40
    assert EvaluationOrder(1, "a", 40, 10, 8).samples.tolist() != small


def test_evaluation_substitutes_are_outside_the_list_or_else_outside_the_batch() -> None:
    part = EvaluationOrder(0, "a", 40, 10, 4)
    heads = [next(part.substitutes(entry)) for entry in range(10)]
    assert not set(heads) & set(part.samples.tolist())
    assert len(set(heads)) == 10
    whole = EvaluationOrder(0, "a", 12, None, 4)
    for entry in range(12):
        batch = whole.samples[entry // 4 * 4 : entry // 4 * 4 + 4].tolist()
        assert next(whole.substitutes(entry)) not in batch


def test_a_large_client_is_affordable() -> None:
    """300,000 pairs at a late epoch: one permutation, not one per epoch so far."""
    order = Order(0, "big", 300_000, 72)
    assert len(order.batch(Position(5000, 17))) == 72
    counts = Counter(order.batch(Position(5000, 17))[:, 0].tolist())
    assert counts == {5000: 72}
