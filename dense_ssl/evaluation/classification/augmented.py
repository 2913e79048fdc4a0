"""Augmented crops of labelled pictures, for protocols that train on images.

Random crops and flips come from the crop plan, RandAugment (Cubuk et al., arXiv:1909.13719) is timm's. Every
draw is keyed by (seed, epoch, image), so neither workers nor a resumed job change what is seen.
"""

import math
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from os import getpid
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from pydantic import Field
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dense_ssl.augment import MEAN
from dense_ssl.config import UserError
from dense_ssl.distributed import rank, world_size
from dense_ssl.evaluation.choices import Filter
from dense_ssl.evaluation.classification.data import (
    FILTERS,
    Picture,
    open_picture,
    picture_size,
)
from dense_ssl.evaluation.omissions import Omissions
from dense_ssl.loaders import share_of_cores
from dense_ssl.loaders.order import Order
from dense_ssl.loaders.workers import end_with, worker_context
from dense_ssl.rng import fold_np, key_of
from dense_ssl.views import ViewSpec, draw_epoch

RandAugment = Annotated[str, Field(pattern=r"^rand-m\d+(-(n|inc|mstd|p)[\d.]+)*$")]
STREAM = int.from_bytes(b"policy", "big")  # RandAugment's branch of the random numbers of a seed
_READABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


@dataclass(frozen=True, slots=True)
class Augmentation:
    """Random resized crop, mirror, and maybe RandAugment on the crop."""

    size: int  # side in pixels
    resampling: Filter
    scale: tuple[float, float] = (0.08, 1.0)  # share of the area
    randaugment: str | None = None  # timm's description, such as rand-m9-mstd0.5-inc1


class TrainingCrops:
    """Batches of this rank, epoch by epoch; images beyond whole batches wait for another epoch."""

    def __init__(
        self,
        pictures: Sequence[Picture],
        labels: Tensor,
        augmentation: Augmentation,
        *,
        batch_size: int,
        seed: int,
        workers: int | None,
        omitted: Omissions,
        multiple: int = 1,
        repeats: int = 1,
    ) -> None:
        """Read the headers of all pictures.

        Args:
            pictures: what is trained on.
            labels: int64 [n].
            augmentation: what is done to them.
            batch_size: of all ranks together; a smaller training set makes smaller batches.
            seed: of every draw.
            workers: processes per rank that decode, 0 for none; None is the rank's share of the cores.
            omitted: told of files that cannot be read, each once; their place is taken by the next.
            multiple: a rank's batch is a multiple of this.
            repeats: crops of every image in a batch; an epoch shows so many times fewer images
                (repeated augmentation: Hoffer et al. 2020; DeiT).

        Raises:
            UserError: the batch does not divide among the ranks, or there are too few pictures.
        """
        with ThreadPoolExecutor(min(16, 4 * share_of_cores())) as pool:
            sizes = list(pool.map(picture_size, pictures))
        readable = [number for number, size in enumerate(sizes) if size is not None]
        for number, size in enumerate(sizes):
            if size is None:
                omitted.add("train: image header not readable", str(pictures[number]))
        whole = math.lcm(multiple, repeats) * world_size()
        if batch_size % whole:
            raise UserError(f"batch_size={batch_size} is not a multiple of {whole}, as it must be")
        self.batch_size = min(batch_size, len(readable) - len(readable) % whole)
        if not self.batch_size:
            raise UserError(f"train: {len(readable)} readable image(s) make no batch of {whole}")
        self._pictures = [pictures[number] for number in readable]
        self._labels = labels[torch.tensor(readable)]
        self._sizes = np.array([sizes[number] for number in readable], np.int32)
        self._omitted, self._lost = omitted, set[int]()
        self._views = (
            ViewSpec(
                name="crop",
                count=repeats,
                size=augmentation.size,
                scale=augmentation.scale,
                filter=augmentation.resampling,
            ),
        )
        self._seed, self._repeats = seed, repeats
        self.steps_per_epoch = len(readable) // self.batch_size
        images = self.batch_size // repeats
        self._order = Order(len(readable), images, world_size=world_size(), rank=rank(), seed=seed)
        self._tasks = _Tasks()
        workers = share_of_cores() if workers is None else workers
        self._show = _Show(self._pictures, self._sizes, augmentation)
        self._loader = DataLoader(
            self._show,
            batch_sampler=self._tasks,
            num_workers=workers,
            collate_fn=_collate,
            multiprocessing_context=worker_context() if workers else None,
            worker_init_fn=partial(end_with, getpid()),
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # of the workers' seeds: torch's own is left alone
        )

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield uint8 images [B, 3, S, S] and their labels, int64 [B], B of this rank alone.

        Raises:
            UserError: no image can be decoded any more.
        """
        plan = draw_epoch(self._views, self._sizes, self._seed, epoch)
        keys = fold_np(np.asarray(key_of(self._seed, STREAM, epoch)), np.arange(len(self._sizes)))

        def record(index: int, crop: int) -> _Record:
            box, flipped = plan.boxes[index, crop], bool(plan.flipped[index, crop])
            key = int(fold_np(keys[index], np.asarray(crop))) if crop else int(keys[index])
            return _Record(index, tuple(box.tolist()), flipped, key)

        shown = [
            [(index, crop) for index in batch.tolist() for crop in range(self._repeats)]
            for batch in self._order.batches(epoch)[: self.steps_per_epoch]
        ]
        self._tasks.batches = [[record(*one) for one in batch] for batch in shown]
        for wanted, images in zip(shown, self._loader, strict=True):
            index = [number for number, _ in wanted]
            for row, image in enumerate(images):
                if isinstance(image, str):
                    self._note(index[row], image)
                    crop = partial(record, crop=wanted[row][1])
                    index[row], images[row] = self._next_readable(index[row], crop)
            pixels = torch.from_numpy(np.stack(images))
            yield pixels, self._labels[torch.tensor(index)]

    def _next_readable(self, index: int, record: Any) -> tuple[int, np.ndarray]:
        for step in range(1, len(self._pictures)):
            other = (index + step) % len(self._pictures)
            shown = self._show[record(other)]
            if not isinstance(shown, str):
                return other, shown
            self._note(other, shown)
        raise UserError(f"train: none of {len(self._pictures)} images can be decoded")

    def _note(self, index: int, reason: str) -> None:
        if index not in self._lost:
            self._lost.add(index)
            self._omitted.add("train: image not readable", f"{self._pictures[index]}: {reason}")


class _Record(NamedTuple):
    """One crop to make: all that a worker needs to know."""

    number: int
    box: tuple[int, int, int, int]  # of the picture's window, in pixels
    flipped: bool
    key: int  # of RandAugment


class _Tasks:
    """The batches of the epoch under way, for workers that outlive it."""

    def __init__(self) -> None:
        self.batches: list[list[_Record]] = []

    def __iter__(self) -> Iterator[list[_Record]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _Show(Dataset):
    """From a record to its crop, in a worker process or not."""

    def __init__(
        self, pictures: Sequence[Picture], sizes: np.ndarray, augmentation: Augmentation
    ) -> None:
        self._pictures, self._sizes, self._augmentation = pictures, sizes, augmentation
        self._policy: Any = None

    def __getitem__(self, record: _Record) -> np.ndarray | str:
        """Return uint8 [3, S, S], or why the picture cannot be shown."""
        try:
            crop = self._crop(record)
        except _READABLE as error:
            return " ".join(str(error).split()) or type(error).__name__
        if self._augmentation.randaugment:
            with seeded(record.key):
                crop = self._randaugment(self._augmentation.randaugment)(crop)
        return np.asarray(crop).transpose(2, 0, 1).copy()

    def _crop(self, record: _Record) -> Image.Image:
        image, window = open_picture(self._pictures[record.number])
        left, top, right, bottom = window
        height, width = self._sizes[record.number]
        if (int(right - left), int(bottom - top)) != (width, height):
            raise ValueError(f"{image.width} x {image.height} px is not what its header says")
        x0, y0, x1, y1 = record.box
        side = self._augmentation.size
        resampling = FILTERS[self._augmentation.resampling]
        box = (left + x0, top + y0, left + x1, top + y1)
        crop = image.resize((side, side), resampling, box=box)
        return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if record.flipped else crop

    def _randaugment(self, description: str) -> Any:
        if self._policy is None:
            fill = tuple(min(255, round(255 * x)) for x in MEAN)
            options = {
                "translate_const": int(self._augmentation.size * 0.45),
                "img_mean": fill,
                "interpolation": FILTERS[self._augmentation.resampling],
            }
            self._policy = rand_augment_transform(description, options)
            for operation in self._policy.ops:
                if operation.name.startswith("Posterize"):
                    operation.aug_fn = _posterize
        return self._policy


@contextmanager
def seeded(key: int) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's own generators, which timm draws from, and put them back."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    random.seed(key)
    np.random.seed(key % 2**32)  # noqa: NPY002
    torch.manual_seed(key % 2**63)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keep the highest bits. At full strength timm asks for none, which newer Pillows refuse: black."""
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits else Image.new(image.mode, image.size)


def _collate(images: list[np.ndarray | str]) -> list[np.ndarray | str]:
    return images
