"""Cells of one crop looked for in another of the same image, and where the boxes say they are.

Cheap enough to be logged while training: `match_rates` takes a backbone and a batch, and nothing waits for
the device.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from dense_ssl.backbones import Backbone, Features
from dense_ssl.crops import Crops, MultiCropBatch, cell_centres, to_crop

TOLERANCES = {"same-cell": 0.5, "one-cell": 1.0}  # in cells, on either axis


@dataclass(frozen=True, slots=True)
class Matched:
    """Where the cells of one crop were found in another, and where they are."""

    best: Tensor  # int64 [B, N], the most similar key cell of each query cell
    expected: Tensor  # float [B, N, 2], (x, y) in key cells, 0.5 at the first one's centre; or NaN
    grid: tuple[int, int]  # rows and columns of the key cells


@torch.no_grad()
def match_rates(backbone: Backbone, batch: MultiCropBatch) -> dict[str, Tensor]:
    """Return the shares `same-cell` and `one-cell`, 0..1, for a training batch; 0-d, on its device.

    Matched are the first two crops of the first view that has two, normalised as the networks see them.
    NaN where no two overlap. Nothing waits for the device. The backbone is run as it is: put it into
    eval mode to leave running statistics alone.

    Raises:
        ValueError: no view has two crops.
    """
    crops = next((c for c in batch.views.values() if len(c.images) > 1), None)
    if crops is None:
        raise ValueError(f"none of the views {', '.join(batch.views)} has two crops to match")
    totals = counts(backbone, crops)
    return {name: (totals[i, 0] / totals[-1, 0]).float() for i, name in enumerate(TOLERANCES)}


def counts(backbone: Backbone, crops: Crops) -> Tensor:
    """Return what the cells of the first two crops of each image come to, float64 [T + 1, 2].

    For every tolerance the matches that are right, and those that would be had every cell been matched
    with the one at the same place of the other crop; last, twice, the cells that both crops show. Each
    crop's cells are looked for in the other.
    """
    first, second = (backbone(crops.images[v]) for v in (0, 1))
    return counts_of(first, second, crops.boxes[:2], crops.flipped[:2])


def counts_of(first: Features, second: Features, boxes: Tensor, flipped: Tensor) -> Tensor:
    """Return the same of features at hand; boxes [2, B, 4] and flipped [2, B] of the two crops."""
    there = matched(first, second, boxes, flipped)
    back = matched(second, first, boxes.flip(0), flipped.flip(0))
    return _counts(there) + _counts(back)


def matched(query: Features, key: Features, boxes: Tensor, flipped: Tensor) -> Matched:
    """Return where the cells of `query` are found in `key`.

    boxes: [2, B, 4] of the query and the key crop, fractions of the source images; flipped: bool [2, B].
    """
    q, k = (F.normalize(features.dense.float(), dim=2) for features in (query, key))
    best = (q @ k.transpose(1, 2)).argmax(2)
    centres = cell_centres(boxes[0], flipped[0], query.grid).flatten(1, 2)  # [B, N, 2]
    points = to_crop(centres, boxes[1, :, None], flipped[1, :, None])
    inside = ((points >= 0) & (points <= 1)).all(2, keepdim=True)
    rows, columns = key.grid
    places = points * torch.tensor([columns, rows], device=points.device)
    return Matched(best, places.masked_fill(~inside, torch.nan), key.grid)


def hits(found: Matched, tolerance: float) -> Tensor:
    """Return which cells are matched within `tolerance` cells, on both axes, of the truth, bool [B, N]."""
    columns = found.grid[1]
    x, y = found.best % columns + 0.5, found.best // columns + 0.5
    away = (torch.stack([x, y], dim=2) - found.expected).abs()
    return (away <= tolerance).all(2)


def _counts(found: Matched) -> Tensor:
    """For every tolerance: hits, and those of the same place; last the cells seen, twice. [T + 1, 2]."""
    places = torch.arange(found.best.shape[1], device=found.best.device)
    unmoved = replace(found, best=places.expand_as(found.best))
    seen = ~found.expected.isnan().any(2)
    rows = [
        torch.stack([hits(answer, t).sum() for answer in (found, unmoved)])
        for t in TOLERANCES.values()
    ]
    return torch.stack([*rows, seen.sum().expand(2)]).double()
