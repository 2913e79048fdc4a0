"""Crops with their boxes, and the geometry that follows from them. Pure torch.

The box convention, once: a box is `(x0, y0, x1, y1)`, `x0 < x1`, in fractions of the source image;
`flipped` is a separate bool; arrays of crops are `[V, B, ...]`, view first.
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
