"""Orders: complete, disjoint, the same for any number of ranks, resumable."""

import numpy as np
import pytest

from dense_ssl.config import UserError
from dense_ssl.loaders.order import Order, SequentialOrder


def test_an_epoch_is_a_permutation_but_for_the_dropped_tail():
    order = Order(103, 10, seed=3)
    seen = order.epoch(0).ravel()
    assert order.steps_per_epoch == 10
    assert len(seen) == 100
    assert len(np.unique(seen)) == 100
    assert seen.dtype == np.int64
    assert 0 <= seen.min() <= seen.max() < 103
    dropped = {e: set(range(103)) - set(order.epoch(e).ravel().tolist()) for e in range(3)}
    assert dropped[0] != dropped[1] != dropped[2]


def test_epochs_and_seeds_shuffle_differently_and_repeatably():
    a, b, c = Order(500, 10).epoch(0), Order(500, 10).epoch(1), Order(500, 10, seed=1).epoch(0)
    assert (a == Order(500, 10).epoch(0)).all()
    # A random permutation has one fixed point on average.
    assert (a == b).sum() < 10
    assert (a == c).sum() < 10
    assert (np.sort(a.ravel()) == a.ravel()).sum() < 20


@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (2, 4)])
def test_a_global_batch_holds_the_same_records_however_it_is_divided(world, accumulate):
    whole = Order(200, 16).epoch(5).reshape(-1, 16)
    ranks = [Order(200, 16, world, rank, accumulate).epoch(5) for rank in range(world)]
    shape = (12, accumulate, 16 // world // accumulate)
    assert {part.shape for part in ranks} == {shape}
    together = np.stack(ranks, axis=2).reshape(12, 16)  # [steps, accumulate, world, micro-batch]
    np.testing.assert_array_equal(together, whole)


def test_the_rest_of_an_epoch_is_its_tail():
    order = Order(100, 8, world_size=2, rank=1, accumulate=2)
    whole, rest = order.batches(2), order.batches(2, start_step=7)
    assert len(whole) == 2 * order.steps_per_epoch
    assert len(rest) == len(whole) - 2 * 7
    np.testing.assert_array_equal(rest, whole[2 * 7 :])
    assert len(order.batches(2, start_step=order.steps_per_epoch)) == 0


@pytest.mark.parametrize("world", [1, 3])
def test_sequential_order_shows_every_record_once_and_the_last_batch_as_it_is(world):
    ranks = [SequentialOrder(50, 8, world, rank) for rank in range(world)]
    batches = [order.batches(epoch=9) for order in ranks]
    assert sorted(np.concatenate([b for part in batches for b in part]).tolist()) == list(range(50))
    for order, part in zip(ranks, batches):
        assert len(part) == order.steps_per_epoch
        assert [len(batch) for batch in part[:-1]] == [8] * (len(part) - 1)
        assert 1 <= len(part[-1]) <= 8
        np.testing.assert_array_equal(order.batches(0, start_step=1)[0], part[1])


def test_what_does_not_divide_is_refused():
    with pytest.raises(UserError, match=r"50 images.*train\.batch_size=64"):
        Order(50, 64)
    with pytest.raises(UserError, match="12 does not divide among 2 ranks x 4 micro-batches"):
        Order(50, 12, world_size=2, accumulate=4)
