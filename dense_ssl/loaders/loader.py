"""What the loaders share: a plan is drawn, a reader executes it, its pixels become batches."""

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from dense_ssl.crops import MultiCropBatch
from dense_ssl.loaders.batch import assemble
from dense_ssl.loaders.decoded import Decoded, SourceBatch
from dense_ssl.loaders.order import Batches
from dense_ssl.loaders.replace import Replacements
from dense_ssl.loaders.source import ImageSource
from dense_ssl.views import CropPlan, ViewSpec, draw_epoch

Batch = MultiCropBatch | SourceBatch
Pixels = dict[str, Tensor] | Decoded  # crops, uint8 [V, B, 3, S, S] by view, or images not cut yet


@dataclass(frozen=True)
class Reading:
    """What every reader is told."""

    source: ImageSource
    views: tuple[ViewSpec, ...]
    replacements: Replacements
    cut: Literal["host", "device"]
    device: torch.device  # where the batches will be used
    micro_batch: int
    workers: int

    @property
    def pinned(self) -> bool:
        """Whether memory on the host will be sent to a GPU."""
        return self.device.type == "cuda"


class Reader(Protocol):
    """One library's way to read: all in which the loaders differ."""

    def read(
        self, plan: CropPlan, order: Sequence[np.ndarray]
    ) -> Generator[tuple[np.ndarray, Pixels]]:
        """Yield, for each batch of records wanted, those shown, int64 [B], and their pixels.

        Args:
            plan: has a row for every record.
            order: int64 [B] each.
        """
        ...

    def close(self) -> None:
        """Give back what is kept between epochs."""
        ...


class Loader:
    """Batches of one rank, epoch by epoch; one epoch runs at a time."""

    def __init__(self, reading: Reading, reader: Reader, order: Batches) -> None:
        self.steps_per_epoch = order.steps_per_epoch
        self._reading, self._reader, self._order = reading, reader, order
        self._live: Any = None  # the generator of the running epoch

    @property
    def replaced(self) -> dict[int, str]:
        """Records that could not be shown, with the reason."""
        return self._reading.replacements.reasons

    def epoch(self, epoch: int, start_step: int = 0) -> Generator[Batch]:
        """Yield the micro-batches of one epoch; steps before `start_step` are never decoded.

        The images are uint8, on the CPU or already on the device; with `data.cut=device` they are
        whole (`SourceBatch`). Starting an epoch ends the one before it.
        """
        self._end()
        self._live = self._batches(epoch, start_step)
        return self._live

    def close(self) -> None:
        """End the running epoch with its threads and processes."""
        self._end()
        self._reader.close()

    def _end(self) -> None:
        if self._live is not None and not self._live.gi_running:  # else it hangs in another thread
            self._live.close()
        self._live = None

    def _batches(self, epoch: int, start_step: int) -> Generator[Batch]:
        source, views = self._reading.source, self._reading.views
        plan = draw_epoch(views, source.sizes, self._order.seed, epoch)
        order = self._order.batches(epoch, start_step)
        with closing(self._reader.read(plan, order)) as batches:
            for index, pixels in batches:
                rows = CropPlan(plan.boxes[index], plan.flipped[index])
                labels = source.labels[index]
                if isinstance(pixels, Decoded):
                    yield pixels.batch(rows, index, labels)
                else:
                    yield assemble(views, pixels, rows, source.sizes[index], index, labels)
