"""Which patches UDI (arXiv:2407.17671) compares, and where another crop shows the same: stratified sampling.

The grid of a crop is divided into windows; of each one patch is drawn ("stratified random sampling"). Its
place in the image, by box and flip of its crop, is then sought in another crop. Patch (r, c) of a g x g grid
is by definition at (r, c) / (g - 1) of its crop: the outermost patches lie on its border, in both crops.

Draws are a pure function of (seed, epoch, image): one set for both global crops of an image, one for all its
local ones. Deviates: crops reach from border to border here, in fractions of the image; the published code
counts from the centre of their first pixel to that of their last, at most a pixel of the source less. A
place counts if it is strictly inside as seen from the other crop, so that its index is never that of the
last patch itself, where rounding makes the published code lose about one sample in ten thousand.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dense_ssl.crops import Crops, to_crop, to_source
from dense_ssl.methods.masks import on_device
from dense_ssl.rng import fold_np, key_of, uniform_np
from dense_ssl.schedule import Step

STREAM = int.from_bytes(b"strata", "big")  # this module's branch of the random numbers of a seed


def stratified_cells(picks: np.ndarray, corner: np.ndarray, side: int, window: int) -> np.ndarray:
    """Return one cell of each window of a grid of `side` x `side` cells, int64 [..., n * n], row-major.

    Args:
        picks: int [..., n * n], which cell of its window, 0 .. window^2 - 1; n = side // window.
        corner: float [...] in 0 .. 1. Where windows do not fill the grid they stand in the top left
            corner of it below 1/4, in the top right one below 1/2, bottom left below 3/4, else bottom right.
        side: of the grid.
        window: side of a window.
    """
    count = side // window
    row, column = np.divmod(np.arange(count * count), count)
    left_over = side - count * window
    quarter = np.minimum(corner * 4, 3).astype(np.int64)[..., None]
    rows = row * window + picks // window + (quarter >= 2) * left_over
    columns = column * window + picks % window + (quarter % 2) * left_over
    return rows * side + columns


def draw_cells(step: Step, index: Tensor, kind: int, side: int, window: int) -> np.ndarray:
    """Return sampled cells of the images `index` [B] (on the host), int64 [B, n * n].

    Equal for equal (seed, epoch, image, kind), whatever the batch, the rank or the step.
    """
    epoch = step.index // step.steps_per_epoch
    images = fold_np(key_of(step.seed, STREAM, epoch), index.numpy())
    windows = (side // window) ** 2
    draws = uniform_np(fold_np(images, kind), windows + 1)
    picks = (draws[:, :windows] * window**2).astype(np.int64)
    return stratified_cells(picks, draws[:, windows], side, window)


class Samples(NamedTuple):
    """Patches of one crop and the same places in another, as weights of their cells.

    Rows of both are all 0 where the other crop does not show the place; else they sum to 1.
    """

    own: Tensor  # [..., S, h * w]  1 at the patch
    other: Tensor  # [..., S, N]  bilinear


def find_samples(
    cells: Tensor,
    side: int,
    boxes: Tensor,
    flipped: Tensor,
    other_boxes: Tensor,
    other_flipped: Tensor,
    other_side: int,
) -> Samples:
    """Return where cells [..., S] of crops with `side` x `side` of them lie in other crops.

    Boxes are [..., 4], flips [...]; leading axes broadcast.
    """
    points = torch.stack([cells % side, cells // side], dim=-1) / (side - 1)
    source = to_source(points.to(boxes), boxes[..., None, :], flipped[..., None])
    there = to_crop(source, other_boxes[..., None, :], other_flipped[..., None])
    shown = ((there > 0) & (there < 1)).all(dim=-1)  # [..., S]
    x, y = (there.clamp(0, 1) * (other_side - 1)).unbind(-1)
    other = _hat(y, other_side)[..., :, None] * _hat(x, other_side)[..., None, :]
    own = (cells[..., None] == torch.arange(side * side, device=cells.device)).to(boxes)
    shown = shown[..., None].to(boxes)
    return Samples(own * shown, other.flatten(-2) * shown)


def _hat(place: Tensor, count: int) -> Tensor:
    """Return how much each of `count` cells, which are at 0, 1, ..., weighs at a place, [..., count]."""
    cells = torch.arange(count, device=place.device, dtype=place.dtype)
    return (1 - (place[..., None] - cells).abs()).clamp(min=0)


class Maps(NamedTuple):
    """All samples of B images with two global crops and L local ones."""

    own: Tensor  # [2, B, S, N]  the patches of each global crop that the other one shows
    of_global: Tensor  # [2, B, S, N]  in each global crop, the places of the other one's patches
    of_local: (
        Tensor | None
    )  # [2, B, L, R, N]  in each global crop, the places of local crops' patches


class Strata(NamedTuple):
    """The grids patches are sampled from, (side, window) each."""

    of_global: tuple[int, int]
    of_local: tuple[int, int] | None


def make_maps(crops: Crops, local: Crops | None, index: Tensor, step: Step, strata: Strata) -> Maps:
    """Return the maps of a batch; crops are two global ones, index [B] is on the host."""
    boxes, flipped = crops.boxes, crops.flipped
    side = strata.of_global[0]
    cells = on_device(draw_cells(step, index, 0, *strata.of_global), boxes.device)
    own, other = find_samples(
        cells.expand(2, -1, -1), side, boxes, flipped, boxes.flip(0), flipped.flip(0), side
    )
    if local is None or strata.of_local is None:
        return Maps(own, other.flip(0), None)
    cells = on_device(draw_cells(step, index, 1, *strata.of_local), boxes.device)
    _, of_local = find_samples(
        cells,
        strata.of_local[0],
        *(local.boxes, local.flipped),  # [L, B, ...]
        *(boxes[:, None], flipped[:, None], side),  # [2, 1, B, ...]
    )
    return Maps(own, other.flip(0), of_local.transpose(1, 2))
