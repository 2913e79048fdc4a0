"""Geometry of crops against brute force, published values and the definition of a mirror."""

import pytest
import torch
import torch.nn.functional as F

from dense_ssl.crops import (
    Crops,
    MultiCropBatch,
    area,
    cell_centres,
    hull,
    overlap,
    sampling_grid,
    to_crop,
    to_source,
)


def _boxes(*shape):
    low = torch.rand(*shape, 2) * 0.6
    return torch.cat([low, low + 0.1 + torch.rand(*shape, 2) * 0.3], dim=-1)


def test_overlap_agrees_with_counting_pixels():
    side = 60
    corner = torch.randint(0, 40, (50, 2, 2))
    pixels = torch.cat([corner, corner + torch.randint(1, 21, (50, 2, 2))], dim=-1)
    shared, meets = overlap(pixels[:, 0] / side, pixels[:, 1] / side)
    for (a, b), box, valid in zip(pixels.tolist(), shared, meets):
        masks = torch.zeros(2, side, side)
        for mask, (x0, y0, x1, y1) in zip(masks, (a, b)):
            mask[y0:y1, x0:x1] = 1
        counted = (masks[0] * masks[1]).sum() / side**2
        assert valid == (counted > 0)
        torch.testing.assert_close(area(box), counted, atol=1e-5, rtol=0)


def test_boxes_that_touch_share_nothing():
    shared, meets = overlap(torch.tensor([0.0, 0, 0.5, 1]), torch.tensor([0.5, 0, 1, 1]))
    assert not meets
    assert area(shared) == 0


def test_hull_holds_every_crop_and_no_more():
    boxes = _boxes(4, 7)
    around = hull(boxes)
    assert around.shape == (7, 4)
    assert torch.equal(around[:, :2], boxes[..., :2].min(dim=0).values)
    assert torch.equal(around[:, 2:], boxes[..., 2:].max(dim=0).values)


def test_to_crop_undoes_to_source():
    boxes, flipped, points = _boxes(3, 5), torch.rand(3, 5) < 0.5, torch.rand(3, 5, 2)
    there = to_source(points, boxes, flipped)
    torch.testing.assert_close(to_crop(there, boxes, flipped), points)


def test_a_mirrored_crop_has_its_cells_in_reverse():
    boxes = _boxes(6)
    plain = cell_centres(boxes, torch.zeros(6, dtype=torch.bool), (3, 4))
    mirrored = cell_centres(boxes, torch.ones(6, dtype=torch.bool), (3, 4))
    assert plain.shape == (6, 3, 4, 2)
    torch.testing.assert_close(mirrored, plain.flip(2))


def test_cell_centres_are_the_means_of_the_pixels_a_cell_covers():
    """The features that a network would see, pooled from an image of its own coordinates."""
    side = 32
    box, flipped = torch.tensor([0.25, 0.125, 0.75, 0.625]), torch.tensor(True)
    axis = (torch.arange(side) + 0.5) / side
    image = torch.stack(torch.meshgrid(axis, axis, indexing="xy"))  # x, y
    crop = image[:, 4:20, 8:24].flip(2)
    cells = F.avg_pool2d(crop[None], 4)[0].permute(1, 2, 0)
    torch.testing.assert_close(cell_centres(box, flipped, (4, 4)), cells)


@pytest.mark.parametrize(
    ("a", "b", "xy_a", "xy_b"),
    [  # published values of the overlap grids of SERE, size 3; rectangles (x, y, w, h, flip)
        (
            (10, 20, 200, 150, 0),
            (60, 0, 180, 120, 1),
            ((-0.5, 0.25, 1), (-1, -0.333333, 0.333333)),
            ((1, 0.166667, -0.666667), (-0.666667, 0.166667, 1)),
        ),
        (
            (0, 0, 50, 50, 0),
            (49, 0, 50, 50, 1),
            ((0.96, 0.98, 1), (-1.0, 0, 1)),
            ((1, 0.98, 0.96), (-1.0, 0, 1)),
        ),
    ],
)
def test_sampling_grids_have_the_published_values(a, b, xy_a, xy_b):
    side = 400.0

    def box(x, y, w, h, _):
        return torch.tensor([x, y, x + w, y + h]) / side

    region, meets = overlap(box(*a), box(*b))
    assert meets
    for rectangle, (x, y) in ((a, xy_a), (b, xy_b)):
        grid = sampling_grid(region, box(*rectangle), torch.tensor(rectangle[4] == 1), 3)
        torch.testing.assert_close(grid[0, :, 0], torch.tensor(x), atol=2e-5, rtol=0)
        torch.testing.assert_close(grid[:, 0, 1], torch.tensor(y), atol=2e-5, rtol=0)
        assert torch.equal(grid[..., 0], grid[:1, :, 0].expand(3, 3))


def test_grids_of_two_crops_point_at_the_same_source_pixels():
    a, b = _boxes(8), _boxes(8)
    flips = torch.rand(2, 8) < 0.5
    region, meets = overlap(a, b)
    first = (sampling_grid(region, a, flips[0], 5) + 1) / 2
    second = (sampling_grid(region, b, flips[1], 5) + 1) / 2
    there = to_source(first, a[:, None, None], flips[0][:, None, None])
    here = to_source(second, b[:, None, None], flips[1][:, None, None])
    assert meets.any()
    torch.testing.assert_close(there[meets], here[meets], atol=1e-5, rtol=0)


def test_a_batch_moves_but_for_its_index():
    crops = Crops(torch.zeros(2, 3, 3, 4, 4), torch.zeros(2, 3, 4), torch.zeros(2, 3).bool())
    batch = MultiCropBatch({"global": crops}, torch.arange(3), torch.full((3,), -1))
    moved = batch.to(torch.device("meta"))
    assert all(getattr(moved.views["global"], name).is_meta for name in Crops.__slots__)
    assert moved.label.is_meta
    assert not moved.index.is_meta
