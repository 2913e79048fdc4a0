"""Which records a rank reads in which step: a function of (seed, epoch), never of what was read before.

An epoch's order is the argsort of one hash per record, so it does not depend on the version of a
library's shuffling, and one global batch holds the same records on any number of ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dense_ssl.config import UserError
from dense_ssl.rng import fold_np, key_of

STREAM = int.from_bytes(b"order", "big")  # this module's branch of the random numbers of a seed


class Batches(Protocol):
    """What a loader needs to know of an order."""

    @property
    def num_images(self) -> int: ...  # noqa: D102
    @property
    def seed(self) -> int: ...  # noqa: D102
    @property
    def steps_per_epoch(self) -> int: ...  # noqa: D102
    @property
    def micro_batch(self) -> int: ...  # noqa: D102  (the largest)

    def batches(self, epoch: int, start_step: int = 0) -> Sequence[np.ndarray]:
        """Return the records of every micro-batch of this rank from `start_step` on, int64 each."""
        ...


@dataclass(frozen=True, slots=True)
class Order:
    """The order for training: reshuffled every epoch, records beyond whole global batches dropped.

    Raises:
        UserError: the batch does not divide among ranks and micro-batches, or exceeds the data set.
    """

    num_images: int
    batch_size: int  # global: all ranks, all micro-batches of one step
    world_size: int = 1
    rank: int = 0
    accumulate: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world_size
        if self.batch_size % (self.world_size * self.accumulate):
            raise UserError(
                f"train.batch_size={self.batch_size} does not divide among {self.world_size} ranks "
                f"x {self.accumulate} micro-batches: choose a multiple of "
                f"{self.world_size * self.accumulate}"
            )
        if self.batch_size > self.num_images:
            raise UserError(
                f"the data set has {self.num_images} images, fewer than one global batch "
                f"(train.batch_size={self.batch_size}): choose a smaller batch"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps per epoch."""
        return self.num_images // self.batch_size

    @property
    def micro_batch(self) -> int:
        """Images per rank and micro-batch."""
        return self.batch_size // (self.world_size * self.accumulate)

    def epoch(self, epoch: int) -> np.ndarray:
        """Return the records of this rank, int64 [steps, accumulate, micro_batch].

        Micro-batch a of rank r in a step is row [a, r] of the global batch seen as
        [accumulate, world, micro_batch].
        """
        key = np.asarray(key_of(self.seed, STREAM, epoch))
        hashes = fold_np(key, np.arange(self.num_images))
        order = np.argsort(hashes, kind="stable")[: self.steps_per_epoch * self.batch_size]
        shape = (self.steps_per_epoch, self.accumulate, self.world_size, self.micro_batch)
        return order.reshape(shape)[:, :, self.rank]

    def batches(self, epoch: int, start_step: int = 0) -> Sequence[np.ndarray]:
        """Return the micro-batches from `start_step` on: accumulate of them per step, int64 [b]."""
        return list(self.epoch(epoch)[start_step:].reshape(-1, self.micro_batch))


@dataclass(frozen=True, slots=True)
class SequentialOrder:
    """The order for evaluation: every record once, as stored; the last batch may be smaller.

    Rank r takes the records r, r + world, ...; ranks may thus differ by one record, never more.
    """

    num_images: int
    batch_size: int  # per rank
    world_size: int = 1
    rank: int = 0
    seed: int = 0

    @property
    def steps_per_epoch(self) -> int:
        """Batches of this rank, the last partial one included."""
        return -(-len(range(self.rank, self.num_images, self.world_size)) // self.batch_size)

    @property
    def micro_batch(self) -> int:
        """Images in all batches but the last."""
        return self.batch_size

    def batches(self, epoch: int, start_step: int = 0) -> Sequence[np.ndarray]:
        """Return the batches from `start_step` on, int64 [b], the same in every epoch."""
        records = np.arange(self.rank, self.num_images, self.world_size)
        starts = range(start_step * self.batch_size, len(records), self.batch_size)
        return [records[start : start + self.batch_size] for start in starts]
