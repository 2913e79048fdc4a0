"""iBOT and DINO against the published sequence of operations, and what they promise of masks and state."""

import random

import numpy as np
import pytest
import torch

from dense_ssl.backbones import BackboneConfig
from dense_ssl.config import UserError, validate
from dense_ssl.crops import Crops, MultiCropBatch
from dense_ssl.methods import make_method, masks
from dense_ssl.methods.ibot import DinoConfig, IBotConfig
from dense_ssl.methods.masks import MaskConfig, PatchRows, draw_masks
from dense_ssl.optim import OptimConfig, apply_schedules, freeze, make_optimizer
from dense_ssl.published import ibot_losses
from dense_ssl.schedule import Step
from dense_ssl.views import ViewSpec

VIT = BackboneConfig(name="test_vit", init="dino", positions="dino")
GLOBAL = ViewSpec(name="global", count=2, size=64, photometric=("dino_1", "dino_2"))
LOCAL = ViewSpec(name="local", count=3, size=32, photometric="dino_local")
SMALL = {"out_dim": 24, "hidden_dim": 32, "bottleneck_dim": 8, "backbone": VIT}
BATCH = 4


def batch_of(views, images=BATCH, seed=0):
    generator = torch.Generator().manual_seed(seed)
    crops = {}
    for view in views:
        pixels = torch.randn(view.count, images, 3, view.size, view.size, generator=generator)
        boxes = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(view.count, images, 4)
        crops[view.name] = Crops(pixels, boxes, torch.zeros(view.count, images, dtype=torch.bool))
    return MultiCropBatch(crops, torch.arange(images), torch.full((images,), -1))


def method_of(config, seed=1):
    """A method whose teacher is another network than its student, with centres and a mask token."""
    torch.manual_seed(seed)
    method = make_method(config)
    with torch.no_grad():
        for p in (*method.teacher.parameters(), *method.student["head"].parameters()):
            p.add_(0.05 * torch.randn_like(p))
        for center in method.objective.buffers():
            center.normal_(std=0.1)
        if method.masking is not None:
            method.masking.token.normal_()
    return method


CONFIGS = {
    "ibot": IBotConfig(**SMALL, views=(GLOBAL, LOCAL)),
    "ibot, two crops": IBotConfig(**SMALL, views=(GLOBAL,)),
    "ibot, own patch prototypes": IBotConfig(
        **SMALL, views=(GLOBAL, LOCAL), patch_out_dim=20, cls_weight=0.7, patch_weight=0.3
    ),
    "dino": DinoConfig(**SMALL, views=(GLOBAL, LOCAL)),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("index", [0, 40])  # another epoch: other masks and temperatures
def test_losses_gradients_and_centres_are_those_of_the_published_sequence(name, index):
    config = CONFIGS[name]
    method, step = method_of(config), Step(index, 10, 100, seed=5)
    batch = batch_of(config.views)
    losses = ibot_losses(method, batch, step)
    total = losses.pop("loss")
    centers = [losses.pop(name) for name in ("center", "patch_center") if name in losses]
    trained = {n: p for n, p in method.named_parameters() if p.requires_grad}
    want = torch.autograd.grad(total, list(trained.values()))
    output = method(batch, step)
    output.loss.backward()
    torch.testing.assert_close(output.loss, total, rtol=1e-5, atol=1e-5)
    for part, value in losses.items():
        torch.testing.assert_close(output.logs[part], value.detach(), rtol=1e-5, atol=1e-5)
    for (key, p), gradient in zip(trained.items(), want, strict=True):
        scale = gradient.abs().max().item()
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-4 * scale + 1e-7, msg=key)
    method.after_step([output.carry], step)
    for got, center in zip(method.objective.buffers(), centers, strict=True):
        torch.testing.assert_close(got, center, rtol=1e-5, atol=1e-6)


def test_dino_is_ibot_without_masks_and_patches():
    dino = DinoConfig(**SMALL, views=(GLOBAL, LOCAL))
    unmasked = IBotConfig(
        **SMALL, views=(GLOBAL, LOCAL), norm_last_layer=True, patch_weight=0.0,
        teacher_temperature=dino.teacher_temperature, mask=MaskConfig(ratio=(0.0,), spread=(0.0,)),
    )  # fmt: skip
    batch, step = batch_of(dino.views), Step(0, 10, 2)
    losses, gradients = [], []
    for config in (dino, unmasked):
        torch.manual_seed(0)
        method = make_method(config)
        losses.append(method(batch, step).loss)
        losses[-1].backward()
        gradients.append([p.grad for p in method.student.parameters() if p.requires_grad])
    assert torch.equal(*losses)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_first_losses_are_a_little_below_those_of_chance():
    """Logits start as cosines in 256 dimensions, and both networks as one and the same."""
    config = IBotConfig(backbone=VIT, views=(GLOBAL,))
    logs = make_method(config)(batch_of(config.views), Step(0, 10, 2)).logs
    assert np.log(8192) - 1 < logs["cls"].item() < np.log(8192)


def test_only_the_student_drops_paths_by_the_published_rates():
    config = IBotConfig(
        **{**SMALL, "backbone": VIT.model_copy(update={"drop_path": 0.1})}, views=(GLOBAL,)
    )
    method = make_method(config)
    blocks = method.student["backbone"].trunk.blocks
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx(np.linspace(0, 0.1, len(blocks)).tolist())
    for block in method.teacher["backbone"].trunk.blocks:
        assert getattr(block.drop_path1, "drop_prob", 0.0) == 0
        assert getattr(block.drop_path2, "drop_prob", 0.0) == 0
    assert all(a.shape == b.shape for a, b in zip(
        method.student.parameters(), method.teacher.parameters(), strict=True))  # fmt: skip


def test_crops_of_one_size_are_encoded_as_one_batch_and_only_global_ones_are_masked():
    method = make_method(CONFIGS["ibot"])
    seen = []
    backbone = method.student["backbone"]
    hook = backbone.trunk.patch_embed.register_forward_hook(
        lambda module, given, out: seen.append(tuple(given[0].shape))
    )
    masked = []
    method.masking.register_forward_hook(lambda module, given, out: masked.append(given[0].shape))
    method(batch_of((GLOBAL, LOCAL)), Step(0, 10, 2))
    hook.remove()
    assert seen == [(2 * BATCH, 3, 64, 64), (3 * BATCH, 3, 32, 32)]
    assert masked == [(2 * BATCH, 4, 4, 64)]


def test_a_step_without_any_mask_still_reaches_every_parameter():
    config = CONFIGS["ibot"].model_copy(update={"mask": MaskConfig(start_epoch=5)})
    method = make_method(config)
    output = method(batch_of(config.views), Step(0, 10, 10))
    assert output.logs["patch"] == 0
    output.loss.backward()
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)


def test_last_layers_rest_in_the_first_epoch_and_nothing_decays_them():
    config = CONFIGS["ibot, own patch prototypes"]
    method = make_method(config)
    optim = validate(OptimConfig, {"name": "adamw", "lr": 0.1, "weight_decay": 0.1}, "x")
    optimizer = make_optimizer(method.param_groups(), optim)
    layers = {n: p for n, p in method.student.named_parameters() if "last_layer" in n}
    assert len(layers) == 4
    for index in (0, 9, 10):
        before = {n: p.detach().clone() for n, p in layers.items()}
        step = Step(index, 10, 2)
        method(batch_of(config.views), step).loss.backward()
        apply_schedules(optimizer, optim, step, 4)
        freeze(optimizer, step)
        optimizer.step()
        optimizer.zero_grad()
        moved = [not torch.equal(before[n], p) for n, p in layers.items()]
        assert all(moved) if index >= 10 else not any(moved)


# --- masks -----------------------------------------------------------------------------------------


def drawn(count=1500, crops=1, seed=0, step=0, **options):
    config = MaskConfig(**options)
    return draw_masks(config, Step(step, 10, 100, seed), torch.arange(count), crops, (14, 14))


@pytest.mark.parametrize(
    ("ratio", "mean", "least", "most"),
    [(0.1, 17.6, 14, 19), (0.2, 38.1, 28, 39), (0.3, 57.2, 48, 58), (0.4, 77.5, 72, 78),
     (0.5, 97.5, 91, 98)],
)  # fmt: skip
def test_block_masks_are_distributed_as_measured(ratio, mean, least, most):
    counts = drawn(ratio=(ratio,), spread=(0.0,)).sum((2, 3)).ravel()
    assert counts.mean() == pytest.approx(mean, abs=0.25)
    assert counts.max() == most
    assert np.percentile(counts, 1) >= least - 1  # one in twenty thousand is empty


def test_the_default_masks_half_of_the_crops():
    masks_ = drawn(count=4000)
    assert masks_.any((2, 3)).mean() == pytest.approx(0.5, abs=0.03)
    assert masks_.mean() == pytest.approx(0.145, abs=0.01)


def test_random_masks_have_their_exact_count_and_no_favourite_cell():
    masks_ = drawn(shape="random", ratio=(0.7,), spread=(0.0,))
    assert set(masks_.sum((2, 3)).ravel()) == {int(0.7 * 196)}
    assert masks_.mean((0, 1)).min() > 0.63
    assert masks_.mean((0, 1)).max() < 0.77


@pytest.mark.parametrize("shape", ["block", "random"])
def test_a_mask_depends_on_seed_epoch_image_and_crop_alone(shape):
    config = MaskConfig(shape=shape, ratio=(0.3,), spread=(0.2,))
    index = torch.tensor([7, 3, 11, 5])

    def draw(step, index, crops=2):
        return draw_masks(config, step, index, crops, (14, 14))

    first = draw(Step(0, 10, 100, seed=1), index)
    assert np.array_equal(first, draw(Step(9, 10, 100, seed=1, micro=3), index))
    assert np.array_equal(first[:, [2, 0]], draw(Step(4, 10, 100, seed=1), index[[2, 0]]))
    others = [
        draw(Step(10, 10, 100, seed=1), index),
        draw(Step(0, 10, 100, seed=2), index),
        draw(Step(0, 10, 100, seed=1), index + 20),
    ]
    assert not any(np.array_equal(first, other) for other in others)
    assert not np.array_equal(first[0], first[1])


def test_compiled_samplers_are_the_python_ones():
    """Numba's draws equal Python's, so the parity hooks speak for what training runs."""
    for shape in ("block", "random"):
        sampler = masks._SAMPLERS[shape]
        for seed in range(20):
            states = [np.array([seed, 0], np.uint64) for _ in range(2)]
            got = sampler(14, 14, 0.4, states[0])
            assert np.array_equal(got, sampler.py_func(14, 14, 0.4, states[1]))
            assert np.array_equal(*states)


def test_ratios_are_drawn_in_order_and_only_where_they_vary():
    rng, want = random.Random(4), random.Random(4)
    values = [0.0, want.uniform(0.1, 0.5)]
    assert masks.draw_ratio((0.0, 0.3), (0.0, 0.2), rng) == want.choice(values)
    state = rng.getstate()
    assert masks.draw_ratio((0.3,), (0.0,), rng) == 0.3
    assert rng.getstate() == state


def test_rows_and_weights_give_every_crop_the_same_say():
    taken = drawn(count=6, crops=2, ratio=(0.0, 0.3), spread=(0.0, 0.2))
    rows = PatchRows.of(taken, torch.device("cpu"))
    flat = torch.from_numpy(taken.reshape(12, 196))
    assert torch.equal(rows.rows, flat.flatten().nonzero()[:, 0])
    crop = rows.rows // 196
    sums = torch.zeros(12).index_add_(0, crop, rows.weight)
    torch.testing.assert_close(sums, flat.any(1).float() / 12)
    fewer = PatchRows.of(taken, torch.device("cpu"), images=3)
    torch.testing.assert_close(fewer.weight, rows.weight * 2)
    empty = PatchRows.of(np.zeros((2, 3, 4, 4), np.bool_), torch.device("cpu"))
    assert empty.rows.shape == empty.weight.shape == (0,)


# --- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"views": (LOCAL,)}, "a view named global with two crops"),
        ({"views": (GLOBAL, LOCAL.model_copy(update={"size": 40}))}, "local is 40 px, no multiple"),
        ({"views": (GLOBAL,), "backbone": BackboneConfig(name="test_resnet")}, "take a ViT"),
        (
            {"views": (GLOBAL,), "backbone": BackboneConfig(name="test_resnet", init="dino")},
            "dino is how ViTs start",
        ),
    ],
)
def test_what_cannot_be_distilled_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        make_method(IBotConfig(**{**SMALL, **options}))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"ratio": [0.1], "spread": [0.2]}, "ratio 0.1 with spread 0.2 leaves 0 .. 1"),
        ({"ratio": [0.1, 0.2], "spread": [0.0]}, "2 ratios need as many spreads"),
        ({"shape": "rings"}, "shape: Input should be"),
    ],
)
def test_masks_that_cannot_be_drawn_are_refused(mask, message):
    with pytest.raises(UserError, match=message):
        validate(MaskConfig, mask, "x")
