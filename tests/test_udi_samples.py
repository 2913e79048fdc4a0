"""UDI's samples: how they are drawn, how many count, and what pixels they show in two crops."""

import io

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dataprep.convert import Manner, convert
from dataprep.encode import EncodeOptions
from dataprep.job import Job
from dataprep.synthetic import coordinate_image, write_jpeg
from dense_ssl.augment import MEAN, STD, Photometry
from dense_ssl.crops import Crops
from dense_ssl.loaders import DataConfig, make_loader
from dense_ssl.loaders.order import Order
from dense_ssl.methods.udi import udi_views
from dense_ssl.methods.udi_maps import Strata, draw_cells, find_samples, make_maps
from dense_ssl.schedule import Step
from dense_ssl.views import Near, draw_epoch


def sampled(count=2000, side=14, window=3, index=0, seed=0, kind=0):
    return draw_cells(Step(index, 10, 100, seed), torch.arange(count), kind, side, window)


@pytest.mark.parametrize(("side", "window"), [(14, 3), (6, 2), (6, 1), (5, 5), (3, 2)])
def test_one_cell_of_each_window_is_drawn_each_as_often(side, window):
    cells = sampled(4000, side, window)
    windows, over = side // window, side % window
    assert cells.shape == (4000, windows**2)
    row, column = np.divmod(cells, side)
    corners = np.stack([row.max(1) >= windows * window, column.max(1) >= windows * window], 1)
    if not over:  # windows stand in their own places
        place = row // window * windows + column // window
        assert (place == np.arange(windows**2)).all()
        share = np.bincount(cells.ravel(), minlength=side**2) / len(cells)
        np.testing.assert_allclose(share, window**-2, atol=0.03)
        return
    # The block stands in a corner: its span is smaller than the grid, and both ends are reached.
    assert (row.max(1) - row.min(1) < windows * window).all()
    assert (column.max(1) - column.min(1) < windows * window).all()
    assert 0 < corners.mean() < 1
    assert (np.bincount(cells.ravel(), minlength=side**2) > 0).all()


def test_the_block_stands_in_each_corner_a_quarter_of_the_time():
    cells = sampled(4000, 5, 4).ravel()  # one window of 4 x 4, in a grid of 5 x 5
    share = np.bincount(cells, minlength=25) / len(cells)
    # A corner of the grid belongs to one of the four blocks, of which it is a sixteenth; the middle to all.
    np.testing.assert_allclose(share[[0, 4, 20, 24]], 1 / 64, atol=0.007)
    np.testing.assert_allclose(share[[6, 8, 12, 16, 18]], 1 / 16, atol=0.015)


def test_samples_depend_on_seed_epoch_image_and_kind_alone():
    first = sampled(50)
    assert np.array_equal(first, sampled(50, index=9))
    assert np.array_equal(
        first[[7, 3]], draw_cells(Step(4, 10, 100), torch.tensor([7, 3]), 0, 14, 3)
    )
    others = [sampled(50, index=10), sampled(50, seed=1), sampled(50, kind=1)]
    assert all((first != other).mean() > 0.5 for other in others)


@pytest.mark.parametrize(("published", "of_global", "of_local", "none"), [
    (True, 11.8, 6.8, (0.01, 0.09)),  # as the published code was measured to do
    (False, 11.6, 7.1, (0.0, 0.002)),
])  # fmt: skip
def test_as_many_samples_count_as_were_measured(published, of_global, of_local, none):
    count, size = 600, (375, 500)
    views = udi_views(4)
    if published:
        views = tuple(
            view.model_copy(update={"near": Near(kind="pull_published", of=of, amount=0.5)})
            for view, of in zip(views, ("global[0]", "mirrored_hull(global)"))
        )
    sizes = np.tile(np.array([size], np.int32), (count, 1))
    plan = draw_epoch(views, sizes, 0, 0)
    boxes = torch.from_numpy(plan.fractions(sizes)).transpose(0, 1)
    crops = Crops(torch.empty(6, count, 0), boxes, torch.from_numpy(plan.flipped).T)
    both, local = crops.map(lambda x: x[:2]), crops.map(lambda x: x[2:])
    step = Step(0, 10, 10)
    maps = make_maps(both, local, torch.arange(count), step, Strata((14, 3), (6, 2)))
    assert maps.own.sum(-1).sum(-1).mean() == pytest.approx(of_global, abs=0.25)
    counts = maps.of_local.sum((-2, -1)).round()
    assert counts.mean() == pytest.approx(of_local, abs=0.25)
    assert none[0] <= (counts == 0).float().mean() <= none[1]


def test_both_maps_of_a_sample_name_the_same_place_of_the_image():
    """Patches as coordinates of the image: the published geometry, flips and all."""
    low = torch.rand(2, 6, 2) * 0.3
    boxes = torch.cat([low, low + 0.6 + torch.rand(2, 6, 2) * 0.1], dim=-1)
    crops = Crops(torch.empty(2, 6, 0), boxes, torch.rand(2, 6) < 0.5)
    cells = torch.from_numpy(sampled(6, 14, 3)).expand(2, -1, -1)
    there = crops.map(lambda x: x.flip(0))
    own, other = find_samples(cells, 14, crops.boxes, crops.flipped, there.boxes, there.flipped, 14)
    shown = own.sum(-1)
    assert torch.all((shown == 0) | (shown == 1)) and 0.3 < shown.mean() < 0.9
    torch.testing.assert_close(other.sum(-1), shown)
    assert own.ne(0).sum(-1).max() == 1 and other.ne(0).sum(-1).max() <= 4
    places = [own @ corner_places(crops), other @ corner_places(there)]
    torch.testing.assert_close(*places, rtol=1e-5, atol=1e-5)


def corner_places(crops, side=14):
    """Where patches lie by definition, [V, B, side * side, 2] in fractions of the image."""
    x0, y0, x1, y1 = crops.boxes[..., None].unbind(2)
    x0, x1 = x0.where(~crops.flipped[..., None], x1), x1.where(~crops.flipped[..., None], x0)
    steps = torch.linspace(0, 1, side)
    x, y = x0 + steps * (x1 - x0), y0 + steps * (y1 - y0)
    x, y = torch.broadcast_tensors(x[..., None, :], y[..., :, None])
    return torch.stack([x, y], -1).flatten(2, 3)


def test_points_of_two_crops_show_the_same_place_of_the_image(tmp_path):
    """Images of their own coordinates, through plan, loader, colours and maps."""
    sizes = ((160, 200), (240, 150), (180, 180))
    for number in range(12):
        image = coordinate_image(*sizes[number % 3])
        write_jpeg(tmp_path / "images" / f"{number:02d}.jpg", image, 97)
    job = Job("folder", tmp_path / "images", "", tmp_path / "set", encode=EncodeOptions(size=0))
    convert(job, Manner(1, 0.0, io.StringIO(), lambda _: None))
    views = tuple(
        view.model_copy(update={"size": size, "photometric": "none"})
        for view, size in zip(udi_views(3), (112, 48))
    )
    data = DataConfig(path=str(tmp_path / "set"), loader="folder", workers=0)
    batches = make_loader(data, views, Order(12, batch_size=4, seed=1), torch.device("cpu"))
    photometry, strata = Photometry(views, seed=1), Strata((14, 3), (6, 2))
    within = (
        2.5 / 150
    )  # pixels of the shortest side of a source: JPEG, resampling, halves of pixels
    compared, mirrored = 0, set()
    for epoch in (0, 1):
        for loaded in batches.epoch(epoch):
            batch = photometry(loaded, epoch)
            crops, local = batch.views["global"], batch.views["local"]
            step = Step(epoch * 3, 3, 2, seed=1)
            maps = make_maps(crops, local, batch.index, step, strata)
            shown, small = (patches(x, side) for x, side in ((crops, 14), (local, 6)))
            cells = torch.from_numpy(draw_cells(step, batch.index, 1, 6, 2))  # [B, R]
            mine = small.gather(2, cells[None, :, :, None].expand(3, -1, -1, 2))  # [L, B, R, 2]
            pairs = [(maps.own[v] @ shown[v], maps.of_global[1 - v] @ shown[1 - v]) for v in (0, 1)]
            pairs += [
                (mine[at] * maps.of_local[v][:, at].sum(-1, keepdim=True),
                 maps.of_local[v][:, at] @ shown[v])
                for at in range(3) for v in (0, 1)
            ]  # fmt: skip
            for here, there in pairs:
                assert torch.all((here - there).abs() < within)
                compared += int((here != 0).any(-1).sum())
            mirrored |= set(zip(crops.flipped[0].tolist(), crops.flipped[1].tolist()))
            mirrored |= set(zip(local.flipped[0].tolist(), crops.flipped[1].tolist()))
    batches.close()
    assert compared > 1000
    assert len(mirrored) == 4


def patches(crops, side):
    """Source coordinates [V, B, side * side, 2] that pixels show, from corner to corner of each crop."""
    images = crops.images * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    cells = F.interpolate(
        images.flatten(0, 1), size=(side, side), mode="bilinear", align_corners=True
    )  # fmt: skip
    return cells[:, :2].flatten(2).transpose(1, 2).unflatten(0, crops.images.shape[:2])
