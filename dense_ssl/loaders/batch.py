"""Cut crops and plan rows put together into a MultiCropBatch, the same way for every loader."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from dense_ssl.config import UserError
from dense_ssl.crops import Crops, MultiCropBatch
from dense_ssl.views import CropPlan, ViewSpec, check_views, positions


def cut_views(views: Sequence[ViewSpec]) -> tuple[ViewSpec, ...]:
    """Return the views a loader has to cut: a twin shows the pixels of the view it names."""
    return tuple(view for view in views if view.twin_of is None)


def check_recipe(views: Sequence[ViewSpec], micro_batch: int) -> None:
    """Raise UserError unless the views can be drawn and every twin gets an image of each batch."""
    check_views(views)
    for view in views:
        if int(view.part * micro_batch) < 1:
            raise UserError(
                f"view {view.name!r}: part={view.part} of {micro_batch} images per micro-batch is "
                "less than one; enlarge the batch or the part"
            )


def assemble(
    views: Sequence[ViewSpec],
    images: Mapping[str, Tensor],
    plan: CropPlan,
    sizes: np.ndarray,
    index: np.ndarray,
    labels: np.ndarray,
) -> MultiCropBatch:
    """Return the batch of B images.

    Args:
        views: the whole recipe.
        images: uint8 [V, B, 3, S, S] of each of `cut_views(views)`, on any device.
        plan: the rows of these B images, in their order.
        sizes: int [B, 2], height and width of the source images.
        index: int64 [B], the records shown.
        labels: int64 [B].
    """
    device = next(iter(images.values())).device
    boxes = torch.from_numpy(plan.fractions(sizes).swapaxes(0, 1).copy()).to(device)
    flipped = torch.from_numpy(plan.flipped.T.copy()).to(device)
    return MultiCropBatch(
        views=crops_by_view(views, images, boxes, flipped),
        index=torch.from_numpy(np.asarray(index, np.int64).copy()),
        label=torch.from_numpy(np.asarray(labels, np.int64).copy()).to(device),
    )


def crops_by_view(
    views: Sequence[ViewSpec], images: Mapping[str, Tensor], boxes: Tensor, flipped: Tensor
) -> dict[str, Crops]:
    """Return the crops of every view, twins included.

    Args:
        views: the whole recipe.
        images: uint8 [V, B, 3, S, S] of each of `cut_views(views)`.
        boxes: float32 [V, B, 4] of all crops of all views, fractions of the source images.
        flipped: bool [V, B].
    """
    where = positions(views)
    count = boxes.shape[1]
    crops: dict[str, Crops] = {}
    for view in views:
        first = count - int(view.part * count)
        rows = (where[view.name], slice(first, None))
        shown = images[view.twin_of or view.name]
        crops[view.name] = Crops(shown[:, first:], boxes[rows], flipped[rows])
    return crops
