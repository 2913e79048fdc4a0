"""Crops with their boxes, and the geometry that follows from them. Pure torch.

The box convention, once: a box is `(x0, y0, x1, y1)`, `x0 < x1`, in fractions of the source image;
`flipped` is a separate bool; arrays of crops are `[V, B, ...]`, view first. The functions below take
any leading axes that broadcast against each other. A point is `(x, y)`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Crops:
    """V crops of each of B images at one resolution. View first, always."""

    images: Tensor  # [V, B, 3, S, S]  uint8 RGB from a loader; float, normalised after `augment`
    boxes: Tensor  # [V, B, 4]        float32 (x0, y0, x1, y1), fractions of the source image
    flipped: Tensor  # [V, B]           bool, mirrored left-right after cutting

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Crops":
        """Return the crops with `fn` applied to each tensor."""
        return Crops(fn(self.images), fn(self.boxes), fn(self.flipped))


@dataclass(frozen=True, slots=True)
class MultiCropBatch:
    """All views of B images of one micro-batch on one rank."""

    views: dict[str, Crops]  # by ViewSpec.name, in the order of the recipe
    index: Tensor  # [B] int64, position in the shard set; on the host, where it keys random draws
    label: Tensor  # [B] int64, -1 where the data has none; for evaluation, never for a loss

    def to(self, device: torch.device, non_blocking: bool = False) -> "MultiCropBatch":
        """Return the batch on `device`; the index stays on the host."""

        def move(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=non_blocking)

        return MultiCropBatch(
            {name: crops.map(move) for name, crops in self.views.items()},
            self.index,
            move(self.label),
        )


def hull(boxes: Tensor) -> Tensor:
    """Return the smallest box around the crops of each image, [B, 4] from [V, B, 4]."""
    return torch.cat([boxes[..., :2].amin(dim=0), boxes[..., 2:].amax(dim=0)], dim=-1)


def overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the box that two boxes share, [..., 4], and whether there is one, bool [...].

    Boxes that only touch share none; what is returned for them has no area.
    """
    low = torch.maximum(a[..., :2], b[..., :2])
    high = torch.minimum(a[..., 2:], b[..., 2:])
    return torch.cat([low, high.maximum(low)], dim=-1), (low < high).all(dim=-1)


def area(boxes: Tensor) -> Tensor:
    """Return the area of each box as a share of its image, [...]."""
    return (boxes[..., 2:] - boxes[..., :2]).prod(dim=-1)


def to_source(points: Tensor, boxes: Tensor, flipped: Tensor) -> Tensor:
    """Return points of crops as points of their source images, [..., 2].

    Args:
        points: [..., 2] in fractions of the crop as it is seen, mirrored or not.
        boxes: [..., 4].
        flipped: bool [...].
    """
    return boxes[..., :2] + _mirror(points, flipped) * (boxes[..., 2:] - boxes[..., :2])


def to_crop(points: Tensor, boxes: Tensor, flipped: Tensor) -> Tensor:
    """Return points of source images as points of their crops, [..., 2]: undoes `to_source`."""
    return _mirror((points - boxes[..., :2]) / (boxes[..., 2:] - boxes[..., :2]), flipped)


def cell_centres(boxes: Tensor, flipped: Tensor, size: tuple[int, int]) -> Tensor:
    """Return where the centres of a crop's grid cells lie in the source, [..., h, w, 2].

    Args:
        boxes: [..., 4].
        flipped: bool [...].
        size: (h, w) of the grid of features; cell 0 of a mirrored crop shows its right end.
    """
    h, w = size
    x = (torch.arange(w, device=boxes.device, dtype=boxes.dtype) + 0.5) / w
    y = (torch.arange(h, device=boxes.device, dtype=boxes.dtype) + 0.5) / h
    points = torch.stack([x.expand(h, w), y[:, None].expand(h, w)], dim=-1)
    return to_source(points, boxes[..., None, None, :], flipped[..., None, None])


def sampling_grid(region: Tensor, boxes: Tensor, flipped: Tensor, size: int) -> Tensor:
    """Return the grid that samples `region` of the source from the features of a crop.

    size x size points, those at the ends on the region's border, in the coordinates that
    `grid_sample(..., align_corners=False)` takes: [..., size, size, 2] in -1 .. 1 within the crop.
    The grids of two crops for one region thus point at the same source pixels.
    """
    steps = torch.linspace(0, 1, size, device=region.device, dtype=region.dtype)
    low, high = region[..., None, :2], region[..., None, 2:]
    points = low + steps[:, None] * (high - low)  # [..., size, 2]: x and y apart
    inside = to_crop(points, boxes[..., None, :], flipped[..., None]) * 2 - 1
    x, y = inside[..., None, :, 0], inside[..., :, None, 1]
    return torch.stack(torch.broadcast_tensors(x, y), dim=-1)


def _mirror(points: Tensor, flipped: Tensor) -> Tensor:
    x = torch.where(flipped, 1 - points[..., 0], points[..., 0])
    return torch.stack([x, points[..., 1].expand_as(x)], dim=-1)
