"""torchvision's newer way: decoding to tensors, transforms v2 on uint8 tensors, DataLoader."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_image, read_file
from torchvision.transforms import InterpolationMode, v2

from dense_ssl.benches.task import Task


class _Views:
    """All crops of one image."""

    def __init__(self, task: Task) -> None:
        self.transforms = [
            v2.Compose(
                [
                    v2.RandomResizedCrop(
                        crop.size,
                        scale=crop.scale,
                        ratio=crop.ratio,
                        interpolation=InterpolationMode(task.filter),
                        antialias=True,
                    ),
                    v2.RandomHorizontalFlip(crop.flip),
                ]
            )
            for crop in task.crops
        ]

    def __call__(self, image: Tensor) -> list[Tensor]:
        return [transform(image) for transform in self.transforms]


def _read(path: str) -> Tensor:
    return decode_image(read_file(path), ImageReadMode.RGB)


def batches(task: Task) -> Iterator[int]:
    """Yield the number of images of each batch."""
    torch.set_num_threads(1)
    data = ImageFolder(task.files, _Views(task), loader=_read)
    order = task.order(len(data)).tolist()
    for views, _ in DataLoader(data, batch_sampler=order, num_workers=task.workers):
        yield len(views[0])
