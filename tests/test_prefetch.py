"""The thread that is one batch ahead: order, waiting time, errors, and a clean end."""

import threading
import time
import traceback
from types import SimpleNamespace

import pytest
import torch

from dense_ssl.config import GaveUp, UserError
from dense_ssl.crops import Crops, MultiCropBatch
from dense_ssl.loaders import prefetch
from dense_ssl.loaders.prefetch import Prefetcher

CPU = torch.device("cpu")


def numbered(number, size=8):
    images = torch.full((2, 3, 3, size, size), number, dtype=torch.uint8)
    crops = Crops(images, torch.full((2, 3, 4), float(number)), torch.zeros(2, 3, dtype=torch.bool))
    return MultiCropBatch({"v": crops}, torch.full((3,), number), torch.full((3,), -number))


def batches(count, delay=0.0, closed=None):
    try:
        for number in range(count):
            time.sleep(delay)
            yield numbered(number)
    finally:
        if closed is not None:
            closed.append(True)


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_same_batches_in_the_same_order():
    given = list(batches(7))
    with Prefetcher(iter(given), CPU) as ready:
        got = list(ready)
    assert len(got) == 7
    assert all(ours is theirs for ours, theirs in zip(got, given))
    assert not prefetch_threads()


def test_it_stays_at_its_end():
    ready = Prefetcher(batches(1), CPU)
    next(ready)
    for _ in range(3):
        with pytest.raises(StopIteration):
            next(ready)
    assert list(Prefetcher(iter(()), CPU)) == []


def test_it_runs_ahead_by_a_bounded_number():
    made = []

    def noting():
        for number in range(10):
            made.append(number)
            yield numbered(number)

    with Prefetcher(noting(), CPU) as ready:
        next(ready)
        deadline = time.monotonic() + 60
        while len(made) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert made == [0, 1, 2]  # one used, one ready, one waiting to be handed over


def test_waiting_is_counted_and_working_is_not(monkeypatch):
    times = iter([0, 1, 20, 22, 40, 40, 60, 65])  # before and after each wait; steps lie between
    clock = SimpleNamespace(perf_counter=lambda: next(times))
    monkeypatch.setattr(prefetch, "time", clock)
    with Prefetcher(batches(3), CPU) as ready:
        assert len(list(ready)) == 3
        assert ready.wait_s == 1 + 2 + 0 + 5


def test_an_error_keeps_its_type_and_traceback():
    def broken_loader():
        yield numbered(0)
        raise UserError("record 7 is unreadable")

    ready = Prefetcher(broken_loader(), CPU)
    next(ready)
    with pytest.raises(UserError, match="record 7") as caught:
        next(ready)
    assert "broken_loader" in "".join(traceback.format_tb(caught.value.__traceback__))
    assert not prefetch_threads()
    with pytest.raises(StopIteration):
        next(ready)


@pytest.mark.parametrize("used", [0, 1, 3])
def test_leaving_early_ends_the_thread_and_closes_the_loader(used):
    closed = []
    with Prefetcher(batches(100, closed=closed), CPU) as ready:
        for _ in range(used):
            next(ready)
    assert closed == [True] or used == 0
    assert not prefetch_threads()
    ready.close()  # closing twice is harmless


def test_an_error_of_the_user_closes_it_too():
    closed = []
    with pytest.raises(KeyError), Prefetcher(batches(100, closed=closed), CPU) as ready:
        next(ready)
        raise KeyError
    assert closed == [True]
    assert not prefetch_threads()


@pytest.mark.parametrize("failures", [1, 2])
def test_a_batch_without_room_waits_for_the_step_to_end(monkeypatch, failures):
    send, tried, at_work = prefetch._send, [], []

    def short_of_memory(batch, *where):
        tried.append(batch)
        if 1 < len(tried) <= 1 + failures:
            at_work.append(ready._asked.is_set())
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return send(batch, *where)

    monkeypatch.setattr(prefetch, "_send", short_of_memory)
    with Prefetcher(batches(3), CPU) as ready:
        assert int(next(ready).index[0]) == 0
        while len(tried) < 2:  # the step on it runs
            time.sleep(0.001)
        if failures == 1:
            assert [int(batch.index[0]) for batch in ready] == [1, 2]
        else:
            with pytest.raises(
                UserError, match=r"CUDA out of memory\): take a smaller train.micro"
            ):
                next(ready)
            assert at_work[1]  # nothing was left to wait for


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_arrive_on_the_gpu_intact():
    device = torch.device("cuda")
    with Prefetcher((numbered(n % 200, size=224) for n in range(40)), device) as ready:
        for number, batch in enumerate(ready):
            crops = batch.views["v"]
            assert crops.images.is_cuda
            assert crops.boxes.is_cuda
            assert not batch.index.is_cuda
            total = crops.images.sum(dtype=torch.int64)
            del batch, crops
            torch.empty(2**22, device=device).fill_(
                1
            )  # memory given out again too early shows here
            assert total.item() == (number % 200) * 2 * 3 * 3 * 224 * 224


def test_a_batch_that_does_not_come_is_given_up():
    answer = threading.Event()

    def hanging():
        yield numbered(0)
        answer.wait()

    with Prefetcher(hanging(), CPU, patience_s=0.2) as ready:
        next(ready)
        with pytest.raises(GaveUp, match="no batch for 0 s .*run.stall_minutes"):
            next(ready)
        with pytest.raises(StopIteration):
            next(ready)
    answer.set()  # closing has not waited for it
