"""The crop plan against an independent version of it, which is itself held to published values."""

import math
import random

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from dense_ssl.config import UserError, validate
from dense_ssl.views import STREAM, CropPlan, Near, ViewSpec, check_views, draw_epoch, positions

MASK = (1 << 64) - 1


# --- the reference: plain Python, for any source of random numbers -----------------------------------


def attempt(height, width, scale, ratio, uniform, below):
    """One try of RandomResizedCrop: (sampled area, box or None), box = (top, left, height, width)."""
    area = height * width * uniform(*scale)
    aspect = math.exp(uniform(math.log(ratio[0]), math.log(ratio[1])))
    w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if not (0 < w <= width and 0 < h <= height):
        return area, None
    top = below(height - h + 1)
    return area, (top, below(width - w + 1), h, w)


def free_box(height, width, scale, ratio, tries):
    for uniform, below in tries:
        box = attempt(height, width, scale, ratio, uniform, below)[1]
        if box is not None:
            return box
    h, w = height, width
    if width / height < ratio[0]:
        h = max(round(width / ratio[0]), 1)
    elif width / height > ratio[1]:
        w = max(round(height * ratio[1]), 1)
    return (height - h) // 2, (width - w) // 2, h, w


def constrained_box(height, width, scale, ratio, anchor, amount, tries):
    """A free box, or one of ten with `amount` of its area in the anchor (top, left, height, width)."""
    for uniform, below in tries[:10]:
        area, box = attempt(height, width, scale, ratio, uniform, below)
        if box is not None:
            shared = [
                max(min(box[i] + box[i + 2], anchor[i] + anchor[i + 2]) - max(box[i], anchor[i]), 0)
                for i in (0, 1)
            ]
            if shared[0] * shared[1] >= amount * area:
                return box
    return free_box(height, width, scale, ratio, tries[10:])


def pulled_box(height, width, scale, ratio, reference, amount, tries, published=False):
    """A free box moved towards `reference`, (first row, first column, last row, last column).

    `published`: with the exchanged index of the authors' code.
    """
    i, j, h, w = free_box(height, width, scale, ratio, tries)
    ri, rj, r_last_i, r_last_j = reference
    rh, rw = r_last_i - ri, r_last_j - rj
    bh = max(i + h - 1, r_last_i) - min(i, ri)
    bw = max(j + w - 1, r_last_j) - min(i if published else j, rj)

    def moved(start, extent, reach, joint, first, last, side):
        shift = max(joint - extent - reach, 0)
        if joint >= extent + reach - amount * min(reach, extent):
            shift += amount * min(reach, extent)
        offset = (first + last) / 2 - (start + start + extent - 1) / 2
        start += round(offset / (abs(offset) + 1e-5) * shift)
        return max(min(start, side - extent), 0)

    top = moved(i, h, rh, bh, ri, r_last_i, height)
    return top, moved(j, w, rw, bw, rj, r_last_j, width), h, w


def test_reference_gives_the_published_constrained_crops():
    published = {
        (0, 640, 480): """32,248,435,379 38,122,370,435 111,258,142,178 48,256,154,125
                          75,158,205,208 169,483,152,119""",
        (1, 640, 480): """195,32,278,340 115,241,353,352 48,249,168,199 221,311,115,140
                          228,136,220,165 52,461,203,174""",
        (2, 427, 640): """86,188,292,230 18,74,360,305 326,100,151,201 260,95,165,203
                          137,18,167,162 163,232,195,180""",
    }
    for (seed, width, height), text in published.items():
        random.seed(seed)
        tries = [(random.uniform, random.randrange)] * 20
        large = [free_box(height, width, (0.2, 1), (3 / 4, 4 / 3), tries) for _ in range(2)]
        small = [
            constrained_box(height, width, (0.05, 0.14), (3 / 4, 4 / 3), large[1], 0.1, tries)
            for _ in range(4)
        ]
        wanted = [tuple(int(n) for n in box.split(",")) for box in text.split()]
        assert [*large, *small] == wanted


def test_reference_gives_the_published_referenced_crops():
    height, width, ratio = 375, 500, (3 / 4, 4 / 3)
    tries = [(random.uniform, random.randrange)] * 10
    random.seed(0)
    free = [free_box(height, width, (0.25, 1), ratio, tries) for _ in range(2)]
    assert free == [(16, 124, 349, 304), (38, 122, 297, 350)]
    published = [
        (0, (0.05, 0.25), (0.1, 0.6, 0.5, 0.9),
         "107,95,188,218 103,281,138,139 55,295,223,205 24,391,134,109"),
        (3, (0.25, 1), (0, 0, 0.5, 0.5),
         "47,29,280,287 38,3,329,345 2,59,363,342 33,49,332,410"),
    ]  # fmt: skip
    for seed, scale, (i0, j0, i1, j1), text in published:
        random.seed(seed)
        pixels = [round(i0 * 374), round(j0 * 499), round(i1 * 374), round(j1 * 499)]
        for wanted in text.split():
            box = pulled_box(height, width, scale, ratio, pixels, 0.5, tries, published=True)
            assert box == tuple(int(n) for n in wanted.split(","))


# --- the plan against the reference ----------------------------------------------------------------


def mix(x):
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def key_of(*parts):
    key = 0
    for part in parts:
        key = mix(key ^ mix(part))
    return key


class Draws:
    """The numbers of one crop: number 0 is the flip, four belong to each attempt."""

    def __init__(self, *parts):
        self.key = key_of(*parts)
        self.flip = self.unit(0)
        self.tries = [self.attempt(1 + 4 * number) for number in range(20)]

    def unit(self, counter):
        return (mix((self.key + counter * 0x9E3779B97F4A7C15) & MASK) >> 11) * 2.0**-53

    def attempt(self, first):
        counters = iter(range(first, first + 4))

        def uniform(low, high):
            return low + (high - low) * self.unit(next(counters))

        def below(count):
            return int(self.unit(next(counters)) * count)

        return uniform, below


def mirrored(boxes, flips, bottom):
    """(left, bottom, right) of the hull whose corners come the other way round in mirrored crops."""
    signed = [
        (j + w - 1, j) if flip else (j, j + w - 1) for (_, j, _, w), flip in zip(boxes, flips)
    ]
    ends = sorted((min(a for a, _ in signed), max(b for _, b in signed)))
    return ends[0], bottom, ends[1] + 1


def shared(boxes):
    """(top, left, bottom, right) of what boxes share, or None."""
    low = [max(box[k] for box in boxes) for k in (0, 1)]
    high = [min(box[k] + box[k + 2] for box in boxes) for k in (0, 1)]
    return (*low, *high) if low[0] < high[0] and low[1] < high[1] else None


def plan_slowly(views, sizes, seed, epoch, index):
    """What `draw_epoch` returns, one box at a time."""
    where = positions(views)
    boxes, flips = [], []
    for image in index:
        height, width = (int(side) for side in sizes[image])
        row, flipped = [], []
        for view in views:
            for number in range(view.count):
                at = len(row)
                if view.twin_of is not None:
                    row.append(row[where[view.twin_of].start + number])
                    flipped.append(flipped[where[view.twin_of].start + number])
                    continue
                draws = Draws(seed, STREAM, epoch, int(image), at)
                flipped.append(draws.flip < view.flip)
                area = (height, width, view.scale, view.ratio)
                anchor = None
                if view.near is not None:
                    of = view.near.of
                    name = of.split("(")[-1].split("[")[0].rstrip(")")
                    first, last = where[name].start, where[name].stop
                    if "[" in of:
                        first += int(of.split("[")[1][:-1])
                        last = first + 1
                    if last <= at:
                        i0, j0 = (min(b[k] for b in row[first:last]) for k in (0, 1))
                        i1, j1 = (max(b[k] + b[k + 2] for b in row[first:last]) for k in (0, 1))
                        anchor = (i0, j0, i1, j1)
                        if of.startswith("shared"):
                            anchor = shared(row[first:last]) or anchor
                        if of.startswith("mirrored"):
                            anchor = (i0, *mirrored(row[first:last], flipped[first:last], i1))
                if anchor is None:
                    row.append(free_box(*area, draws.tries[:10]))
                elif view.near.kind == "overlap":
                    i0, j0, i1, j1 = anchor
                    inside = (i0, j0, i1 - i0, j1 - j0)
                    row.append(constrained_box(*area, inside, view.near.amount, draws.tries))
                else:
                    i0, j0, i1, j1 = anchor
                    last = (i0, j0, i1 - 1, j1 - 1)
                    published = view.near.kind == "pull_published"
                    pulled = (last, view.near.amount, draws.tries[:10], published)
                    row.append(pulled_box(*area, *pulled))
        boxes.append([(left, top, left + w, top + h) for top, left, h, w in row])
        flips.append(flipped)
    return CropPlan(np.array(boxes), np.array(flips))


def near(kind, of, amount):
    return Near(kind=kind, of=of, amount=amount)


RECIPES = {
    "multi-crop": (
        ViewSpec(name="global", count=2, size=224, scale=(0.4, 1)),
        ViewSpec(name="local", count=8, size=96, scale=(0.05, 0.4), flip=0.2),
    ),
    "constrained": (
        ViewSpec(name="large", count=2, size=160),
        ViewSpec(name="small", count=4, size=96, scale=(0.05, 0.14),
                 near=near("overlap", "large[1]", 0.1)),
    ),
    "hardly satisfiable": (
        ViewSpec(name="large", count=1, size=96, scale=(0.01, 0.02)),
        ViewSpec(name="small", count=3, size=96, scale=(0.01, 0.2), ratio=(0.2, 5),
                 near=near("overlap", "large[0]", 0.5)),
    ),
    "pulled": (
        ViewSpec(name="global", count=2, size=224, scale=(0.25, 1),
                 near=near("pull", "global[0]", 0.5)),
        ViewSpec(name="local", count=6, size=96, scale=(0.05, 0.25),
                 near=near("pull", "hull(global)", 0.5)),
    ),
    "pulled into what is shared": (
        ViewSpec(name="global", count=2, size=224, scale=(0.05, 0.5)),  # or into the hull
        ViewSpec(name="local", count=2, size=96, scale=(0.05, 0.25),
                 near=near("pull", "shared(global)", 0.5)),
    ),
    "pulled as published": (
        ViewSpec(name="global", count=2, size=224, scale=(0.25, 1),
                 near=near("pull_published", "global[0]", 0.5)),
        ViewSpec(name="local", count=3, size=96, scale=(0.05, 0.25),
                 near=near("pull_published", "mirrored_hull(global)", 0.5)),
    ),
    "twins": (
        ViewSpec(name="global", count=2, size=224),
        ViewSpec(name="twin", count=2, size=224, twin_of="global", part=0.25),
        ViewSpec(name="local", count=1, size=96, near=near("overlap", "hull(twin)", 0.3)),
    ),
}  # fmt: skip


def some_sizes(count, low=1, high=700):
    sizes = np.random.default_rng(0).integers(low, high, (count, 2)).astype(np.int32)
    sizes[:6] = [(1, 1), (1, 500), (500, 1), (100, 32767), (32767, 3), (224, 224)]
    return sizes


@pytest.mark.parametrize("recipe", RECIPES)
def test_plan_equals_the_reference_bit_for_bit(recipe):
    views, sizes = RECIPES[recipe], some_sizes(150)
    index = np.arange(len(sizes))
    for seed, epoch in ((0, 0), (7, 3), (2**40, 11)):
        plan = draw_epoch(views, sizes, seed, epoch)
        slow = plan_slowly(views, sizes, seed, epoch, index)
        assert plan.boxes.dtype == np.int16
        np.testing.assert_array_equal(plan.boxes, slow.boxes)
        np.testing.assert_array_equal(plan.flipped, slow.flipped)


def test_a_row_does_not_depend_on_what_else_is_drawn():
    views, sizes = RECIPES["constrained"], some_sizes(40_000)  # several tasks, several threads
    whole = draw_epoch(views, sizes, 1, 2)
    index = np.random.default_rng(1).permutation(len(sizes))[:5000]
    part = draw_epoch(views, sizes, 1, 2, index)
    np.testing.assert_array_equal(part.boxes, whole.boxes[index])
    np.testing.assert_array_equal(part.flipped, whole.flipped[index])
    empty = draw_epoch(views, sizes, 1, 2, index[:0])
    assert empty.boxes.shape == (0, 6, 4)


def test_seed_epoch_image_and_crop_all_change_the_box():
    views = (ViewSpec(name="a", count=2, size=8),)
    sizes = np.full((2, 2), 400, np.int32)
    boxes = [draw_epoch(views, sizes, s, e).boxes for s, e in ((0, 0), (0, 1), (1, 0))]
    rows = np.concatenate(boxes).reshape(-1, 4)
    assert len(np.unique(rows, axis=0)) == len(rows)


def distance(a, b):
    """The Kolmogorov-Smirnov statistic of two samples."""
    at = np.sort(np.concatenate([a, b]))
    shares = [np.searchsorted(np.sort(x), at, side="right") / len(x) for x in (a, b)]
    return np.abs(shares[0] - shares[1]).max()


@pytest.mark.parametrize("size", [(375, 500), (480, 200), (60, 400)])
@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.05, 0.14)])
def test_boxes_are_distributed_as_torchvisions(size, scale):
    count, (height, width) = 4000, size
    view = ViewSpec(name="a", count=1, size=8, scale=scale)
    boxes = draw_epoch([view], np.tile(np.array([size], np.int32), (count, 1)), 0, 0).boxes[:, 0]
    x0, y0, x1, y1 = boxes.T.astype(float)
    ours = {"top": y0, "left": x0, "h": y1 - y0, "w": x1 - x0}
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    drawn = [RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(count)]
    top, left, h, w = np.array(drawn, float).T
    theirs = {"top": top, "left": left, "h": h, "w": w}
    for quantity in (
        *(lambda b, k=k: b[k] for k in ours),
        lambda b: b["h"] * b["w"],
        lambda b: b["w"] / b["h"],
        lambda b: b["top"] + b["h"] / 2,
    ):
        critical = 1.95 * math.sqrt(2 / count)  # exceeded by chance once in a thousand
        assert distance(quantity(ours), quantity(theirs)) < critical


def test_flips_come_as_often_as_asked():
    views = [ViewSpec(name=str(p), count=1, size=8, flip=p) for p in (0, 0.3, 1)]
    shares = draw_epoch(views, np.full((20_000, 2), 99, np.int32), 0, 0).flipped.mean(axis=0)
    assert shares[0] == 0
    assert shares[2] == 1
    assert abs(shares[1] - 0.3) < 0.02


def spec(name, count=1, **changes):
    return ViewSpec(name=name, count=count, size=8, **changes)


@pytest.mark.parametrize("flip", [0, 1])
def test_the_mirrored_hull_of_mirrored_crops_is_what_they_share_from_left_to_right(flip):
    views = (
        spec("global", 2, scale=(0.3, 0.6), flip=flip, near=near("pull", "global[0]", 0.5)),
        spec("local", scale=(0.01, 0.02), near=near("pull", "mirrored_hull(global)", 0.5)),
    )
    boxes = draw_epoch(views, np.full((2000, 2), 400, np.int32), 0, 0).boxes
    inside, reach = {}, {"rows": (1, 3), "columns": (0, 2)}
    for axis, (low, high) in reach.items():
        shared = (boxes[:, :2, low].max(axis=1), boxes[:, :2, high].min(axis=1))
        local = boxes[:, 2, low], boxes[:, 2, high]
        common = np.minimum(shared[1], local[1]) - np.maximum(shared[0], local[0])
        inside[axis] = common >= (local[1] - local[0]) / 2 - 2
    assert inside["columns"].all() == bool(flip)
    assert 0.3 < inside["rows"].mean() < 0.99


def share_of_first(box, other):
    """How much of each of the boxes [n, 4] lies in the other [n, 4]."""
    low, high = np.maximum(box[:, :2], other[:, :2]), np.minimum(box[:, 2:], other[:, 2:])
    shared = np.clip(high - low, 0, None).prod(axis=1)
    return shared / (box[:, 2:] - box[:, :2]).prod(axis=1)


def test_constraints_hold():
    sizes = np.random.default_rng(2).integers(200, 700, (3000, 2)).astype(np.int32)
    boxes = draw_epoch(RECIPES["constrained"], sizes, 0, 0).boxes.astype(float)
    for small in range(2, 6):
        share = share_of_first(boxes[:, small], boxes[:, 1])
        assert (share > 0.099).mean() > 0.999  # ten attempts, then a free one
        assert share.mean() < 0.95  # it is a constraint, not a nesting
    boxes = draw_epoch(RECIPES["pulled"], sizes, 0, 0).boxes.astype(float)
    low = np.maximum(boxes[:, 0, :2], boxes[:, 1, :2])
    high = np.minimum(boxes[:, 0, 2:], boxes[:, 1, 2:])
    sides = np.minimum(*(boxes[:, v, 2:] - boxes[:, v, :2] for v in (0, 1)))
    assert ((high - low) / sides > 0.45).all()
    hull = np.concatenate([boxes[:, :2, :2].min(axis=1), boxes[:, :2, 2:].max(axis=1)], axis=1)
    for local in range(2, 8):
        assert (share_of_first(boxes[:, local], hull) > 0.2).all()


def test_twins_have_the_boxes_and_flips_of_their_view():
    plan = draw_epoch(RECIPES["twins"], some_sizes(50), 0, 0)
    np.testing.assert_array_equal(plan.boxes[:, 2:4], plan.boxes[:, :2])
    np.testing.assert_array_equal(plan.flipped[:, 2:4], plan.flipped[:, :2])


def test_fractions_are_boxes_over_sides():
    sizes = np.array([[100, 200], [50, 80]], np.int32)
    plan = draw_epoch(RECIPES["multi-crop"], sizes, 0, 0)
    fractions = plan.fractions(sizes)
    assert fractions.dtype == np.float32
    np.testing.assert_allclose(fractions[1, :, 0] * 80, plan.boxes[1, :, 0], rtol=1e-6)
    np.testing.assert_allclose(fractions[0, :, 3] * 100, plan.boxes[0, :, 3], rtol=1e-6)


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ((spec("a", near=near("pull", "b[0]", 0.5)),
          spec("b")), "not drawn earlier: put view 'b' before 'a'"),
        ((spec("a", near=near("pull", "a[0]", 0.5)),), "not drawn earlier: no crop"),
        ((spec("a", 2, near=near("pull", "hull(a)", 0.5)),), "not drawn earlier: no crop"),
        ((spec("a", 2),
          spec("b", near=near("overlap", "a[2]", 0.5))), "only 2 crops"),
        ((spec("a", near=near("overlap", "c[0]", 0.5)),), "names no view"),
        ((spec("a", near=near("overlap", "a", 0.5)),), "is not understood"),
        ((spec("a"), spec("a")), "same name"),
        ((spec("a", twin_of="b"), spec("b")),
         "not drawn earlier"),
        ((spec("a"), spec("b", 2, twin_of="a")),
         "same count, size and filter"),
        ((spec("a"), spec("b", twin_of="a"),
          spec("c", twin_of="b")), "name 'a'"),
        ((spec("a", twin_of="x"),), "names no view"),
    ],
)  # fmt: skip
def test_a_recipe_that_cannot_be_drawn_is_refused(views, message):
    with pytest.raises(UserError, match=message):
        check_views(views)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": (0.5, 0.2)}, "0 < low <= high <= 1"),
        ({"scale": (0, 1)}, "0 < low <= high <= 1"),
        ({"ratio": (2, 1)}, "ratio of view 'a'"),
        ({"photometric": ("moco_v2",)}, "2 crops but 1"),
        ({"part": 0.5}, "belongs to a twin"),
        ({"twin_of": "b", "near": near("pull", "b[0]", 0.5)}, "drop `near`"),
    ],
)
def test_a_view_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        validate(ViewSpec, {"name": "a", "count": 2, "size": 8, **changes}, "here")


@pytest.mark.parametrize("size", [(0, 10), (10, 32768)])
def test_sides_that_do_not_fit_are_refused(size):
    sizes = np.array([(50, 50), size], np.int32)
    with pytest.raises(UserError, match="image 1 is"):
        draw_epoch(RECIPES["multi-crop"], sizes, 0, 0)
