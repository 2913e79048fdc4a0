"""Region Collaborative Cutout: masks that take about the same share of every region of a view.

"Mind Your Augmentation: The Key to Decoupling Dense Self-Supervised Learning" (ICLR 2024). Nine overlapping
boxes, one around each cell of a 3 x 3 layout, cover a view. From the largest box to the smallest, cells are
cut until the wanted share of the box is; a box that earlier cuts took more of is restored first, whole.

Written over the one draw it needs, `uniform(rng, low, high)`, as the samplers of `masks` are.

Deviates: nothing, "rcc" being the published masks bit for bit, oddities included: a cut never reaches the
last row and column of a box, so that those of the grid are never masked. "rcc_unbiased" lets it.
"""

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np

LAYOUT = 3  # boxes along each side of the view
AREA = (0.12, 0.3)  # of a box before clipping, as a share of the view; uniform
ASPECT = (0.5, 2.0)  # width / height, log-uniform


def box_sampler(uniform: Callable[..., Any]) -> Callable[..., np.ndarray]:
    """Return `rcc_boxes`, which draws from its generator through `uniform`."""

    def rcc_boxes(rng, layout=LAYOUT, area=AREA, aspect=ASPECT):  # noqa: ANN001, ANN202
        """Return boxes [layout^2, 4], (x0, y0, x1, y1) in fractions of the view, clipped to it.

        Row-major; the centre of each lies in the middle half of its cell on both axes.
        """
        boxes = np.empty((layout * layout, 4))
        margin = 1 / (4 * layout)
        for cell in range(layout * layout):
            row, column = cell // layout, cell % layout
            size = uniform(rng, area[0], area[1])
            ratio = math.exp(uniform(rng, math.log(aspect[0]), math.log(aspect[1])))
            x = uniform(rng, column / layout + margin, (column + 1) / layout - margin)
            y = uniform(rng, row / layout + margin, (row + 1) / layout - margin)
            half_width, half_height = math.sqrt(size * ratio) / 2, math.sqrt(size / ratio) / 2
            boxes[cell, 0] = max(0.0, x - half_width)
            boxes[cell, 1] = max(0.0, y - half_height)
            boxes[cell, 2] = min(1.0, x + half_width)
            boxes[cell, 3] = min(1.0, y + half_height)
        return boxes

    return rcc_boxes


def cut_sampler(uniform: Callable[..., Any]) -> Callable[..., np.ndarray]:
    """Return `rcc_mask`, which draws from its generator through `uniform`."""

    def rcc_mask(boxes, height, width, ratio, rng, reach=0):  # noqa: ANN001, ANN202
        """Return bool [height, width], true where cut: about `ratio` of the cells of every box.

        `reach` is how far from a box's last row and column a cut may end: 0 short of them, as
        published, 1 anywhere in the box.
        """
        keep = np.ones((height, width), np.bool_)
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        for number in np.argsort(-areas, kind="mergesort"):
            box = boxes[number]
            # The published cells, both ends included; small grids keep at least one of each box.
            x0, y0 = min(round(box[0] * width), width - 1), min(round(box[1] * height), height - 1)
            x1, y1 = min(round(box[2] * width), width - 1), min(round(box[3] * height), height - 1)
            w, h = x1 - x0 + 1, y1 - y0 + 1
            region = keep[y0 : y1 + 1, x0 : x1 + 1]
            cut = 1 - region.sum() / (w * h)
            if cut > ratio:
                region[:] = True
                cut = 0.0
            wanted = (ratio - cut) * (w * h)
            aspect = w / h
            cut_w, cut_h = math.sqrt(wanted * aspect), math.sqrt(wanted / aspect)
            if cut_w == 0 or cut_h == 0:
                continue
            left = uniform(rng, 0.0, 1.0) * (w - 1 + reach - cut_w) + x0
            top = uniform(rng, 0.0, 1.0) * (h - 1 + reach - cut_h) + y0
            right, bottom = min(round(left + cut_w - 1), x1), min(round(top + cut_h - 1), y1)
            keep[max(round(top), 0) : bottom + 1, max(round(left), 0) : right + 1] = False
        return ~keep

    return rcc_mask


def rcc_sampler(
    boxes: Callable[..., Any], cut: Callable[..., Any], reach: int
) -> Callable[..., Any]:
    """Return a sampler with the arguments of those in `masks`: (height, width, ratio, rng)."""

    def rcc(height, width, ratio, rng):  # noqa: ANN001, ANN202
        return cut(boxes(rng), height, width, ratio, rng, reach)

    return rcc


rcc_boxes = box_sampler(random.Random.uniform)
rcc_mask = cut_sampler(random.Random.uniform)
