"""The host cutter: crops of one decoded image, resized with Pillow's antialiased filters.

`cut` writes planar uint8 crops [3, S, S] straight to where the batch keeps them. It follows Pillow's
`resize(box=...)`: a filter as wide as the reduction, horizontal pass first, 8 bits in between; pixels
around the box are seen by the filter where the image has them. Weights have 15 bits (bilinear) or
14 (bicubic, whose weights reach beyond 1) where Pillow has 22: results differ from the exact
ones by one level in about 2 of 100 values. (Pillow may take the vertical pass first; where an
overshoot is clipped in between, that makes a larger difference in a few high-contrast pixels.)

How: the image is turned once into columns, so that the horizontal pass of every crop combines whole
columns, 32 rows to a vector; tiles of its result are turned back, and the vertical pass combines
rows, 32 pixels to a vector. Nothing is gathered. Mirroring is the order of the columns.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numba as nb
import numpy as np

from dense_ssl.loaders.simd import (
    LANES,
    TILE,
    add_product,
    add_product_wide,
    filled,
    filled_wide,
    narrowed,
    pointer,
    store_pixels,
    store_signed,
    transpose,
    transpose_centred,
)
from dense_ssl.views import ViewSpec, positions

_BITS_BILINEAR, _BITS_BICUBIC = 15, 14  # of the weights, after the binary point
_FEW = 32  # products whose rounding adds up to a quarter of a level at most
_LARGEST = 32767  # weight that an int16 holds

SLACK = LANES  # rows and bytes that may be read beyond an image: the caller's buffer has them


class Layout(NamedTuple):
    """Where the parts of one thread's scratch memory begin, in bytes, and how much they hold."""

    image: int  # uint8 [H, W, 3], for the caller to decode into
    columns: int  # int8 [3 * W, pitch], the image transposed and centred
    tile: int  # int8 [TILE, rows], some columns of the horizontal pass
    rows: int  # int8 [rows, S], the result of the horizontal pass
    edge: int  # uint8 [LANES], the end of an output row
    firsts: int  # int64 [2, S], first source pixel of every output pixel; x, then y
    counts: int  # int64 [2, S], and how many
    weights: int  # int16 [2, S, taps]
    exact: int  # float64 [taps]
    side: int  # the largest S
    taps: int  # the largest count
    total: int


def layout(sizes: np.ndarray, crops: np.ndarray) -> Layout:
    """Return the scratch memory for any image of `sizes`, int [n, 2], and these crops (`crop_table`).

    It is of the largest image, not of the greatest height by the greatest width: a data set may have
    panoramas of both kinds.
    """
    heights, widths = sizes.astype(np.int64).T
    side = int(crops[:, 1].max())
    reach = max(int(sizes.max()) / int(crops[:, 1].min()), 1.0)
    taps = int(4 * reach) + 3  # bicubic: two source pixels either side, times the reduction
    pitches = np.asarray(_pitch.py_func(heights))
    lines, wide = int(pitches.max()), -(-side // LANES) * LANES
    parts = {
        "image": int(((heights + SLACK) * widths).max()) * 3 + SLACK,
        "columns": int(((3 * widths + TILE) * pitches).max()) + LANES,
        "tile": TILE * lines,
        "rows": lines * wide,
        "edge": LANES,
        "firsts": 2 * side * 8,
        "counts": 2 * side * 8,
        "weights": 2 * side * taps * 2,
        "exact": taps * 8,
    }
    offsets, end = {}, 0
    for name, size in parts.items():
        offsets[name] = end
        end += -(-size // 64) * 64
    return Layout(**offsets, side=side, taps=taps, total=end)


def crop_table(views: Sequence[ViewSpec]) -> np.ndarray:
    """Return one row per crop to cut, int64 [C, 3]: position in the plan, S, and 1 for bicubic.

    Twins are left out: they show the pixels of the view they name.
    """
    where = positions(views)
    rows = [
        (position, view.size, int(view.filter == "bicubic"))
        for view in views
        if view.twin_of is None
        for position in range(where[view.name].start, where[view.name].stop)
    ]
    return np.array(rows, np.int64)


@nb.njit(nogil=True, error_model="numpy")
def cut(
    height: int,
    width: int,
    boxes: np.ndarray,
    flipped: np.ndarray,
    crops: np.ndarray,
    targets: np.ndarray,
    row: int,
    scratch: int,
    layout: Layout,
) -> None:
    """Cut all crops of the image [height, width, 3] that lies at `scratch + layout.image`.

    Args:
        height: of the image, px.
        width: of the image, px.
        boxes: int16 [V, 4], the image's row of the plan.
        flipped: bool [V].
        crops: `crop_table`.
        targets: int64 [C], address of the uint8 [B, 3, S, S] that holds each crop of the batch.
        row: position of the image in the batch.
        scratch: address of `layout.total` bytes that no other thread uses.
        layout: where things are in them.
    """
    pitch = _pitch(height)
    _turn(scratch + layout.image, height, width, scratch + layout.columns, pitch)
    for c in range(len(crops)):
        v, side, cubic = crops[c, 0], crops[c, 1], crops[c, 2] == 1
        shape = (2, side)
        first = nb.carray(pointer(scratch + layout.firsts), shape, np.int64)
        count = nb.carray(pointer(scratch + layout.counts), shape, np.int64)
        weights = nb.carray(pointer(scratch + layout.weights), (2, side, layout.taps), np.int16)
        exact = nb.carray(pointer(scratch + layout.exact), (layout.taps,), np.float64)
        for axis in range(2):
            low, high = int(boxes[v, axis]), int(boxes[v, axis + 2])
            extent = height if axis else width
            _weigh(low, high, extent, cubic, first[axis], count[axis], weights[axis], exact)
        _resize(
            scratch + layout.columns,
            pitch,
            bool(flipped[v]),
            cubic,
            first,
            count,
            scratch + layout.weights,
            layout.taps,
            scratch + layout.tile,
            scratch + layout.rows,
            scratch + layout.edge,
            targets[c] + row * 3 * side * side,
        )


@nb.njit(error_model="numpy")
def _turn(image: int, height: int, width: int, columns: int, pitch: int) -> None:
    """Write int8 columns[3 * x + channel, y] = image[y, x, channel] - 128; all by address.

    Runs over in whole tiles: beyond the image lies slack, beyond a column the padding of its pitch.
    """
    line = 3 * width
    for y in range(0, height, TILE):
        for x in range(0, line, TILE):
            transpose_centred(image + y * line + x, line, columns + x * pitch + y, pitch)


@nb.njit(error_model="numpy")
def _weigh(
    low: int,
    high: int,
    extent: int,
    cubic: bool,
    first: np.ndarray,
    count: np.ndarray,
    weights: np.ndarray,
    exact: np.ndarray,
) -> None:
    """Fill first [S], count [S] and weights [S, taps] for S pixels over [low, high) of `extent`.

    Pillow's: the filter's support is stretched by the reduction, cut at the image's border and
    normalised. Rounding is carried from weight to weight, so each sum is exact.
    """
    side = len(first)
    scale = (high - low) / side
    stretch = max(scale, 1.0)
    narrow = 1.0 / stretch
    support = 2.0 * stretch if cubic else stretch
    one = 1 << (_BITS_BICUBIC if cubic else _BITS_BILINEAR)
    for o in range(side):
        centre = low + (o + 0.5) * scale
        start = max(np.int64(centre - support + 0.5), 0)
        taps = min(np.int64(centre + support + 0.5), extent) - start
        total = 0.0
        for k in range(taps):
            x = abs(start + k + 0.5 - centre) * narrow
            if not cubic:
                value = max(1.0 - x, 0.0)
            elif x < 1.0:
                value = (1.5 * x - 2.5) * x * x + 1.0
            elif x < 2.0:
                value = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
            else:
                value = 0.0
            exact[k] = value
            total += value
        running, written = 0.0, 0
        for k in range(taps):
            running += exact[k] * (one / total)
            rounded = np.int64(np.rint(running))
            weights[o, k] = min(rounded - written, _LARGEST)
            written = rounded
        first[o], count[o] = start, taps


@nb.njit(error_model="numpy")
def _resize(
    columns: int,
    pitch: int,
    flipped: bool,
    cubic: bool,
    first: np.ndarray,
    count: np.ndarray,
    weights: int,
    taps: int,
    tile: int,
    rows: int,
    edge: int,
    target: int,
) -> None:
    """Write one crop, uint8 [3, S, S] at `target`, from the columns of the image; all by address."""
    side = first.shape[1]
    shift = (_BITS_BICUBIC if cubic else _BITS_BILINEAR) - 8
    top = first[1, 0]
    height = first[1, side - 1] + count[1, side - 1] - top
    lines, wide = _padded(height), _padded(side)
    step = 2 * taps
    horizontal, vertical = weights, weights + side * step
    for channel in range(3):
        for start in range(0, side, TILE):
            for j in range(min(TILE, side - start)):
                q = side - 1 - start - j if flipped else start + j
                source = columns + (3 * first[0, q] + channel) * pitch + top
                taps_at, row = horizontal + q * step, tile + j * lines
                # Two loops, because the choice costs a tenth of the time when made in the loop.
                if count[0, q] <= _FEW:
                    for y in range(0, lines, LANES):
                        lanes = _blend(source + y, 3 * pitch, taps_at, count[0, q], shift)
                        store_signed(row + y, lanes, shift)
                else:
                    for y in range(0, lines, LANES):
                        lanes = _blend_exactly(source + y, 3 * pitch, taps_at, count[0, q], shift)
                        store_signed(row + y, lanes, shift)
            for y in range(0, lines, TILE):
                transpose(tile + y, lines, rows + y * wide + start, wide)
        for o in range(side):
            source = rows + (first[1, o] - top) * wide
            taps_at, row = vertical + o * step, target + (channel * side + o) * side
            whole = side // LANES * LANES
            if count[1, o] <= _FEW:
                for q in range(0, whole, LANES):
                    lanes = _blend(source + q, wide, taps_at, count[1, o], shift)
                    store_pixels(row + q, lanes, shift)
            else:
                for q in range(0, whole, LANES):
                    lanes = _blend_exactly(source + q, wide, taps_at, count[1, o], shift)
                    store_pixels(row + q, lanes, shift)
            if whole < side:
                if count[1, o] <= _FEW:
                    lanes = _blend(source + whole, wide, taps_at, count[1, o], shift)
                else:
                    lanes = _blend_exactly(source + whole, wide, taps_at, count[1, o], shift)
                store_pixels(edge, lanes, shift)
                _copy(edge, row + whole, side - whole)


@nb.njit(error_model="numpy")
def _blend(source: int, pitch: int, weights: int, count: int, shift: int) -> Any:
    """Return the weighted sum of `count` vectors at distance `pitch`, ready to be shifted.

    Products are rounded down: half a unit for each, and half of the last place, make it round.
    """
    lanes = filled((1 << (shift - 1)) + (count >> 1))
    if count == 2:  # what enlarging takes, and half of all cases
        return add_product(add_product(lanes, source, weights), source + pitch, weights + 2)
    for k in range(count):
        lanes = add_product(lanes, source + k * pitch, weights + 2 * k)
    return lanes


@nb.njit(error_model="numpy")
def _blend_exactly(source: int, pitch: int, weights: int, count: int, shift: int) -> Any:
    """Return what `_blend` returns, without the rounding of products, for any number of them."""
    lanes = filled_wide(256 << (shift - 1))
    for k in range(count):
        lanes = add_product_wide(lanes, source + k * pitch, weights + 2 * k)
    return narrowed(lanes)


@nb.njit(error_model="numpy")
def _copy(source: int, target: int, count: int) -> None:
    written = nb.carray(pointer(target), (count,), np.uint8)
    read = nb.carray(pointer(source), (count,), np.uint8)
    for i in range(count):
        written[i] = read[i]


@nb.njit(error_model="numpy")
def _padded(count: int) -> int:
    """Return `count` rounded up to whole vectors."""
    return (count + LANES - 1) // LANES * LANES


@nb.njit(error_model="numpy")
def _pitch(height: int) -> int:
    """Return the distance of two columns: an odd number of vectors, so that caches take them all."""
    vectors = (height + LANES - 1) // LANES + 1
    return (vectors | 1) * LANES
