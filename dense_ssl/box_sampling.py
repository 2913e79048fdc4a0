"""Single boxes, for `views`: free ones, ones near an anchor, ones pulled towards it.

A box here is (top, left, height, width) in pixels, an anchor (x0, y0, x1, y1). The sampler is written once,
over the draws it needs, and made twice: compiled, over this project's counter-based numbers, and in Python
over `random.Random`, where it repeats the published boxes.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

import numba as nb
import numpy as np

from dense_ssl.rng import uniform

MAX_SIDE_PX = 32767  # boxes are int16
HULL, MIRRORED_HULL, SHARED = range(3)  # what an anchor is of several crops
ATTEMPTS = 10  # of torchvision's RandomResizedCrop and of both constrained samplers


def _sampler(uniform: Callable[..., Any], below: Callable[..., Any]) -> Callable[..., Any]:
    def sample(rng, height, width, number, least, x0, y0, x1, y1):  # noqa: ANN001, ANN202
        """Return (top, left, height, width) of torchvision's RandomResizedCrop.

        With `least` >= 0 the first ATTEMPTS attempts count only where at least that share of their
        area, as sampled, lies in the anchor (x0, y0, x1, y1); after them come as many free ones.
        """
        constrained = ATTEMPTS if least >= 0 else 0
        for attempt in range(constrained + ATTEMPTS):
            at = 1 + 4 * attempt
            area = height * width * (number[0] + (number[1] - number[0]) * uniform(rng, at))
            ratio = np.exp(number[4] + (number[5] - number[4]) * uniform(rng, at + 1))
            w = np.int64(np.rint(np.sqrt(area * ratio)))
            h = np.int64(np.rint(np.sqrt(area / ratio)))
            if 0 < w <= width and 0 < h <= height:
                top = below(rng, at + 2, height - h + 1)
                left = below(rng, at + 3, width - w + 1)
                shared_h = max(min(top + h, y1) - max(top, y0), 0)
                shared_w = max(min(left + w, x1) - max(left, x0), 0)
                if attempt >= constrained or shared_h * shared_w >= least * area:
                    return top, left, h, w
        h, w = height, width
        if width / height < number[2]:
            h = max(np.int64(np.rint(width / number[2])), 1)
        elif width / height > number[3]:
            w = max(np.int64(np.rint(height * number[3])), 1)
        return (height - h) // 2, (width - w) // 2, h, w

    return sample


@nb.njit
def _below(key, counter, count):  # noqa: ANN001, ANN202
    return np.int64(uniform(key, counter) * count)


sample_box = nb.njit(error_model="numpy")(_sampler(uniform, _below))


@nb.njit(error_model="numpy")
def pull(start, extent, low, high, side, amount, least):  # noqa: ANN001, ANN201
    """Return `start` moved so that [start, start + extent) shares `amount` of the smaller extent.

    The published sampler works on the indices of first and last pixels, hence the ones taken off.
    `least` is `start`, or what the published code takes for it in the joint width.
    """
    reach = high - 1 - low
    joint = max(start + extent - 1, high - 1) - min(least, low)
    shift = np.float64(max(joint - extent - reach, 0))
    if joint >= extent + reach - amount * min(reach, extent):
        shift += amount * min(reach, extent)
    offset = (low + high - 1) / 2 - (start + start + extent - 1) / 2
    start += np.int64(np.rint(offset / (abs(offset) + 1e-5) * shift))
    return max(min(start, side - extent), 0)


@nb.njit(error_model="numpy")
def anchor_of(boxes, flipped, row, first, last, kind):  # noqa: ANN001, ANN201
    """Return (x0, y0, x1, y1): the anchor that the boxes first .. last - 1 of a row make.

    The box around all of them; or around their corners, of which mirrored crops have left and right
    exchanged; or the box they share, and where they share none again the one around all.
    """
    x0 = y0 = low_x1 = low_y1 = np.int64(MAX_SIDE_PX)
    x1 = y1 = high_x0 = high_y0 = np.int64(0)
    for v in range(first, last):
        left, right = np.int64(boxes[row, v, 0]), np.int64(boxes[row, v, 2]) - 1
        if kind == MIRRORED_HULL and flipped[row, v]:
            left, right = right, left
        top, bottom = np.int64(boxes[row, v, 1]), np.int64(boxes[row, v, 3])
        x0, high_x0 = min(x0, left), max(high_x0, left)
        x1, low_x1 = max(x1, right + 1), min(low_x1, right + 1)
        y0, high_y0 = min(y0, top), max(high_y0, top)
        y1, low_y1 = max(y1, bottom), min(low_y1, bottom)
    if kind == SHARED and high_x0 < low_x1 and high_y0 < low_y1:
        return high_x0, high_y0, low_x1, low_y1
    if x0 < x1:
        return x0, y0, x1, y1
    return x1 - 1, y0, x0 + 1, y1


# The same draws in Python


def _python_uniform(rng: random.Random, _: int) -> float:
    return rng.random()


def _python_below(rng: random.Random, _: int, count: int) -> int:
    return rng.randrange(count)


_python_sample = _sampler(_python_uniform, _python_below)


def free_box(
    size: Sequence[int], scale: Sequence[float], ratio: Sequence[float], rng: random.Random
) -> tuple[int, int, int, int]:
    """Return a free box of an image of `size` (height, width), as compiled boxes are but drawn from rng."""
    number = (*scale, *ratio, *np.log(ratio))
    top, left, height, width = _python_sample(rng, *size, number, -1.0, 0, 0, 0, 0)
    return int(top), int(left), int(height), int(width)


def constrained_box(
    size: Sequence[int],
    scale: Sequence[float],
    ratio: Sequence[float],
    anchor: Sequence[int],
    least: float,
    rng: random.Random,
) -> tuple[int, int, int, int]:
    """Return a box of which a share `least` lies in an anchor, as compiled boxes are but drawn from rng."""
    number = (*scale, *ratio, *np.log(ratio))
    top, left, height, width = _python_sample(rng, *size, number, least, *anchor)
    return int(top), int(left), int(height), int(width)


def pulled_box(
    size: Sequence[int],
    scale: Sequence[float],
    ratio: Sequence[float],
    anchor: Sequence[int],
    rng: random.Random,
    published: bool,
) -> tuple[int, int, int, int]:
    """Return a free box pulled until half of the smaller side is shared with an anchor.

    published: with the row in the place of the column that the published code puts there.
    """
    top, left, height, width = free_box(size, scale, ratio, rng)
    x0, y0, x1, y1 = anchor
    move = pull.py_func
    row = move(top, height, y0, y1, size[0], 0.5, top)
    column = move(left, width, x0, x1, size[1], 0.5, top if published else left)
    return int(row), int(column), height, width
