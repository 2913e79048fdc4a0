"""De-coupling against slow re-tellings of its recipe, and what it may not touch."""

import random

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dataprep.synthetic import write_random_images
from dense_ssl import pretrain
from dense_ssl.backbones import BackboneConfig
from dense_ssl.config import UserError, validate
from dense_ssl.crops import Crops, MultiCropBatch
from dense_ssl.methods import densecl_dc, ibot_dc, make_method, rcc
from dense_ssl.methods.decoupling import exchange_regions, foreign_regions, region_masks
from dense_ssl.methods.densecl_dc import DenseCLDCConfig
from dense_ssl.methods.ibot import IBotConfig
from dense_ssl.methods.ibot_dc import DC_VIEWS, IBotDCConfig
from dense_ssl.methods.masks import MaskConfig, draw_masks
from dense_ssl.published import ibot_dc_losses
from dense_ssl.schedule import Step
from dense_ssl.views import ViewSpec
from tests.ranks import train_on_ranks

STEP = Step(3, 10, 2, seed=5)
VIT = BackboneConfig(name="test_vit", init="dino", positions="dino")
REGIONS = MaskConfig(shape="rcc", ratio=(0.0, 0.5), spread=(0.0, 0.1))
VIEWS = (
    ViewSpec(name="global", count=2, size=64, photometric="dc_1"),
    ViewSpec(name="extra", count=2, size=64, photometric="dc_1", twin_of="global", part=0.25),
)
SMALL = {"out_dim": 24, "hidden_dim": 32, "bottleneck_dim": 8, "backbone": VIT, "mask": REGIONS}


def batch_of(images, size=64, first=0):
    """Two crops of random images, and their last quarter once more."""
    generator = torch.Generator().manual_seed(first + 1)
    views = {}
    for name, count in (("global", images), ("extra", images // 4)):
        pixels = torch.randn(2, count, 3, size, size, generator=generator)
        boxes = torch.zeros(2, count, 4)
        views[name] = Crops(pixels, boxes, torch.zeros(2, count, dtype=torch.bool))
    return MultiCropBatch(views, torch.arange(first, first + images), torch.full((images,), -1))


def only_global(batch):
    return MultiCropBatch({"global": batch.views["global"]}, batch.index, batch.label)


def fresh(config):
    """A method whose teacher is not its student and whose centres and mask token are not zero."""
    torch.manual_seed(0)
    method = make_method(config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in (*method.teacher.parameters(), *method.buffers()):
            if tensor.is_floating_point() and not tensor.requires_grad and tensor.ndim:
                tensor.add_(0.02 * torch.randn(tensor.shape, generator=generator))
        if hasattr(method, "masking"):
            method.masking.token.normal_(generator=generator)
    return method


# --- region masks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["rcc", "rcc_unbiased"])
def test_compiled_masks_have_the_statistics_of_the_published_ones(shape):
    """Same sampler, other random numbers: means over many draws agree within three standard errors."""
    config = MaskConfig(shape=shape, ratio=(0.4,), spread=(0.0,))
    compiled = draw_masks(config, STEP, torch.arange(1500), 2, (14, 14)).reshape(-1, 14, 14)
    rng = random.Random(5)
    reach = int(shape == "rcc_unbiased")
    plain = np.stack(
        [rcc.rcc_mask(rcc.rcc_boxes(rng), 14, 14, 0.4, rng, reach) for _ in range(3000)]
    )
    a, b = compiled.mean(axis=(1, 2)), plain.mean(axis=(1, 2))
    assert abs(a.mean() - b.mean()) < 3 * np.hypot(a.std(), b.std()) / 3000**0.5
    cells = np.abs(compiled.mean(axis=0) - plain.mean(axis=0))
    assert cells.max() < 5 * (0.5 / 3000) ** 0.5  # of 196 cells
    last = compiled[:, 13].any() or compiled[:, :, 13].any()
    assert last == (shape == "rcc_unbiased")


def test_a_mask_depends_on_its_image_crop_and_epoch_alone():
    config = region_masks()
    some = draw_masks(config, STEP, torch.tensor([4, 11, 7]), 2, (14, 14))
    more = draw_masks(config, Step(9, 10, 2, seed=5), torch.arange(12), 2, (14, 14))
    assert np.array_equal(some, more[:, [4, 11, 7]])
    later = draw_masks(config, Step(13, 10, 2, seed=5), torch.arange(12), 2, (14, 14))
    assert not np.array_equal(later, more)


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (3, 3), (4, 7), (6, 6)])
def test_grids_of_any_size_can_be_masked(grid):
    config = MaskConfig(shape="rcc", ratio=(0.6,), spread=(0.0,))
    masks = draw_masks(config, STEP, torch.arange(200), 2, grid)
    assert masks.shape == (2, 200, *grid)
    if min(grid) > 2:
        assert 0.2 < masks.mean() < 0.8


# --- which cells, and from where -------------------------------------------------------------------


def test_extras_take_the_first_masks_that_are_not_empty():
    masks = np.random.default_rng(0).random((2, 12, 3, 3)) < 0.3
    masks[0, ::2] = False
    some = [m for m in masks.reshape(-1, 3, 3) if m.any()]
    foreign = foreign_regions(masks, 0.5)
    assert foreign.shape == (2, 6, 3, 3)
    for crop in range(2):
        own = some[6 * crop : 6 * crop + 6]
        assert np.array_equal(foreign[crop], [*own[:3], *(~m for m in own[3:])])


@pytest.mark.parametrize(
    ("filled", "multiple", "extras"),
    [(24, 1, 6), (11, 1, 4), (7, 1, 2), (3, 1, 0), (0, 1, 0), (24, 4, 4), (10, 4, 4), (7, 4, 0)],
)
def test_fewer_masks_make_fewer_extras(filled, multiple, extras):
    masks = np.zeros((24, 2, 2), np.bool_)
    masks[:filled, 0] = True
    assert foreign_regions(masks.reshape(2, 12, 2, 2), 0.5, multiple).shape[1] == extras


def test_a_batch_that_never_makes_extras_is_refused():
    with pytest.raises(UserError, match="7 images .* needs at least 8"):
        foreign_regions(np.ones((2, 7, 3, 3), np.bool_), 0.25)


@pytest.mark.parametrize("images", [8, 9, 16, 17])
def test_no_extra_meets_its_own_image(images):
    foreign = foreign_regions(np.ones((2, images, 1, 1), np.bool_), 0.5)
    extras = foreign.shape[1]
    shows = [*range(images), *range(images - extras, images)] * 2  # which image a row is
    rows = torch.tensor(shows, dtype=torch.float32)[:, None, None, None]
    where = np.concatenate(
        [np.zeros_like(foreign, shape=(2, images, 1, 1)), foreign | True], axis=1
    )
    sources = exchange_regions(rows, torch.from_numpy(where).flatten(0, 1)).flatten().tolist()
    rows_per_crop = images + extras
    for crop in range(2):
        for extra in range(extras):
            row = crop * rows_per_crop + images + extra
            assert sources[row] == extras - 1 - extra
            assert sources[row] != shows[row]


# --- the whole loss, told the published way --------------------------------------------------------


@pytest.mark.parametrize("mode", ["shared", "independent"])
@pytest.mark.parametrize("apart", [None, 20])
def test_loss_gradients_and_centres_are_those_of_the_published_sequence(mode, apart):
    config = IBotDCConfig(
        **SMALL,
        views=VIEWS,
        dc_photometric=mode,
        patch_out_dim=apart,
        cls_weight=0.7,
        patch_weight=1.3,
    )
    method, batch = fresh(config), batch_of(16)
    want = ibot_dc_losses(method, batch, STEP)
    centers = [want.pop(name) for name in ("center", "patch_center")]
    want["loss"].backward()
    gradients = {n: p.grad.clone() for n, p in method.named_parameters() if p.requires_grad}
    method.zero_grad()

    output = method(batch, STEP)
    for name, value in output.logs.items():
        torch.testing.assert_close(value, want[name].detach(), rtol=2e-6, atol=0)
    torch.testing.assert_close(output.loss, want["loss"], rtol=2e-6, atol=0)
    output.loss.backward()
    for name, gradient in gradients.items():
        got = method.get_parameter(name).grad
        error = (got - gradient).abs().max() / gradient.abs().max()
        assert error < 2e-5, (name, error)
    method.after_step([output.carry], STEP)
    for got, wanted in zip(method.objective.buffers(), centers, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_without_weight_extras_move_the_centres_only():
    dc = fresh(IBotDCConfig(**SMALL, views=VIEWS, dc_weight=0.0))
    plain = fresh(IBotConfig(**SMALL, views=VIEWS[:1]))
    plain.load_state_dict(dc.state_dict())
    batch = batch_of(16)
    ours, theirs = dc(batch, STEP), plain(only_global(batch), STEP)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-6, atol=0)
    for output in (ours, theirs):
        output.loss.backward()
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            error = (dc.get_parameter(name).grad - parameter.grad).abs().max()
            assert error <= 2e-5 * parameter.grad.abs().max(), name
    assert not torch.allclose(ours.carry.cls, theirs.carry.cls, rtol=1e-3)


def test_where_all_masks_are_empty_the_step_goes_on_without_extras(monkeypatch):
    def empty(config, step, index, crops, grid):
        return np.zeros((crops, len(index), *grid), np.bool_)

    contrast = {"out_dim": 16, "hidden_dim": 32, "queue_length": 64, "backbone": VIT}
    for module, config in (
        (ibot_dc, IBotDCConfig(**SMALL, views=VIEWS)),
        (densecl_dc, DenseCLDCConfig(**contrast, views=VIEWS[:1])),
    ):
        monkeypatch.setattr(module, "draw_masks", empty)
        method = fresh(config)
        output = method(batch_of(8), STEP)
        assert output.logs["dc"] == 0
        assert torch.isfinite(output.loss)
        output.loss.backward()
        assert all(p.grad is not None for p in method.student.parameters() if p.requires_grad)


def test_no_gradient_reaches_an_image_through_what_is_taken_from_it():
    config = IBotDCConfig(**SMALL, views=VIEWS, cls_weight=0.0, patch_weight=1.0)
    method, batch = fresh(config), batch_of(16)
    images = batch.views["global"].images.requires_grad_()
    again = batch.views["extra"].images.requires_grad_()
    masks = draw_masks(config.mask, STEP, batch.index, 2, (4, 4))
    method(batch, STEP).loss.backward()
    unmasked = ~masks.any(axis=(2, 3))
    # With no image-level loss an unmasked original has none at all, though the first ones are sources.
    assert unmasked[:, :4].any()
    assert torch.all(images.grad[torch.from_numpy(unmasked)] == 0)
    foreign = torch.from_numpy(foreign_regions(masks, 0.25))
    pixels = foreign.repeat_interleave(16, 2).repeat_interleave(16, 3)[:, :, None].expand_as(again)
    assert torch.all(again.grad[pixels] == 0)
    assert again.grad[~pixels].abs().sum() > 0


# --- on DenseCL ------------------------------------------------------------------------------------

CONTRAST = {"out_dim": 16, "hidden_dim": 32, "queue_length": 64}


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_densecl_extras_by_hand(name):
    size = 128 if name == "test_resnet" else 64
    cell = size // 4
    views = (ViewSpec(name="global", count=2, size=size),)
    config = DenseCLDCConfig(
        **CONTRAST, views=views, mask=REGIONS, backbone=BackboneConfig(name=name, init="timm")
    )
    method, batch = fresh(config), only_global(batch_of(16, size))
    x_q, x_k = batch.views["global"].images
    (masks,) = draw_masks(config.mask, STEP, batch.index, 1, (4, 4))
    chosen = [m for m in masks if m.any()][:4]
    assert len(chosen) == 4
    foreign = [chosen[0], chosen[1], ~chosen[2], ~chosen[3]]
    mixed = x_k[-4:].clone()
    for extra, region in enumerate(foreign):
        for y, x in np.argwhere(region):
            where = (
                slice(None),
                slice(y * cell, y * cell + cell),
                slice(x * cell, x * cell + cell),
            )
            mixed[extra][where] = x_q[3 - extra][where]
    reference = fresh(config)

    def cells(encoder, images):
        return F.normalize(encoder["dense_head"](encoder["backbone"](images).dense), dim=-1)

    with torch.no_grad():
        keys = cells(reference.teacher, x_k)[-4:]
        queries = cells(reference.student, mixed)
    losses = []
    for extra, region in enumerate(foreign):
        for at in np.flatnonzero(~region):
            q, k = queries[extra, at], keys[extra, at]
            logits = torch.cat([(q @ k)[None], method.dense_queue.keys @ q]) / 0.2
            losses.append(-F.log_softmax(logits, dim=0)[0])
    output = method(batch, STEP)
    torch.testing.assert_close(output.logs["dc"], torch.stack(losses).mean(), rtol=1e-4, atol=1e-5)
    logs = output.logs
    want = 0.5 * logs["global"] + 0.5 * (logs["dense"] + 0.3 * logs["dc"])
    torch.testing.assert_close(output.loss.detach(), want)
    assert output.carry.g.shape == output.carry.p.shape == (16, 16)  # no extra among the keys


def test_densecl_queries_are_cut_and_running_statistics_see_no_extras(monkeypatch):
    config = DenseCLDCConfig(
        **CONTRAST,
        views=(ViewSpec(name="global", count=2, size=128),),
        mask=REGIONS,
        backbone=BackboneConfig(name="test_resnet", bn_groups=2),
    )
    batch = only_global(batch_of(16, 128))
    with_extras, without = fresh(config), fresh(config)
    seen = []
    hook = with_extras.student["backbone"].register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    with_extras(batch, STEP)
    hook.remove()
    (masks,) = draw_masks(config.mask, STEP, batch.index, 1, (4, 4))
    cut = torch.from_numpy(masks).repeat_interleave(32, 1).repeat_interleave(32, 2)[:, None]
    assert torch.equal(seen[0], torch.where(cut, 0.0, batch.views["global"].images[0]))
    assert [len(images) for images in seen] == [16, 4]
    monkeypatch.setattr(without, "_dc_loss", lambda *_: torch.zeros(()))
    without(batch, STEP)
    for (name, got), want in zip(with_extras.named_buffers(), without.buffers(), strict=True):
        if "num_batches" not in name:
            torch.testing.assert_close(got, want, rtol=0, atol=0, msg=name)


# --- what is refused -------------------------------------------------------------------------------

LOCAL = ViewSpec(name="local", count=2, size=96)
HALF = DC_VIEWS[1].model_copy(update={"part": 0.75})


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (IBotDCConfig, {"views": (*DC_VIEWS, LOCAL)}, "one twin of it, no more"),
        (IBotDCConfig, {"views": DC_VIEWS[:1]}, "one twin of it, no more"),
        (IBotDCConfig, {"views": (DC_VIEWS[0], LOCAL)}, "'local' must have twin_of global"),
        (IBotDCConfig, {"views": (DC_VIEWS[0], HALF)}, "at most 0.5"),
        (IBotDCConfig, {"mask": {"shape": "rcc", "start_epoch": 1}}, "mask.start_epoch"),
        (IBotDCConfig, {"mask": {"ratio": (0.0,), "spread": (0.0,)}}, "mask.ratio"),
        (DenseCLDCConfig, {"mask": {"ratio": (0.0,), "spread": (0.0,)}}, "mask.ratio"),
        (DenseCLDCConfig, {"dc_share": 0.6}, "dc_share"),
    ],
)
def test_settings_that_cannot_be_are_refused(config, settings, message):
    plain = {
        key: [view.model_dump() for view in value] if key == "views" else value
        for key, value in settings.items()
    }
    with pytest.raises(UserError, match=message):
        validate(config, plain, "recipe.yaml")


def test_sizes_that_cells_do_not_divide_are_refused():
    views = (ViewSpec(name="global", count=2, size=100),)
    with pytest.raises(UserError, match="100 px, no multiple of the 32 px"):
        make_method(DenseCLDCConfig(views=views, backbone=BackboneConfig(name="test_resnet")))


# --- in training -----------------------------------------------------------------------------------

RECIPE = """
method:
  name: ibot_dc
  views:
    - {{name: global, count: 2, size: 64, photometric: [dc_1, dc_2]}}
    - {{name: extra, count: 2, size: 64, photometric: [dc_1, dc_2], twin_of: global, part: 0.25}}
  backbone: {{name: test_vit, init: dino, positions: dino, drop_path: 0.1}}
  out_dim: 24
  hidden_dim: 32
  bottleneck_dim: 8
  dc_photometric: {mode}
data: {{path: {images}, loader: folder, workers: 0}}
optim: {{name: adamw, lr: 0.001, clip: {{kind: per_tensor, norm: 3.0}}}}
train: {{epochs: 4, batch_size: 16, precision: fp32}}
run: {{dir: {run}, device: cpu, checkpoint_every_steps: 3, log_every_steps: 1, log: []}}
"""


@pytest.fixture
def recipe(tmp_path):
    write_random_images(tmp_path / "images", 36)  # 2 steps of 16 an epoch

    def write(run, mode="shared"):
        path = tmp_path / f"{run}.yaml"
        path.write_text(RECIPE.format(mode=mode, images=tmp_path / "images", run=tmp_path / run))
        return str(path)

    return write


def train(capsys, *argv):
    assert pretrain.main(list(argv)) == 0
    return capsys.readouterr().out.strip().splitlines()[-1]


CONTRASTIVE = """method={
  name: densecl_dc, views: [{name: global, count: 2, size: 64, photometric: moco_v2}],
  backbone: {name: test_vit, init: timm}, out_dim: 24, hidden_dim: 32, queue_length: 32,
  mask: {shape: rcc, ratio: [0.5], spread: [0.1]}, dc_share: 0.5}"""


@pytest.mark.parametrize("method", ["method.backbone.drop_path=0.0", CONTRASTIVE])
def test_two_ranks_are_one_with_two_micro_batches(recipe, tmp_path, capsys, method):
    """Extras are made within a micro-batch: those of two ranks are those of two micro-batches."""
    options = ("train.steps=4", method)
    train(capsys, recipe("one"), *options, "train.accumulate=2")
    train_on_ranks(2, [recipe("two"), *options], tmp_path)
    one, two = (
        pretrain.checkpoint.load_newest(tmp_path / run / "checkpoints") for run in ("one", "two")
    )
    for name, value in one["method"].items():
        torch.testing.assert_close(two["method"][name], value, rtol=1e-4, atol=2e-5, msg=name)
