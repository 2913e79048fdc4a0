"""Training crops of labelled images, batch after batch, from any step of a run on."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from dense_ssl.evaluation.label_maps import LabelledImage, signed
from dense_ssl.evaluation.omissions import Omissions
from dense_ssl.evaluation.segmentation.augment import (
    Sample,
    any_scale,
    listed_scale,
    resized_crop,
    rotate_zoom,
)
from dense_ssl.evaluation.segmentation.protocols import TrainedConfig
from dense_ssl.evaluation.trained.draws import Draws
from dense_ssl.evaluation.trained.samples import TrainingSamples
from dense_ssl.pictures import open_image

STREAM = int.from_bytes(b"segcrop", "big")  # this module's branch of the random numbers of a seed


class TrainingCrops:
    """Batches of this rank; images beyond whole batches wait for another epoch."""

    def __init__(
        self, images: Sequence[LabelledImage], config: TrainedConfig, omitted: Omissions
    ) -> None:
        """Take the images as they are; those that cannot be decoded are replaced by the next one.

        Raises:
            UserError: the batch does not divide among ranks and micro-batches, or exceeds the images.
        """
        self._samples = TrainingSamples(images, _Show(config), config, omitted, stream=STREAM)
        self.steps_per_epoch = self._samples.steps_per_epoch
        self.micro_batch = self._samples.micro_batch

    def batches(self, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the micro-batches of the steps from `start` up to `stop`, `accumulate` of each.

        Images uint8 [B, 3, h, w], and their label maps int16 [B, h, w] with -1 for no class.

        Raises:
            UserError: no image can be decoded any more.
        """
        for samples in self._samples.batches(start, stop):
            images = np.stack([image for image, _ in samples])
            labels = np.stack([labels for _, labels in samples])
            yield torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels)


def read_sample(image: LabelledImage) -> Sample:
    """Return an image uint8 [H, W, 3] and its label map int16 [H, W].

    Raises:
        OSError, ValueError, SyntaxError: one of the two cannot be read, or their sizes differ.
    """
    with open_image(image.path) as opened:
        pixels = np.array(opened.convert("RGB"))
    labels = signed(image.read_labels())
    if labels.shape != pixels.shape[:2]:
        raise ValueError(f"mask of {labels.shape}, image of {pixels.shape[:2]} px")
    return pixels, labels


class _Show:
    """The crop of an image."""

    def __init__(self, config: TrainedConfig) -> None:
        self._config = config

    def __call__(self, image: LabelledImage, draws: Draws) -> Sample:
        sample = read_sample(image)
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
