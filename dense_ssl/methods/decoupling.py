"""De-coupling: context that says nothing about what is to be told.

"Mind Your Augmentation: The Key to Decoupling Dense Self-Supervised Learning" (ICLR 2024). A student that may
read the surroundings of a place need not look at the place itself. So a part of the batch comes once more,
as extras, with whole regions of each replaced by the same cells of another image, and the student has to give
at the cells kept what the teacher gives for the image as it was.

Here is what does not depend on the method it is added to: which cells are foreign, and where they are from.
"""

import math

import numpy as np
import torch
from torch import Tensor

from dense_ssl.config import UserError
from dense_ssl.methods.masks import MaskConfig

SHARE = 0.25  # of the batch that comes again as extras

# Half of the images at most, so that no extra meets its own image: the first ones are their sources.
LARGEST_SHARE = 0.5


def region_masks() -> MaskConfig:
    """Return the published masks: regions, none half of the time, else 20 to 60 %."""
    return MaskConfig(shape="rcc", ratio=(0.0, 0.4), spread=(0.0, 0.2))


def check_regions(mask: MaskConfig) -> None:
    """Raise ValueError where masks would leave nothing to exchange."""
    if mask.start_epoch > 0:
        raise ValueError(
            "mask.start_epoch: de-coupling takes its regions from the masks; leave it 0"
        )
    if max(mask.ratio) == 0:
        raise ValueError(
            "mask.ratio: de-coupling takes its regions from the masks; one must be > 0"
        )


def foreign_regions(masks: np.ndarray, share: float, multiple: int = 1) -> np.ndarray:
    """Return which cells of the extras are foreign, bool [V, E, h, w]; E extras of each of V crops.

    The first V * int(B * share) masks that are not empty, of masks [V, B, h, w] crop-major, say where. Each
    crop takes them in turn: what is masked is foreign in the first half of its extras, what is not in the
    second half. E is an even multiple of `multiple` and at most int(B * share); less than that, even 0,
    where fewer masks are not empty.

    Raises:
        UserError: so few images never make two extras.
    """
    crops, images, height, width = masks.shape
    step = math.lcm(2, multiple)
    if int(images * share) < step:
        raise UserError(
            f"train.batch_size: {images} images per rank and micro-batch leave less than {step} extras to "
            f"exchange regions with; de-coupling needs at least {math.ceil(step / share)}"
        )
    chosen = masks[masks.any(axis=(2, 3))][: crops * int(images * share)]
    extras = len(chosen) // crops // step * step
    regions = chosen[: crops * extras].reshape(crops, 2, extras // 2, height, width).copy()
    regions[:, 1] = ~regions[:, 1]
    return regions.reshape(crops, extras, height, width)


def exchange_regions(patches: Tensor, foreign: Tensor) -> Tensor:
    """Return patch embeddings [2 * M, h, w, D] with those where foreign [2 * M, h, w] from other images.

    Two crops of M rows, extras last. Row i takes from row 2 M - 1 - i: the last extra of a crop from the
    first image of the other one. No gradient flows back through what is taken.
    """
    return torch.where(foreign[..., None], patches.detach().flip(0), patches)


def last(x: Tensor, count: int) -> Tensor:
    """Return the last `count` images of crops [V, B, ...]; of none, none."""
    return x[:, x.shape[1] - count :]
