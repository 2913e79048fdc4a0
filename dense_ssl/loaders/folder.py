"""The reference loader: Pillow decodes, crops and resizes. Slow, obvious, the truth for the others."""

import contextlib
import multiprocessing
import os
import select
import threading
from collections.abc import Generator, Sequence
from functools import partial
from multiprocessing.context import BaseContext
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dense_ssl.crops import MultiCropBatch
from dense_ssl.loaders.batch import assemble, check_recipe, cut_views
from dense_ssl.loaders.order import Batches
from dense_ssl.loaders.replace import Replacements
from dense_ssl.loaders.source import ImageSource, decode
from dense_ssl.views import CropPlan, ViewSpec, draw_epoch, positions

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


class FolderLoader:
    """Batches from any source, cut by Pillow in `workers` processes, or inline where that is 0."""

    def __init__(
        self,
        source: ImageSource,
        views: Sequence[ViewSpec],
        order: Batches,
        *,
        workers: int,
        max_replaced: float,
    ) -> None:
        check_recipe(views, order.micro_batch)
        self.steps_per_epoch = order.steps_per_epoch
        self._source, self._views, self._order = source, tuple(views), order
        self._workers = workers
        self._replacements = Replacements(len(source.sizes), max_replaced)
        self._live: Generator[MultiCropBatch] | None = None

    @property
    def replaced(self) -> dict[int, str]:
        """Records that could not be shown, with the reason."""
        return self._replacements.reasons

    def epoch(self, epoch: int, start_step: int = 0) -> Generator[MultiCropBatch]:
        """Yield the micro-batches of one epoch from `start_step` on; ends the epoch before it."""
        self.close()
        self._live = self._batches(epoch, start_step)
        return self._live

    def close(self) -> None:
        """End the running epoch and its worker processes."""
        if self._live is not None:
            self._live.close()
            self._live = None

    def _batches(self, epoch: int, start_step: int) -> Generator[MultiCropBatch]:
        plan = draw_epoch(self._views, self._source.sizes, self._order.seed, epoch)
        order = self._order.batches(epoch, start_step)
        cutter = _Cutter(self._source, self._views)
        tasks = [[_Record.of(plan, index) for index in batch.tolist()] for batch in order]
        loader = DataLoader(
            cutter,
            batch_sampler=tasks,
            num_workers=self._workers,
            collate_fn=_collate,
            multiprocessing_context=_worker_context() if self._workers else None,
            worker_init_fn=partial(_end_with, os.getpid()),
        )
        for wanted, crops in zip(order, loader, strict=True):
            index = wanted.copy()
            for row, crop in enumerate(crops):
                if isinstance(crop, str):
                    self._replacements.note(int(index[row]), crop)
                    shown, crops[row] = self._replacements.show(
                        int(index[row]), lambda i: cutter.cut(_Record.of(plan, i))
                    )
                    index[row] = shown
            yield assemble(
                self._views,
                _stack(self._views, crops),
                CropPlan(plan.boxes[index], plan.flipped[index]),
                self._source.sizes[index],
                index,
                self._source.labels[index],
            )


class _Record(NamedTuple):
    """One image and its rows of the plan: all that a worker process needs to know."""

    number: int
    boxes: np.ndarray  # int16 [V, 4] pixels
    flipped: np.ndarray  # bool [V]

    @classmethod
    def of(cls, plan: CropPlan, index: int) -> "_Record":
        return cls(index, plan.boxes[index], plan.flipped[index])


class _Cutter(Dataset):
    """From a record to its crops, in a worker process or not."""

    def __init__(self, source: ImageSource, views: Sequence[ViewSpec]) -> None:
        self._source = source
        self._views = cut_views(views)
        self._where = positions(views)

    def __getitem__(self, record: _Record) -> list[Tensor] | str:
        """Return the crops, or why the record cannot be shown: the main process replaces it."""
        try:
            return self.cut(record)
        except (OSError, ValueError) as error:
            return " ".join(str(error).split())

    def cut(self, record: _Record) -> list[Tensor]:
        """Return uint8 [V, 3, S, S] for every view.

        Raises:
            OSError, ValueError: the record cannot be shown.
        """
        image = decode(self._source.read(record.number))
        height, width = self._source.sizes[record.number]
        if image.size != (width, height):
            raise ValueError(f"{image.width} x {image.height} px instead of {width} x {height}")
        crops = []
        for view in self._views:
            where = self._where[view.name]
            pixels = np.empty((view.count, 3, view.size, view.size), np.uint8)
            for crop, box, flip in zip(pixels, record.boxes[where], record.flipped[where]):
                crop[:] = cut_one(image, box, bool(flip), view).numpy()
            crops.append(torch.from_numpy(pixels))
        return crops


def cut_one(image: Image.Image, box: np.ndarray, flipped: bool, view: ViewSpec) -> Tensor:
    """Return one crop, uint8 [3, S, S]."""
    crop = image.resize((view.size, view.size), FILTERS[view.filter], box=tuple(box.tolist()))
    if flipped:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.asarray(crop).transpose(2, 0, 1).copy())


def _stack(views: Sequence[ViewSpec], crops: list[list[Tensor]]) -> dict[str, Tensor]:
    """Return uint8 [V, B, 3, S, S] by view."""
    names = [view.name for view in cut_views(views)]
    # By numpy: torch would wake its threads for every batch, and they starve the workers.
    return {
        name: torch.from_numpy(np.stack([row.numpy() for row in rows], axis=1))
        for name, rows in zip(names, zip(*crops), strict=True)
    }


def _collate(crops: list[list[Tensor] | str]) -> list[list[Tensor] | str]:
    return crops


def _end_with(trainer: int, _: int) -> None:
    """End this worker when the process `trainer` ends, SIGKILL included.

    torch watches a worker's parent, which here is the fork server: it lives as long as its workers,
    and the workers of a killed run would wait for ever, with whatever pipes they inherited.
    """

    def watch() -> None:
        with contextlib.suppress(ProcessLookupError):
            ended = select.poll()
            ended.register(os.pidfd_open(trainer), select.POLLIN)
            ended.poll()
        os._exit(1)

    threading.Thread(target=watch, name="end with the trainer", daemon=True).start()


def _worker_context() -> BaseContext:
    """Return a way to start workers that is safe beside the threads of numba, DALI and FFCV."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context
