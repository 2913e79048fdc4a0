"""Binary masks to COCO polygons: outlines along the pixel edges, holes opened by a cut."""

import math

import numpy as np

MIN_PIECE_PX = 4  # smaller specks and holes are not worth a polygon


def mask_to_polygons(mask: np.ndarray, tolerance: float = 0.6) -> list[list[float]]:
    """Return polygons `[x0, y0, x1, y1, ...]` in pixels whose union covers `mask` (bool [H, W]).

    The pixel in column 0 spans x from 0 to 1, as in COCO. Vertices closer than `tolerance` pixels to
    the line between their neighbours are dropped (Douglas and Peucker 1973). COCO polygons have no
    holes, so a region with one is cut in two through the hole.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not rows.size:
        return []
    top, left = int(rows[0]), int(columns[0])
    tight = mask[top : rows[-1] + 1, left : columns[-1] + 1]
    polygons = []
    for loop in _outer_loops(tight):
        kept = _simplified(loop, tolerance)
        if len(kept) >= 3:
            polygons.append([float(c) for x, y in kept for c in (x + left, y + top)])
    return polygons


def _outer_loops(mask: np.ndarray) -> list[list[tuple[int, int]]]:
    """Outlines of the pieces of a mask, after cutting it until no piece has a hole."""
    outer = []
    for loop in _loops(mask):
        area = _signed_area(loop)
        if area >= MIN_PIECE_PX:
            outer.append(loop)
        elif area <= -MIN_PIECE_PX:
            xs = [x for x, _ in loop]
            cut = (min(xs) + max(xs)) // 2
            first, second = mask.copy(), mask.copy()
            first[:, cut:] = False
            second[:, :cut] = False
            return _outer_loops(first) + _outer_loops(second)
    return outer


def _loops(mask: np.ndarray) -> list[list[tuple[int, int]]]:
    """Closed paths along the pixel edges with the mask on their right; corners only.

    With y downwards, outlines have positive signed area and holes negative. Where two pixels touch
    at a corner only, the path turns right, so they stay apart.
    """
    padded = np.pad(mask, 1).astype(np.int8)
    down = np.diff(padded, axis=0)  # +1 entering the mask from above: that edge runs to the right
    across = np.diff(padded, axis=1)
    following: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for value, (dx, dy), edges in (
        (1, (1, 0), down),
        (-1, (-1, 0), down),
        (1, (0, -1), across),
        (-1, (0, 1), across),
    ):
        ys, xs = np.nonzero(edges == value)
        if edges is down:
            xs = xs - 1 + (dx < 0)  # an edge to the left starts at its right end
        else:
            ys = ys - 1 + (dy < 0)
        for x, y in zip(xs.tolist(), ys.tolist()):
            following.setdefault((x, y), []).append((dx, dy))
    loops = []
    while following:
        start = next(iter(following))
        point, heading, loop = start, (0, 0), []
        while point in following:
            choices = following[point]
            right = (-heading[1], heading[0])
            step = right if len(choices) > 1 and right in choices else choices[0]
            choices.remove(step)
            if not choices:
                del following[point]
            if step != heading:
                loop.append(point)
            heading = step
            point = (point[0] + step[0], point[1] + step[1])
        loops.append(loop)
    return loops


def _signed_area(loop: list[tuple[int, int]]) -> float:
    following = loop[1:] + loop[:1]
    return sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in zip(loop, following)) / 2


def _simplified(loop: list[tuple[int, int]], tolerance: float) -> list[tuple[int, int]]:
    """Douglas-Peucker on a closed path, split at its first point and the one farthest from it."""
    far = max(range(len(loop)), key=lambda i: math.dist(loop[0], loop[i]))
    keep = {0, far}
    spans = [(0, far), (far, len(loop))]
    closed = [*loop, loop[0]]
    while spans:
        first, last = spans.pop()
        if last - first < 2:
            continue
        (x0, y0), (x1, y1) = closed[first], closed[last]
        length = math.hypot(x1 - x0, y1 - y0) or 1.0
        worst, where = -1.0, first
        for i in range(first + 1, last):
            x, y = closed[i]
            distance = abs((x1 - x0) * (y - y0) - (y1 - y0) * (x - x0)) / length
            if distance > worst:
                worst, where = distance, i
        if worst > tolerance:
            keep.add(where)
            spans += [(first, where), (where, last)]
    return [loop[i] for i in sorted(keep)]
