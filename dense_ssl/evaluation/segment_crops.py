"""Training crops of labelled images, batch after batch, from any step of a run on.

Order and draws are keyed by (seed, epoch, image): neither workers nor a resumed job change what is seen.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from os import getpid
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dense_ssl.config import UserError
from dense_ssl.distributed import rank, world_size
from dense_ssl.evaluation.label_maps import LabelledImage, signed
from dense_ssl.evaluation.omissions import Omissions
from dense_ssl.evaluation.segment_augment import (
    Draws,
    Sample,
    any_scale,
    listed_scale,
    resized_crop,
    rotate_zoom,
)
from dense_ssl.evaluation.segment_protocols import TrainedConfig
from dense_ssl.loaders import share_of_cores
from dense_ssl.loaders.folder import end_with, worker_context
from dense_ssl.loaders.order import Order
from dense_ssl.rng import fold_np, key_of

STREAM = int.from_bytes(b"segcrop", "big")  # this module's branch of the random numbers of a seed
_READABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


class TrainingCrops:
    """Batches of this rank; images beyond whole batches wait for another epoch."""

    def __init__(
        self, images: Sequence[LabelledImage], config: TrainedConfig, omitted: Omissions
    ) -> None:
        """Take the images as they are; those that cannot be decoded are replaced by the next one.

        Raises:
            UserError: the batch does not divide among ranks and micro-batches, or exceeds the images.
        """
        if len(images) < config.batch_size:
            raise UserError(
                f"train: {len(images)} images make no batch of {config.batch_size}; lower batch_size"
            )
        shares = world_size() * config.accumulate
        if config.batch_size % shares:
            raise UserError(
                f"batch_size={config.batch_size} is not a multiple of {shares}, as it must be"
            )
        self._images, self._config, self._omitted = images, config, omitted
        self._lost: set[int] = set()
        self._order = Order(
            len(images),
            config.batch_size,
            world_size=world_size(),
            rank=rank(),
            accumulate=config.accumulate,
            seed=config.seed,
        )
        self._show = _Show(images, config)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of the optimiser per epoch."""
        return self._order.steps_per_epoch

    @property
    def micro_batch(self) -> int:
        """Crops in one batch of this rank."""
        return self._order.micro_batch

    def batches(self, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the micro-batches of the steps from `start` up to `stop`, `accumulate` of each.

        Images uint8 [B, 3, h, w], and their label maps int16 [B, h, w] with -1 for no class.

        Raises:
            UserError: no image can be decoded any more.
        """
        workers = share_of_cores() if self._config.workers is None else self._config.workers
        loader = DataLoader(
            self._show,
            batch_sampler=_Tasks(self._order, self._config.seed, start, stop),
            num_workers=workers,
            collate_fn=_collate,
            multiprocessing_context=worker_context() if workers else None,
            worker_init_fn=partial(end_with, getpid()),
        )
        for batch in loader:
            samples = [
                sample if not isinstance(sample, str) else self._instead(record, sample)
                for record, sample in batch
            ]
            images = np.stack([image for image, _ in samples])
            labels = np.stack([labels for _, labels in samples])
            yield torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels)

    def _instead(self, record: "_Record", reason: str) -> Sample:
        """The sample of the next image that can be decoded."""
        for step in range(1, len(self._images) + 1):
            if record.number not in self._lost:
                self._lost.add(record.number)
                name = str(self._images[record.number])
                self._omitted.add("train: image not readable", f"{name}: {reason}")
            if step == len(self._images):
                break
            record = _Record((record.number + 1) % len(self._images), record.key)
            shown = self._show[record][1]
            if not isinstance(shown, str):
                return shown
            reason = shown
        raise UserError(f"train: none of {len(self._images)} images can be decoded")


def read_sample(image: LabelledImage) -> Sample:
    """Return an image uint8 [H, W, 3] and its label map int16 [H, W].

    Raises:
        OSError, ValueError, SyntaxError: one of the two cannot be read, or their sizes differ.
    """
    with Image.open(image.path) as opened:
        pixels = np.array(opened.convert("RGB"))
    labels = signed(image.read_labels())
    if labels.shape != pixels.shape[:2]:
        raise ValueError(f"mask of {labels.shape}, image of {pixels.shape[:2]} px")
    return pixels, labels


class _Record(NamedTuple):
    """One crop to make."""

    number: int  # of the image
    key: int  # of its draws


class _Tasks:
    """The crops of every micro-batch."""

    def __init__(self, order: Order, seed: int, start: int, stop: int) -> None:
        self._order, self._seed, self._start, self._stop = order, seed, start, stop

    def __len__(self) -> int:
        return (self._stop - self._start) * self._order.accumulate

    def __iter__(self) -> Iterator[list[_Record]]:
        left = len(self)
        epoch, step = divmod(self._start, self._order.steps_per_epoch)
        while left:
            key = np.asarray(key_of(self._seed, STREAM, epoch))
            for batch in self._order.batches(epoch, step)[:left]:
                keys = fold_np(key, batch).tolist()
                yield [_Record(number, key) for number, key in zip(batch.tolist(), keys)]
                left -= 1
            epoch, step = epoch + 1, 0


class _Show(Dataset):
    """From a record to its crop, in a worker process or not."""

    def __init__(self, images: Sequence[LabelledImage], config: TrainedConfig) -> None:
        self._images, self._config = images, config

    def __getitem__(self, record: _Record) -> tuple[_Record, Sample | str]:
        """Return the crop, or why there is none, with its record."""
        try:
            sample = read_sample(self._images[record.number])
        except _READABLE as error:
            return record, " ".join(str(error).split()) or type(error).__name__
        return record, self._changed(sample, Draws(np.uint64(record.key)))

    def _changed(self, sample: Sample, draws: Draws) -> Sample:
        config = self._config
        size, resampling = config.size, config.resampling
        if config.augmentation == "any-scale":
            return any_scale(
                sample,
                draws,
                size=size,
                scale=config.scale,
                ratio=config.ratio,
                max_share=config.max_share,
                resampling=resampling,
            )
        if config.augmentation == "listed-scale":
            return listed_scale(sample, draws, size=size, resampling=resampling)
        if config.augmentation == "rotate-zoom":
            fill = 0 if config.fill == "background" else -1
            return rotate_zoom(sample, draws, size=size, fill=fill, resampling=resampling)
        return resized_crop(sample, draws, size=size)


def _collate(samples: list[tuple[_Record, Sample | str]]) -> list[tuple[_Record, Sample | str]]:
    return samples
