"""The host cutter for images that are decoded already: what a CPU has in place of the device cutter."""

from collections.abc import Sequence

import numba as nb
import numpy as np
import torch
from torch import Tensor

from dense_ssl.loaders.batch import cut_views
from dense_ssl.loaders.resample import Layout, crop_table, cut, layout
from dense_ssl.loaders.simd import pointer
from dense_ssl.views import ViewSpec


def cut_decoded(
    views: Sequence[ViewSpec],
    images: np.ndarray,
    offsets: np.ndarray,
    sizes: np.ndarray,
    boxes: np.ndarray,
    flipped: np.ndarray,
) -> dict[str, Tensor]:
    """Return the crops of B images, uint8 [V, B, 3, S, S] by view, twins left out.

    Args:
        views: the whole recipe.
        images: uint8 [N], RGB images [h, w, 3] anywhere in it.
        offsets: int64 [B], where each of them begins.
        sizes: int32 [B, 2], height and width.
        boxes: int16 [V, B, 4] of all crops of all views, px.
        flipped: bool [V, B].
    """
    crops = crop_table(views)
    memory = layout(sizes, crops)
    scratch = np.empty(memory.total, np.uint8)
    cut_images = {
        view.name: torch.empty(
            (view.count, len(offsets), 3, view.size, view.size), dtype=torch.uint8
        )
        for view in cut_views(views)
    }
    targets = [crop.data_ptr() for by_crop in cut_images.values() for crop in by_crop]
    _cut_all(
        *(images, offsets, sizes),
        np.ascontiguousarray(boxes.swapaxes(0, 1)),
        np.ascontiguousarray(flipped.T),
        *(crops, np.array(targets, np.int64), scratch.ctypes.data, memory),
    )
    return cut_images


@nb.njit(nogil=True, error_model="numpy")
def _cut_all(
    images: np.ndarray,
    offsets: np.ndarray,
    sizes: np.ndarray,
    boxes: np.ndarray,
    flipped: np.ndarray,
    crops: np.ndarray,
    targets: np.ndarray,
    scratch: int,
    memory: Layout,
) -> None:
    """Cut every image; boxes [B, V, 4] and flipped [B, V], the rest as `cut` takes it."""
    for row in range(len(offsets)):
        height, width = int(sizes[row, 0]), int(sizes[row, 1])
        length = 3 * height * width
        image = nb.carray(pointer(scratch + memory.image), (length,), np.uint8)
        image[:] = images[offsets[row] : offsets[row] + length]
        cut(height, width, boxes[row], flipped[row], crops, targets, row, scratch, memory)
