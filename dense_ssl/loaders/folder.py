"""The reference loader: Pillow decodes, crops and resizes. Slow, obvious, the truth for the others."""

import os
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dense_ssl.loaders.batch import cut_views
from dense_ssl.loaders.decoded import Decoded
from dense_ssl.loaders.loader import Pixels, Reading
from dense_ssl.loaders.source import ImageSource, decode
from dense_ssl.loaders.workers import end_with, worker_context
from dense_ssl.views import CropPlan, ViewSpec, positions

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


class FolderReader:
    """Reads any source by Pillow in `workers` processes, or inline where that is 0."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._show = _Show(reading.source, reading.views, whole=reading.cut == "device")

    def close(self) -> None:
        """Do nothing: worker processes end with their epoch."""

    def read(
        self, plan: CropPlan, order: Sequence[np.ndarray]
    ) -> Generator[tuple[np.ndarray, Pixels]]:
        """Yield the records shown, int64 [B], and their pixels, batch by batch."""
        show, replacements = self._show, self._reading.replacements
        workers = self._reading.workers
        loader = DataLoader(
            show,
            batch_sampler=_Tasks(plan, order),
            num_workers=workers,
            collate_fn=_collate,
            multiprocessing_context=worker_context() if workers else None,
            worker_init_fn=partial(end_with, os.getpid()),
        )
        for wanted, images in zip(order, loader, strict=True):
            index = wanted.copy()
            for row, image in enumerate(images):
                if isinstance(image, str):
                    replacements.note(int(index[row]), image)
                    shown, images[row] = replacements.show(
                        int(index[row]), lambda i: show.show(_Record.of(plan, i))
                    )
                    index[row] = shown
            if self._reading.cut == "host":
                yield index, _stack(self._reading.views, images)
            else:
                yield index, self._gather(index, images)

    def _gather(self, index: np.ndarray, images: list[list[Tensor]]) -> Decoded:
        """Return the decoded images in one piece of memory."""
        reading = self._reading
        sizes = reading.source.sizes[index]
        decoded = Decoded(reading.views, sizes, torch.device("cpu"), pinned=reading.pinned)
        for row, (image,) in enumerate(images):
            decoded.image(row).numpy()[...] = image.numpy()  # numpy: as in `_stack`
        return decoded


class _Record(NamedTuple):
    """One image and its rows of the plan: all that a worker process needs to know."""

    number: int
    boxes: np.ndarray  # int16 [V, 4] pixels
    flipped: np.ndarray  # bool [V]

    @classmethod
    def of(cls, plan: CropPlan, index: int) -> "_Record":
        return cls(index, plan.boxes[index], plan.flipped[index])


@dataclass(frozen=True)
class _Tasks:
    """The records of an epoch, batch by batch, each made when a worker is free for it."""

    plan: CropPlan
    order: Sequence[np.ndarray]

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[list[_Record]]:
        for batch in self.order:
            yield [_Record.of(self.plan, index) for index in batch.tolist()]


class _Show(Dataset):
    """From a record to its crops, or to the whole image, in a worker process or not."""

    def __init__(self, source: ImageSource, views: Sequence[ViewSpec], *, whole: bool) -> None:
        self._source = source
        self._views = cut_views(views)
        self._where = positions(views)
        self._whole = whole

    def __getitem__(self, record: _Record) -> list[Tensor] | str:
        """Return the images, or why the record cannot be shown: the main process replaces it."""
        try:
            return self.show(record)
        except (OSError, ValueError) as error:
            return " ".join(str(error).split())

    def show(self, record: _Record) -> list[Tensor]:
        """Return uint8 [V, 3, S, S] for every view, or the whole image, uint8 [H, W, 3].

        Raises:
            OSError, ValueError: the record cannot be shown.
        """
        image = decode(self._source.read(record.number))
        height, width = self._source.sizes[record.number]
        if image.size != (width, height):
            raise ValueError(f"{image.width} x {image.height} px instead of {width} x {height}")
        if self._whole:
            return [torch.from_numpy(np.array(image))]
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


def _collate(images: list[list[Tensor] | str]) -> list[list[Tensor] | str]:
    return images
