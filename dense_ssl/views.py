"""The crop plan: which pixels every view takes, decided before any image is opened.

`draw_epoch` draws the boxes and flips of a whole epoch as one table; loaders only execute it. Every
box is a pure function of `(seed, epoch, image index, crop position)`, so ranks, subsets, loaders and
resumed runs agree without talking to each other.

Boxes follow torchvision's RandomResizedCrop: up to ten attempts, then a centred box. A view may also
have to lie near one drawn before it:

* `overlap`: an attempt counts only when at least `amount` of its sampled area lies in the anchor;
  after ten refusals one free box is taken (constrained multi-crop, arXiv:2106.05967, section 3).
* `pull`: a free box is moved towards the anchor until both share about `amount` of the smaller side
  on each axis (referenced crops, arXiv:2407.17671). Deviates: the published code mixes up two indices
  in the joint width; here the width is computed the way the height is. `pull_published` mixes them up.

An anchor is one crop, or of a view's crops the `hull` or what they have `shared`; shared boxes are what
the same code means to pull local crops to, so that they lie in both global ones. What it pulls them to is
their `mirrored_hull`, of corners that mirrored crops have the other way round: the hull from top to
bottom, from left to right the hull, or of two mirrored crops what they share, or something between.
"""

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Literal

import numba as nb
import numpy as np
from pydantic import Field, model_validator

from dense_ssl.box_sampling import (
    HULL,
    MAX_SIDE_PX,
    MIRRORED_HULL,
    SHARED,
    anchor_of,
    pull,
    sample_box,
)
from dense_ssl.config import Config, UserError
from dense_ssl.rng import fold, key_of, uniform

STREAM = int.from_bytes(b"boxes", "big")  # this module's branch of the random numbers of a seed

_FREE, _OVERLAP, _PULL, _PULL_PUBLISHED, _TWIN = range(5)
_KINDS = {"overlap": _OVERLAP, "pull": _PULL, "pull_published": _PULL_PUBLISHED}
_ANCHORS = {"hull": HULL, "mirrored_hull": MIRRORED_HULL, "shared": SHARED}
_ANCHOR = re.compile(
    r"(?:(?P<kind>hull|mirrored_hull|shared)\((?P<crops>[^()\[\]]+)\)"
    r"|(?P<name>[^()\[\]]+)\[(?P<position>\d+)\])"
)
_IMAGES_PER_TASK = 16384


class Near(Config):
    """Where a view must lie relative to one drawn before it."""

    kind: Literal["overlap", "pull", "pull_published"]
    of: str  # "large[1]" for one crop; "hull(global)", "shared(global)", "mirrored_hull(global)"
    amount: Annotated[float, Field(ge=0, le=1)]


class ViewSpec(Config):
    """One kind of crop: how many, how large, from where, and which colours it gets.

    `near.of` may name a crop of the view itself ("global[0]" in `global`): the crops up to that one
    are free, those after it lie near it. A twin takes boxes and flips from the view it names, so its
    own `scale`, `ratio` and `flip` are not used.
    """

    name: str
    count: Annotated[int, Field(ge=1)]
    size: Annotated[int, Field(ge=1)]  # side S in pixels
    scale: tuple[float, float] = (0.2, 1.0)  # share of the source area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height
    flip: Annotated[float, Field(ge=0, le=1)] = 0.5  # probability of a left-right mirror
    filter: Literal["bilinear", "bicubic"] = "bilinear"  # Pillow's antialiased filters
    photometric: str | tuple[str, ...] = "none"  # one policy, or one per crop
    near: Near | None = None
    twin_of: str | None = None  # same boxes as that view, second photometric draw
    part: Annotated[float, Field(gt=0, le=1)] = 1.0  # twin: only the last share of the batch

    @model_validator(mode="after")
    def _check(self) -> "ViewSpec":
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale of view {self.name!r} must satisfy 0 < low <= high <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio of view {self.name!r} must satisfy 0 < low <= high")
        if not isinstance(self.photometric, str) and len(self.photometric) != self.count:
            raise ValueError(
                f"view {self.name!r} has {self.count} crops but {len(self.photometric)} "
                "photometric policies: give one, or one per crop"
            )
        if self.twin_of is None and self.part != 1:
            raise ValueError(f"view {self.name!r}: `part` belongs to a twin; set twin_of")
        if self.twin_of is not None and self.near is not None:
            raise ValueError(f"view {self.name!r}: a twin has its boxes already; drop `near`")
        return self


@dataclass(frozen=True, slots=True)
class CropPlan:
    """Boxes and flips of n images, V crops each: all crops of all ViewSpecs in their order."""

    boxes: np.ndarray  # int16 [n, V, 4], pixels (x0, y0, x1, y1) of the source image
    flipped: np.ndarray  # bool [n, V], mirrored left-right after cutting

    def fractions(self, sizes: np.ndarray) -> np.ndarray:
        """Return the boxes in fractions of images of `sizes` (int [n, 2], height and width).

        float32 [n, V, 4].
        """
        sides = sizes[:, None, [1, 0, 1, 0]].astype(np.float32)
        return self.boxes.astype(np.float32) / sides


def positions(views: Sequence[ViewSpec]) -> dict[str, slice]:
    """Return where the crops of each view stand on the V axis of a plan."""
    result: dict[str, slice] = {}
    start = 0
    for view in views:
        result[view.name] = slice(start, start + view.count)
        start += view.count
    return result


def check_views(views: Sequence[ViewSpec]) -> None:
    """Raise UserError unless every view can be drawn after the ones it refers to."""
    _compile(views)


def draw_epoch(
    views: Sequence[ViewSpec],
    sizes: np.ndarray,
    seed: int,
    epoch: int,
    index: np.ndarray | None = None,
) -> CropPlan:
    """Return the boxes and flips of one epoch.

    Args:
        views: the recipe, anchors before the views that lie near them.
        sizes: int [n, 2], height and width in pixels of every image of the data set.
        seed: of the run.
        epoch: counted from 0.
        index: int [m], the images wanted, in the order of the result; all by default.

    Raises:
        UserError: an anchor is not drawn earlier, or an image has a side above 32767 px.
    """
    rules, numbers = _compile(views)
    if index is None:
        index = np.arange(len(sizes), dtype=np.int64)
    _check_sizes(sizes)
    sizes = np.ascontiguousarray(sizes, dtype=np.int32)
    index = np.ascontiguousarray(index, dtype=np.int64)
    key = key_of(seed, STREAM, epoch)
    plan = CropPlan(
        boxes=np.empty((len(index), len(rules), 4), np.int16),
        flipped=np.empty((len(index), len(rules)), np.bool_),
    )

    def fill(start: int) -> None:
        part = slice(start, start + _IMAGES_PER_TASK)
        _draw(plan.boxes[part], plan.flipped[part], sizes, index[part], key, rules, numbers)

    # Plain threads instead of numba's: its threading layers do not all bear a second parallel loop
    # in the thread of a loader, and this one compiles in a third of the time.
    starts = range(0, len(index), _IMAGES_PER_TASK)
    if len(starts) <= 1:
        fill(0)
    else:
        with ThreadPoolExecutor(min(len(starts), os.cpu_count() or 1)) as pool:
            list(pool.map(fill, starts))
    return plan


def _compile(views: Sequence[ViewSpec]) -> tuple[np.ndarray, np.ndarray]:
    """Return the recipe of V crops as two tables: int64 [V, 4] and float64 [V, 8].

    The first holds kind, first, last and the kind of the anchor that crops first .. last - 1 make. The
    second holds scale (low, high), ratio (low, high), its logarithm (low, high), flip and amount.
    """
    where = positions(views)
    if len(where) != len(views):
        raise UserError(f"views: two of them have the same name among {[v.name for v in views]}")
    by_name = {view.name: view for view in views}
    rules, numbers = [], []
    for view in views:
        own = where[view.name]
        for position in range(own.start, own.stop):
            rule, amount = (_FREE, 0, 0, 0), 0.0
            if view.twin_of is not None:
                first = _twin_anchor(view, by_name, where).start + position - own.start
                rule = (_TWIN, first, first + 1, 0)
            elif view.near is not None:
                anchor, what = _anchor(view, where)
                if anchor.stop <= position:
                    rule = (_KINDS[view.near.kind], anchor.start, anchor.stop, what)
                    amount = view.near.amount
            log_ratio = np.log(view.ratio)
            rules.append(rule)
            numbers.append((*view.scale, *view.ratio, *log_ratio, view.flip, amount))
    return np.array(rules, np.int64), np.array(numbers, np.float64)


def _anchor(view: ViewSpec, where: dict[str, slice]) -> tuple[slice, int]:
    """Return the positions that `view` lies near, and how; they all come before its last crop."""
    assert view.near is not None
    key = f"view {view.name!r}: near.of={view.near.of!r}"
    match = _ANCHOR.fullmatch(view.near.of)
    if match is None:
        raise UserError(f'{key} is not understood: write "name[0]" or "hull(name)"')
    name = match["crops"] or match["name"]
    if name not in where:
        raise UserError(f"{key} names no view; there are {', '.join(where)}")
    crops = where[name]
    if match["position"] is not None:
        position = crops.start + int(match["position"])
        if position >= crops.stop:
            raise UserError(f"{key}: {name} has only {crops.stop - crops.start} crops")
        crops = slice(position, position + 1)
    if crops.stop >= where[view.name].stop:
        remedy = f"put view {name!r} before {view.name!r}"
        if name == view.name:
            remedy = "no crop of the view comes after it"
        raise UserError(f"{key} is not drawn earlier: {remedy}")
    return crops, _ANCHORS[match["kind"] or "hull"]


def _twin_anchor(view: ViewSpec, by_name: dict[str, ViewSpec], where: dict[str, slice]) -> slice:
    """Return the positions of the view whose crops `view` repeats."""
    assert view.twin_of is not None
    key = f"view {view.name!r}: twin_of={view.twin_of!r}"
    other = by_name.get(view.twin_of)
    if other is None:
        raise UserError(f"{key} names no view; there are {', '.join(where)}")
    if where[other.name].start >= where[view.name].start:
        raise UserError(f"{key} is not drawn earlier: put view {other.name!r} before it")
    if (other.count, other.size, other.filter) != (view.count, view.size, view.filter):
        raise UserError(f"{key}: twins need the same count, size and filter")
    if other.twin_of is not None:
        raise UserError(f"{key} is a twin itself: name {other.twin_of!r}")
    return where[other.name]


def _check_sizes(sizes: np.ndarray) -> None:
    if sizes.ndim != 2 or sizes.shape[1] != 2:
        raise ValueError(f"sizes must be [n, 2], got {sizes.shape}")
    if len(sizes) and not (sizes.min() >= 1 and sizes.max() <= MAX_SIDE_PX):
        bad = int(np.flatnonzero((sizes.min(axis=1) < 1) | (sizes.max(axis=1) > MAX_SIDE_PX))[0])
        height, width = sizes[bad]
        raise UserError(
            f"image {bad} is {width} x {height} px: sides must lie in 1 .. {MAX_SIDE_PX}; "
            "convert the data with a smaller SIZE"
        )


@nb.njit(nogil=True, error_model="numpy")
def _draw(boxes, flipped, sizes, index, epoch_key, rules, numbers):  # noqa: ANN001, ANN202
    """Fill boxes [m, V, 4] and flipped [m, V] for the images `index`."""
    for row in range(len(index)):
        image_key = fold(epoch_key, index[row])
        height, width = np.int64(sizes[index[row], 0]), np.int64(sizes[index[row], 1])
        for v in range(len(rules)):
            kind, first, last, what = rules[v, 0], rules[v, 1], rules[v, 2], rules[v, 3]
            if kind == _TWIN:
                for side in range(4):
                    boxes[row, v, side] = boxes[row, first, side]
                flipped[row, v] = flipped[row, first]
                continue
            key = fold(image_key, v)
            flipped[row, v] = uniform(key, 0) < numbers[v, 6]
            # All kinds, one call site of the sampler: what is compiled stays small.
            amount = numbers[v, 7]
            x0 = y0 = np.int64(0)
            x1, y1 = width, height
            if kind != _FREE:
                x0, y0, x1, y1 = anchor_of(boxes, flipped, row, first, last, what)
            least = amount if kind == _OVERLAP else -1.0
            top, left, h, w = sample_box(key, height, width, numbers[v], least, x0, y0, x1, y1)
            if kind in (_PULL, _PULL_PUBLISHED):
                least_left = top if kind == _PULL_PUBLISHED else left
                top = pull(top, h, y0, y1, height, amount, top)
                left = pull(left, w, x0, x1, width, amount, least_left)
            boxes[row, v, 0] = left
            boxes[row, v, 1] = top
            boxes[row, v, 2] = left + w
            boxes[row, v, 3] = top + h
