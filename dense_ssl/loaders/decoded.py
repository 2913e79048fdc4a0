"""Decoded images on their way to the device that cuts them.

Everything the device needs lies in one piece of memory, so one copy sends it: the rows of the plan first,
then the images, of any sizes, one after the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import torch
from torch import Tensor

from dense_ssl.crops import MultiCropBatch
from dense_ssl.loaders.batch import crops_by_view, cut_views
from dense_ssl.loaders.cut_decoded import cut_decoded
from dense_ssl.views import CropPlan, ViewSpec, positions
from kernels import launch
from kernels.multicrop import multicrop


def _head(images: int, crops: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return what stands before the images, in this order: the widest first, so all are aligned."""
    return {
        "offsets": (torch.int64, (images,)),  # where each image begins in the memory
        "label": (torch.int64, (images,)),
        "sizes": (torch.int32, (images, 2)),  # height, width
        "fractions": (torch.float32, (crops, images, 4)),  # the boxes, as `Crops` has them
        "boxes": (torch.int16, (crops, images, 4)),  # px
        "flipped": (torch.bool, (crops, images)),
    }


def _parts(memory: Tensor, images: int, crops: int) -> dict[str, Tensor]:
    """Return the head of a batch's memory as tensors that share it."""
    parts: dict[str, Tensor] = {}
    start = 0
    for name, (dtype, shape) in _head(images, crops).items():
        end = start + prod(shape) * dtype.itemsize
        parts[name] = memory[start:end].view(dtype).view(shape)
        start = end
    return parts


@dataclass(frozen=True, slots=True)
class SourceBatch:
    """B decoded images and what is to be cut from them: a MultiCropBatch before the device cutter."""

    views: tuple[ViewSpec, ...]
    memory: Tensor  # uint8, host (pinned where wanted on a GPU) or device
    index: Tensor  # [B] int64, position in the shard set; stays on the host

    def to(self, device: torch.device) -> "SourceBatch":
        """Return the batch on `device`, or on its way there on the current stream."""
        if self.memory.device.type == device.type:
            return self
        memory = self.memory if self.memory.is_pinned() else self.memory.pin_memory()
        return replace(self, memory=memory.to(device, non_blocking=True))

    def cut(self) -> MultiCropBatch:
        """Return the crops, made where the images are.

        On a CPU the compiled host cutter makes them, to the bit as it does within `ffcv`.
        """
        where = positions(self.views)
        parts = _parts(self.memory, len(self.index), sum(view.count for view in self.views))
        boxes, flipped = parts["boxes"], parts["flipped"]
        images: dict[str, Tensor] = {}
        if self.memory.is_cuda or launch.on_triton(self.memory):
            for view in cut_views(self.views):
                rows = where[view.name]
                images[view.name] = multicrop(
                    *(self.memory, parts["offsets"], parts["sizes"], boxes[rows], flipped[rows]),
                    size=view.size,
                    filter=view.filter,
                )
        else:
            images = cut_decoded(
                *(self.views, self.memory.numpy(), parts["offsets"].numpy()),
                *(parts["sizes"].numpy(), boxes.numpy(), flipped.numpy()),
            )
        # Copies, so that the batch does not keep the decoded images.
        fractions, flipped, label = (parts[n].clone() for n in ("fractions", "flipped", "label"))
        crops = crops_by_view(self.views, images, fractions, flipped)
        return MultiCropBatch(crops, self.index, label)


class Decoded:
    """The memory of a SourceBatch while its images are decoded into it.

    Args:
        views: the whole recipe.
        sizes: int [B, 2], height and width of the images.
        device: where the memory is.
        pinned: whether it is host memory to be sent to a GPU.
    """

    def __init__(
        self,
        views: Sequence[ViewSpec],
        sizes: np.ndarray,
        device: torch.device,
        *,
        pinned: bool = False,
    ) -> None:
        self._views, self._device, self._pinned = tuple(views), device, pinned
        self._crops = sum(view.count for view in views)
        self._allocate(sizes)

    def _allocate(self, sizes: np.ndarray) -> None:
        self.sizes = sizes.astype(np.int32)
        head = _head(len(sizes), self._crops).values()
        self._start = sum(prod(shape) * dtype.itemsize for dtype, shape in head)
        ends = self._start + np.cumsum(3 * sizes.astype(np.int64).prod(axis=1))
        self.offsets = np.concatenate([[self._start], ends[:-1]])[: len(sizes)]
        self.memory = torch.empty(
            int(ends[-1]), dtype=torch.uint8, device=self._device, pin_memory=self._pinned
        )

    @property
    def pixels(self) -> Tensor:
        """All images in one, uint8 [N]."""
        return self.memory[self._start :]

    def image(self, row: int) -> Tensor:
        """Return the memory of one image, uint8 [H, W, 3]."""
        height, width = self.sizes[row].tolist()
        start = int(self.offsets[row])
        return self.memory[start : start + 3 * height * width].view(height, width, 3)

    def put(self, row: int, image: Tensor) -> None:
        """Put another image, uint8 [H, W, 3] of any size, in the place of one."""
        images = [self.image(i) for i in range(len(self.sizes))]
        images[row] = image
        self._allocate(np.array([image.shape[:2] for image in images]))
        for i, kept in enumerate(images):
            self.image(i).copy_(kept)

    def batch(self, plan: CropPlan, index: np.ndarray, labels: np.ndarray) -> SourceBatch:
        """Return the batch, all images being in their places.

        Args:
            plan: the rows of these B images, in their order.
            index: int64 [B], the records shown.
            labels: int64 [B].
        """
        on_host = self.memory.device.type == "cpu"
        head = self.memory[: self._start]
        written = head if on_host else torch.empty(self._start, dtype=torch.uint8, pin_memory=True)
        values = {
            "offsets": self.offsets,
            "label": labels,
            "sizes": self.sizes,
            "fractions": plan.fractions(self.sizes).swapaxes(0, 1),
            "boxes": plan.boxes.swapaxes(0, 1),
            "flipped": plan.flipped.T,
        }
        for name, part in _parts(written, len(index), self._crops).items():
            part.numpy()[...] = values[name]
        if not on_host:
            head.copy_(written, non_blocking=True)
        return SourceBatch(self._views, self.memory, torch.from_numpy(index.copy()))
