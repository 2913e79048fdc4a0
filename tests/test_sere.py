"""SERE against the published sequence of operations, its boxes against pixels, its heads over ranks."""

import copy
import io
import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from dataprep.convert import Manner, convert
from dataprep.encode import EncodeOptions
from dataprep.job import Job
from dataprep.synthetic import coordinate_image, write_jpeg
from dense_ssl.augment import MEAN, STD, Photometry
from dense_ssl.backbones import BackboneConfig
from dense_ssl.config import UserError
from dense_ssl.crops import Crops, MultiCropBatch, to_source
from dense_ssl.distributed import World
from dense_ssl.loaders import DataConfig, make_loader
from dense_ssl.loaders.order import Order
from dense_ssl.methods import make_method
from dense_ssl.methods.sere import SereConfig
from dense_ssl.methods.sere_relations import (
    Grids,
    Maps,
    RelationHead,
    channel_loss,
    channel_relation,
    overlap_grids,
    sample,
    sampling_matrix,
    spatial_loss,
)
from dense_ssl.methods.synced_batch_norm import SyncedBatchNorm
from dense_ssl.published.relations import aligned, relation_term, spatial_relation
from dense_ssl.schedule import Step
from dense_ssl.views import ViewSpec
from tests.ranks import on_ranks

ALONE = World(rank=0, size=1, device=torch.device("cpu"), flags=None)

BATCH, LOCALS, HEADS, DIM = 3, 3, 2, 8
CELLS, LOCAL_CELLS = 4, 3


def crops_of(count, least, most, dtype=torch.float32):
    """Random boxes of `count` crops of each image; no images: only geometry is asked for."""
    side = least + torch.rand(count, BATCH, 2, dtype=dtype) * (most - least)
    low = torch.rand(count, BATCH, 2, dtype=dtype) * (1 - side)
    boxes = torch.cat([low, low + side], dim=-1)
    return Crops(torch.empty(count, BATCH, 0), boxes, torch.rand(count, BATCH) < 0.5)


def features_of(count, cells, grad=True):
    return torch.randn(count * BATCH, cells**2, DIM, dtype=torch.float64).requires_grad_(grad)


@pytest.fixture
def case():
    """Two global crops, one pair of which shares nothing, and local ones, some of them elsewhere."""
    crops, local = crops_of(2, 0.5, 0.9, torch.float64), crops_of(LOCALS, 0.2, 0.4, torch.float64)
    crops.boxes[:, 0] = torch.tensor([[0.0, 0, 0.5, 1], [0.5, 0, 1, 1]])  # they only touch
    return crops, local


# --- the published sequence ------------------------------------------------------------------------


def published_grid(mine, other, size):
    """Grid of one image's crop: (x0, y0, x1, y1, flip) of both; by loops over its points."""
    (x0, y0, x1, y1, flip), (a, b, c, d, _) = mine, other
    left, top, right, bottom = max(x0, a), max(y0, b), min(x1, c), min(y1, d)
    grid = torch.full((size, size, 2), -2.0, dtype=torch.float64)
    if left < right and top < bottom:
        for row, column in itertools.product(range(size), repeat=2):
            u = (left + column / (size - 1) * (right - left) - x0) / (x1 - x0)
            v = (top + row / (size - 1) * (bottom - top) - y0) / (y1 - y0)
            grid[row, column, 0] = 2 * (1 - u if flip else u) - 1
            grid[row, column, 1] = 2 * v - 1
    return grid


def published_grids(crops, a, others, b, size):
    """Grids [B, S, S, 2] of crop a of `crops` where it meets crop b of `others`."""
    rows = zip(crops.boxes[a], crops.flipped[a], others.boxes[b], others.flipped[b])
    return torch.stack(
        [
            published_grid((*x.tolist(), f), (*y.tolist(), g), size)
            for x, f, y, g in rows
        ]
    )  # fmt: skip


def published_spatial_loss(student, teacher, local, crops, of_local, sizes, local_size, T):
    sampled = []
    for y in (student, teacher):
        sampled.append([
            aligned(
                spatial_relation(part, HEADS),
                *(published_grids(crops, g, crops, 1 - g, size) for size in sizes),
            )
            for g, part in enumerate(y.chunk(2))
        ])  # fmt: skip
    (s1, s2), (t1, t2) = sampled
    terms = [relation_term(t1, s2, T), relation_term(t2, s1, T)]
    for g, i in itertools.product(range(2), range(LOCALS if local is not None else 0)):
        there = published_grids(crops, g, of_local, i, local_size)
        here = published_grids(of_local, i, crops, g, local_size)
        target = spatial_relation(teacher.chunk(2)[g], HEADS)
        own = spatial_relation(local.chunk(LOCALS)[i], HEADS)
        own, target = (aligned(r, x, x) for r, x in ((own, here), (target, there)))
        terms.append(relation_term(target, own, T))
    return torch.stack(terms).mean()


@pytest.mark.parametrize("sizes", [(5, 5), (4, 5)])
@pytest.mark.parametrize("with_local", [True, False])
def test_spatial_loss_is_that_of_sampled_relations_gradients_included(case, sizes, with_local):
    crops, of_local = case
    student, local = features_of(2, CELLS), features_of(LOCALS, LOCAL_CELLS)
    teacher = features_of(2, CELLS, grad=False)
    given = [student, local] if with_local else [student]
    grids = Grids.of(crops, of_local if with_local else None, sizes, 4)
    local_map = Maps(local, (LOCAL_CELLS,) * 2) if with_local else None
    loss = spatial_loss(
        Maps(student, (CELLS,) * 2), Maps(teacher, (CELLS,) * 2), local_map, grids, HEADS, 0.5
    )
    want = published_spatial_loss(
        student, teacher, local if with_local else None, crops, of_local, sizes, 4, 0.5
    )
    torch.testing.assert_close(loss, want, rtol=1e-10, atol=0)
    for got, expected in zip(torch.autograd.grad(loss, given), torch.autograd.grad(want, given)):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-12)


def test_channel_loss_is_the_mean_over_pairs_gradients_included():
    student, local = features_of(2, CELLS), features_of(LOCALS, LOCAL_CELLS)
    teacher = features_of(2, CELLS, grad=False)
    cells = ((CELLS,) * 2, (LOCAL_CELLS,) * 2)
    loss = channel_loss(
        Maps(student, cells[0]), Maps(teacher, cells[0]), Maps(local, cells[1]), 0.1
    )

    def relate(y):
        return torch.einsum("bnc,bnd->bcd", y, y) / y.shape[1]

    (s1, s2), (t1, t2) = (relate(y).chunk(2) for y in (student, teacher))
    terms = [relation_term(t1, s2, 0.1), relation_term(t2, s1, 0.1)]
    terms += [
        relation_term(t, own, 0.1) for t in (t1, t2) for own in relate(local).chunk(LOCALS)
    ]  # fmt: skip
    want = torch.stack(terms).mean()
    torch.testing.assert_close(loss, want)
    given = [student, local]
    for got, expected in zip(torch.autograd.grad(loss, given), torch.autograd.grad(want, given)):
        torch.testing.assert_close(got, expected)


def test_crops_that_share_nothing_cost_a_constant_and_teach_nothing(case):
    crops, of_local = case
    crops.boxes[0], crops.boxes[1] = torch.tensor([[0.0, 0, 0.4, 1], [0.4, 0, 0.7, 1]])[:, None]
    of_local.boxes[:] = torch.tensor([0.7, 0, 1, 1])
    student, local = features_of(2, CELLS), features_of(LOCALS, LOCAL_CELLS)
    grids = Grids.of(crops, of_local, (13, 13), 6)
    maps = Maps(student, (CELLS,) * 2), Maps(features_of(2, CELLS, grad=False), (CELLS,) * 2)
    loss = spatial_loss(*maps, Maps(local, (LOCAL_CELLS,) * 2), grids, HEADS, 0.5)
    want = (2 * math.log(169) + 2 * LOCALS * math.log(36)) / (2 + 2 * LOCALS)
    assert loss.item() == pytest.approx(want)
    for gradient in torch.autograd.grad(loss, [student, local]):
        assert torch.all(gradient == 0)


def test_a_mirrored_crop_has_the_aligned_features_of_the_straight_one():
    box = torch.rand(BATCH, 2, dtype=torch.float64).sort().values.repeat_interleave(2, 1)
    box = torch.stack([box[:, 0], box[:, 1] / 2, box[:, 2], box[:, 3]], dim=1)
    straight, mirrored = torch.zeros(BATCH, dtype=torch.bool), torch.ones(BATCH, dtype=torch.bool)
    grids = overlap_grids(box, straight, box, mirrored, 5)
    maps = torch.randn(BATCH, CELLS, CELLS, DIM, dtype=torch.float64)
    seen = [
        sample(shown.flatten(1, 2), sampling_matrix(grid, (CELLS, CELLS)))
        for shown, grid in zip((maps, maps.flip(2)), grids)
    ]
    torch.testing.assert_close(*seen)


@pytest.mark.parametrize("cells", [(4, 4), (3, 5), (1, 1)])
def test_sampling_is_torchs_bilinear_one_inside_on_the_border_and_outside(cells):
    grid = torch.cat([torch.rand(2, 60, 1, 2) * 3 - 1.5, torch.full((2, 1, 1, 2), -2.0)], 1)
    grid[:, :4, 0] = torch.tensor([[-1.0, -1], [1, 1], [1, 0.3], [0, 0]])
    maps = torch.randn(2, DIM, *cells)
    want = F.grid_sample(maps, grid, align_corners=False).flatten(2).transpose(1, 2)
    got = sample(maps.flatten(2).transpose(1, 2), sampling_matrix(grid, cells))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert torch.all(got[:, -1] == 0)


# --- boxes and pixels ------------------------------------------------------------------------------


@pytest.mark.parametrize("loader", ["folder", pytest.param("ffcv", marks=pytest.mark.ffcv)])
def test_points_of_two_crops_show_the_same_place_of_the_image(loader, tmp_path):
    """Images of their own coordinates, through loader, augmentation, patches and alignment."""
    if loader == "ffcv":
        pytest.importorskip("dense_ssl.loaders.ffcv", exc_type=ImportError)
    sizes = ((160, 200), (240, 150), (180, 180))
    for number in range(12):
        image = coordinate_image(*sizes[number % 3])
        write_jpeg(tmp_path / "images" / f"{number:02d}.jpg", image, 97)
    job = Job("folder", tmp_path / "images", "", tmp_path / "set", encode=EncodeOptions(size=0))
    convert(job, Manner(1, 0.0, io.StringIO(), lambda _: None))
    views = (
        ViewSpec(name="global", count=2, size=112, scale=(0.3, 1.0), photometric="none"),
        ViewSpec(name="local", count=3, size=48, scale=(0.05, 0.3), photometric="none"),
    )
    data = DataConfig(path=str(tmp_path / "set"), loader=loader, workers=2 * (loader == "ffcv"))
    batches = make_loader(data, views, Order(12, batch_size=4, seed=1), torch.device("cpu"))
    photometry = Photometry(views, seed=1)
    # Two pixels of the shortest side of a source (JPEG, resampling), in fractions.
    within = 2 / 150
    compared, mirrored = 0, set()
    for loaded in batches.epoch(0):
        batch = photometry(loaded, 0)
        crops, local = batch.views["global"], batch.views["local"]
        grids = Grids.of(crops, local, (13, 13), 6)
        swapped = grids.queries.flip(0)
        pairs = [(crops, grids.queries, crops.map(lambda x: x.flip(0)), swapped)]
        for g, i in itertools.product(range(2), range(3)):
            one, other = (
                Crops(*(x[[at]] for x in (c.images, c.boxes, c.flipped)))
                for c, at in ((crops, g), (local, i))
            )
            pairs.append((one, grids.of_local[[g], :, i], other, grids.local[[i], :, g]))
        for one, grid, other, other_grid in pairs:
            (here, inside), (there, inside_too) = shown(one, grid), shown(other, other_grid)
            both = inside & inside_too
            assert torch.all((here - there)[both].abs() < within)
            points = (grid + 1) / 2  # and what is shown is where the box says
            source = to_source(points, one.boxes[..., None, None, :], one.flipped[..., None, None])
            assert torch.all((here - source.flatten(2, 3))[both].abs() < within)
            compared += int(both.sum())
            flips = (x.flipped.flatten().tolist() for x in (one, other))
            mirrored.update(zip(*flips))
    batches.close()
    assert compared > 2000
    assert len(mirrored) == 4


def shown(crops, grid):
    """Source coordinates [V, B, P, 2] of patches of 8 px sampled at a grid, and which are well inside."""
    images = crops.images * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    cells = F.avg_pool2d(images.flatten(0, 1), 8)
    side = cells.shape[2]
    matrix = sampling_matrix(grid, (side, side)).flatten(0, 1)
    at = sample(cells.flatten(2).transpose(1, 2), matrix).unflatten(0, grid.shape[:2])
    # Outside the outermost centres samples fade to 0; the filter's edges touch the first half pixel.
    inside = (grid.abs() <= 1 - 1 / side + 1e-6).all(-1).flatten(2)
    return at[..., :2], inside


# --- heads -----------------------------------------------------------------------------------------


def test_heads_have_the_published_sizes_and_start():
    sizes = [2 * 2 * sum(p.numel() for p in RelationHead(dim).parameters()) for dim in (384, 768)]
    assert sizes == [595_968, 2_371_584]
    weight = RelationHead(384).predictor[0].weight
    assert weight.abs().max() <= 384**-0.5
    assert weight.std().item() == pytest.approx((3 * 384) ** -0.5, rel=0.02)
    assert set(RelationHead(8).state_dict()) == {
        *(f"projection.0.{key}" for key in _NORM),
        "predictor.0.weight",
        *(f"predictor.1.{key}" for key in _NORM),
    }


_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
ROWS = 10


def _normalise(world):
    torch.manual_seed(5)
    norm = SyncedBatchNorm(3)
    torch.nn.init.normal_(norm.weight)
    rows = torch.randn(2 * ROWS, 3) * 3 + torch.arange(3)
    target = torch.randn(2 * ROWS, 3)
    mine = slice(world.rank * ROWS, (world.rank + 1) * ROWS) if world.size > 1 else slice(None)
    x = rows[mine].clone().requires_grad_()
    out = norm(x)
    (out * target[mine]).pow(2).sum().backward()
    grads = [x.grad, norm.weight.grad, norm.bias.grad]
    return {"out": out.detach(), "grads": grads, "buffers": list(norm.buffers())}


def _both(world):
    return {"rows": _normalise(world), "step": _gradients(world)}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return on_ranks(2, _both, tmp_path_factory.mktemp("ranks"))


@pytest.mark.slow
def test_batch_norm_of_two_ranks_is_that_of_all_rows(two_ranks):
    ranks = [rank["rows"] for rank in two_ranks]
    alone = _normalise(ALONE)
    both = [torch.cat([r["out"] for r in ranks]), torch.cat([r["grads"][0] for r in ranks])]
    torch.testing.assert_close(both[0], alone["out"])
    torch.testing.assert_close(both[1], alone["grads"][0], rtol=1e-5, atol=1e-5)
    for parameter in (1, 2):  # each rank has the gradients of its own loss
        total = ranks[0]["grads"][parameter] + ranks[1]["grads"][parameter]
        torch.testing.assert_close(total, alone["grads"][parameter])
    for rank in ranks:
        for got, want in zip(rank["buffers"], alone["buffers"]):
            torch.testing.assert_close(got, want)


# --- the method ------------------------------------------------------------------------------------

VIEWS = (
    ViewSpec(name="global", count=2, size=64),
    ViewSpec(name="local", count=LOCALS, size=32),
)
SMALL = {
    "out_dim": 24,
    "hidden_dim": 32,
    "bottleneck_dim": 8,
    "overlap_size": (5, 5),
    "local_overlap_size": 3,
    "backbone": BackboneConfig(name="test_vit", init="dino", positions="dino"),
}


def batch_of(images, generator_seed=0):
    """A batch of `images` images with boxes that overlap and ones that do not."""
    torch.manual_seed(generator_seed)
    views = {}
    for spec in VIEWS:
        shape = (spec.count, images)
        low = torch.rand(*shape, 2) * 0.5
        boxes = torch.cat([low, low + 0.2 + torch.rand(*shape, 2) * 0.3], dim=-1)
        pixels = torch.randn(*shape, 3, spec.size, spec.size)
        views[spec.name] = Crops(pixels, boxes, torch.rand(shape) < 0.5)
    return MultiCropBatch(views, torch.arange(images), torch.full((images,), -1))


def _gradients(world):
    torch.manual_seed(2)
    method = make_method(SereConfig(**SMALL, views=VIEWS))
    batch = batch_of(8)
    if world.size > 1:
        mine = slice(4 * world.rank, 4 * world.rank + 4)
        views = {k: v.map(lambda x: x[:, mine]) for k, v in batch.views.items()}
        batch = MultiCropBatch(views, batch.index[mine], batch.label[mine])
    output = method(batch, Step(0, 10, 2))
    output.loss.backward()
    method.after_step([output.carry], Step(0, 10, 2))
    grads = {n: p.grad for n, p in method.named_parameters() if p.grad is not None}
    return {"loss": output.loss.detach(), "grads": grads, "buffers": dict(method.named_buffers())}


@pytest.mark.slow
def test_two_ranks_are_one_rank_with_the_batch_doubled(two_ranks):
    first, second = (rank["step"] for rank in two_ranks)
    alone = _gradients(ALONE)
    torch.testing.assert_close((first["loss"] + second["loss"]) / 2, alone["loss"])
    for name, want in alone["grads"].items():
        got = (first["grads"][name] + second["grads"][name]) / 2
        torch.testing.assert_close(got, want, rtol=1e-3, atol=2e-5, msg=name)
    for name, want in alone["buffers"].items():
        torch.testing.assert_close(first["buffers"][name], want, rtol=1e-4, atol=1e-5, msg=name)
        torch.testing.assert_close(second["buffers"][name], first["buffers"][name])


def test_the_loss_is_put_together_as_published():
    method = make_method(SereConfig(**SMALL, views=VIEWS, cls_weight=0.7, patch_weight=1.3))
    output = method(batch_of(BATCH), Step(0, 10, 2))
    logs = output.logs
    ibot = 0.7 * logs["cls"] + 1.3 * logs["patch"]
    want = (4 - 0.7) / 2 * ibot + 0.2 * logs["spatial"] + 0.5 * logs["channel"]
    torch.testing.assert_close(output.loss.detach(), want)


def test_the_teacher_relates_by_statistics_of_its_own_batch_and_keeps_its_buffers():
    method = make_method(SereConfig(**SMALL, views=VIEWS))
    before = copy.deepcopy(method.teacher.state_dict())
    output = method(batch_of(BATCH), Step(0, 10, 2))
    output.loss.backward()
    method.after_step([output.carry], Step(0, 10, 2))
    moved = {k for k, v in method.teacher.named_buffers() if not torch.equal(v, before[k])}
    prefixes = ("pixel_sere.projection.0.", "channel_sere.projection.0.")
    assert moved == {p + key for p in prefixes for key in _NORM[2:]}
    for prefix in prefixes:
        ours = method.student.get_buffer(f"{prefix}running_mean")
        assert not torch.equal(ours, method.teacher.get_buffer(f"{prefix}running_mean"))


def test_under_autocast_it_stays_near_float32():
    method = make_method(SereConfig(**SMALL, views=VIEWS))
    batch, step = batch_of(BATCH), Step(0, 10, 2)
    exact = method(batch, step).logs
    with torch.autocast("cpu", torch.bfloat16):
        output = method(batch, step)
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    for name, value in output.logs.items():
        torch.testing.assert_close(value, exact[name], rtol=0.02, atol=0.02)


def test_channel_relations_bear_float16():
    features = torch.full((1, 196, 4), 40.0, dtype=torch.float16)  # products sum to 313,600
    assert torch.isfinite(channel_relation(features)).all()


@pytest.mark.parametrize(
    ("views", "given"),
    [
        ((ViewSpec(name="global", count=3, size=64),), "3 global given"),
        ((VIEWS[0], ViewSpec(name="small", count=2, size=32)), "2 global, 2 small given"),
    ],
)
def test_other_views_are_refused(views, given):
    with pytest.raises(UserError, match=f"method.views: .*; {given}"):
        make_method(SereConfig(**SMALL, views=views))
