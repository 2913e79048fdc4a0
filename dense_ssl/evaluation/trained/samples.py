"""Training samples batch after batch, from any step of a run on: each a pure function of its key.

Order and draws are keyed by (seed, epoch, image): neither workers nor a resumed job change what is seen.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from os import getpid
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from dense_ssl.config import UserError
from dense_ssl.distributed import rank, world_size
from dense_ssl.evaluation.omissions import Omissions
from dense_ssl.evaluation.trained.draws import Draws
from dense_ssl.evaluation.trained.settings import TrainedSettings
from dense_ssl.loaders import share_of_cores
from dense_ssl.loaders.order import Order
from dense_ssl.loaders.workers import end_with, worker_context
from dense_ssl.rng import fold_np, key_of

T = TypeVar("T")
I = TypeVar("I")  # noqa: E741  (what an image is known by)
I_contra = TypeVar("I_contra", contravariant=True)
T_co = TypeVar("T_co", covariant=True)
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


class Show(Protocol[I_contra, T_co]):
    """Makes the sample of an image; raises one of UNREADABLE where the image cannot be read."""

    def __call__(self, item: I_contra, draws: Draws, /) -> T_co: ...  # noqa: D102


class TrainingSamples(Generic[I, T]):
    """Batches of this rank; images beyond whole batches wait for another epoch."""

    def __init__(
        self,
        items: Sequence[I],
        show: Show[I, T],
        config: TrainedSettings,
        omitted: Omissions,
        *,
        stream: int,
    ) -> None:
        """Take the images as they are; those that cannot be decoded are replaced by the next one.

        Args:
            items: an image each, named by `str`. Each is sent to a worker process when it is its turn: no
                worker holds all annotations.
            show: makes a sample; it is sent to worker processes.
            config: batch size, accumulation, seed and workers.
            omitted: told of files that cannot be read, each once.
            stream: branch of the random numbers of a seed.

        Raises:
            UserError: the batch does not divide among ranks and micro-batches, or exceeds the images.
        """
        if len(items) < config.batch_size:
            raise UserError(
                f"train: {len(items)} images make no batch of {config.batch_size}; lower batch_size"
            )
        shares = world_size() * config.accumulate
        if config.batch_size % shares:
            raise UserError(
                f"batch_size={config.batch_size} is not a multiple of {shares}, as it must be"
            )
        self._items, self._config, self._omitted, self._stream = items, config, omitted, stream
        self._lost: set[int] = set()
        self._order = Order(
            len(items),
            config.batch_size,
            world_size=world_size(),
            rank=rank(),
            accumulate=config.accumulate,
            seed=config.seed,
        )
        self._made = _Made(show)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of the optimiser per epoch."""
        return self._order.steps_per_epoch

    @property
    def micro_batch(self) -> int:
        """Samples in one batch of this rank."""
        return self._order.micro_batch

    def batches(self, start: int, stop: int) -> Iterator[list[T]]:
        """Yield the micro-batches of the steps from `start` up to `stop`, `accumulate` of each.

        Raises:
            UserError: no image can be decoded any more.
        """
        workers = share_of_cores() if self._config.workers is None else self._config.workers
        loader = DataLoader(
            self._made,
            batch_sampler=_Tasks(
                self._order, self._items, (self._config.seed, self._stream), start, stop
            ),
            num_workers=workers,
            collate_fn=_collate,
            multiprocessing_context=worker_context() if workers else None,
            worker_init_fn=partial(end_with, getpid()),
        )
        for batch in loader:
            yield [
                self._instead(record, sample) if isinstance(sample, str) else sample
                for record, sample in batch
            ]

    def _instead(self, record: "_Record", reason: str) -> T:
        """The sample of the next image that can be decoded."""
        for step in range(1, len(self._items) + 1):
            if record.number not in self._lost:
                self._lost.add(record.number)
                name = str(self._items[record.number])
                self._omitted.add("train: image not readable", f"{name}: {reason}")
            if step == len(self._items):
                break
            number = (record.number + 1) % len(self._items)
            record = _Record(number, record.key, self._items[number])
            shown = self._made[record][1]
            if not isinstance(shown, str):
                return shown
            reason = shown
        raise UserError(f"train: none of {len(self._items)} images can be decoded")


class _Record(NamedTuple):
    """One sample to make."""

    number: int  # of the image
    key: int  # of its draws
    item: Any


class _Tasks:
    """The samples of every micro-batch."""

    def __init__(
        self, order: Order, items: Sequence[Any], key: tuple[int, int], start: int, stop: int
    ) -> None:
        self._order, self._items, self._key = order, items, key
        self._start, self._stop = start, stop

    def __len__(self) -> int:
        return (self._stop - self._start) * self._order.accumulate

    def __iter__(self) -> Iterator[list[_Record]]:
        left = len(self)
        epoch, step = divmod(self._start, self._order.steps_per_epoch)
        while left:
            key = np.asarray(key_of(*self._key, epoch))
            for batch in self._order.batches(epoch, step)[:left]:
                keys = fold_np(key, batch).tolist()
                yield [_Record(n, k, self._items[n]) for n, k in zip(batch.tolist(), keys)]
                left -= 1
            epoch, step = epoch + 1, 0


class _Made(Dataset, Generic[T]):
    """From a record to its sample, in a worker process or not."""

    def __init__(self, show: Show[Any, T]) -> None:
        self._show = show

    def __getitem__(self, record: _Record) -> tuple[_Record, T | str]:
        """Return the sample, or why there is none, with its record."""
        try:
            return record, self._show(record.item, Draws(np.uint64(record.key)))
        except UNREADABLE as error:
            return record, " ".join(str(error).split()) or type(error).__name__


def _collate(samples: list) -> list:
    return samples
