"""What the original codes of the methods do: ImageFolder, Pillow, torchvision's transforms, DataLoader."""

from collections.abc import Iterator
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import (
    Compose,
    InterpolationMode,
    PILToTensor,
    RandomHorizontalFlip,
    RandomResizedCrop,
)

from dense_ssl.benches.task import Task


class _Views:
    """All crops of one image."""

    def __init__(self, task: Task) -> None:
        self.transforms = [
            Compose(
                [
                    RandomResizedCrop(
                        crop.size,
                        scale=crop.scale,
                        ratio=crop.ratio,
                        interpolation=InterpolationMode(task.filter),
                    ),
                    RandomHorizontalFlip(crop.flip),
                    PILToTensor(),
                ]
            )
            for crop in task.crops
        ]

    def __call__(self, image: Image.Image) -> list[Any]:
        return [transform(image) for transform in self.transforms]


def batches(task: Task) -> Iterator[int]:
    """Yield the number of images of each batch."""
    torch.set_num_threads(1)
    data = ImageFolder(task.files, _Views(task))
    order = task.order(len(data)).tolist()
    for views, _ in DataLoader(data, batch_sampler=order, num_workers=task.workers):
        yield len(views[0])
