"""Attention, components and masks show what the network computes and the method hides."""

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from dense_ssl import checkpoint
from dense_ssl.backbones import BackboneConfig, make_backbone
from dense_ssl.config import UserError
from dense_ssl.crops import MultiCropBatch
from dense_ssl.methods import make_method
from dense_ssl.methods.densecl import DenseCLConfig
from dense_ssl.methods.ibot import IBotConfig
from dense_ssl.methods.masks import draw_masks
from dense_ssl.methods.udi import UdiConfig
from dense_ssl.schedule import Step
from dense_ssl.views import ViewSpec
from dense_ssl.visualise.__main__ import KINDS, draw
from dense_ssl.visualise.features import (
    attention_maps,
    component_maps,
    masks_of,
    whole_image,
    with_hidden,
)
from dense_ssl.visualise.places import place_rows
from dense_ssl.visualise.samples import Sample
from dense_ssl.visualise.sheets import heated, tiles_sheet

VIEWS = (
    ViewSpec(name="global", count=2, size=32),
    ViewSpec(name="local", count=1, size=16, scale=(0.05, 0.3)),
)


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return make_backbone(BackboneConfig(name="test_vit", init="dino", positions="dino")).eval()


def test_whole_images_keep_their_shape_up_to_the_stride():
    source = np.full((90, 140, 3), 7, np.uint8)
    pixels, image = whole_image(source, 64, 16)
    assert pixels.shape == (64, 96, 3) and image.shape == (1, 3, 64, 96)
    assert abs(pixels.shape[1] / pixels.shape[0] - 140 / 90) < 16 / 64


def test_attention_is_that_of_the_last_block(vit):
    image = torch.randn(1, 3, 48, 32)
    seen = {}

    def keep(module, args, _):
        x = args[0]
        b, n, c = x.shape
        qkv = module.qkv(x).reshape(b, n, 3, module.num_heads, c // module.num_heads)
        q, k = qkv[:, :, 0].transpose(1, 2), qkv[:, :, 1].transpose(1, 2)
        seen["weights"] = torch.softmax(q @ k.transpose(2, 3) * module.scale, -1)

    hook = vit.trunk.blocks[-1].attn.register_forward_hook(keep)
    with torch.no_grad():
        vit(image)
    hook.remove()
    want = seen["weights"][:, :, :1, 1:]  # the class token to the patches
    got = vit.last_attention(image)
    assert torch.allclose(got, want, atol=1e-6)
    names, maps = attention_maps(vit, image)
    assert maps.shape == (len(names), 3, 2)
    assert maps.max() == 1 and maps.min() >= 0


def test_a_resnet_shows_similarity_instead():
    backbone = make_backbone(BackboneConfig(name="test_resnet")).eval()
    names, maps = attention_maps(backbone, torch.randn(1, 3, 64, 96))
    assert names == ["similarity to the pooled feature"]
    assert maps.shape == (1, 2, 3)


def test_components_give_equal_cells_equal_colours_and_unlike_cells_unlike_ones(vit):
    half = torch.cat([torch.full((3, 64, 32), -1.0), torch.full((3, 64, 32), 1.0)], dim=2)
    (colours, again) = component_maps(vit, [half[None], half[None]])
    assert colours.shape == (4, 4, 3) and colours.dtype == np.uint8
    assert (colours == again).all()
    left, right = colours[:, :2].reshape(-1, 3), colours[:, 2:].reshape(-1, 3)
    between = np.abs(left.mean(0) - right.mean(0)).max()
    assert between > 3 * max(left.std(0).max(), right.std(0).max(), 1)


def test_masks_are_those_of_training():
    config, index = IBotConfig(views=VIEWS), torch.arange(5)
    shown = masks_of(config, index, epoch=2, seed=3, grid=(4, 4), crops=2)
    step = Step(index=2 * 7 + 3, steps_per_epoch=7, epochs=9, seed=3)  # somewhere in that epoch
    assert (shown == draw_masks(config.mask, step, index, 2, (4, 4))).all()
    with pytest.raises(UserError, match="densecl hides no patches"):
        masks_of(DenseCLConfig(), index, 0, 0, (4, 4), 2)


def test_only_hidden_patches_change():
    view = np.random.default_rng(0).integers(0, 120, (32, 32, 3), np.uint8)
    hidden = np.zeros((4, 4), bool)
    hidden[1, 2] = True
    out = with_hidden(view, hidden)
    assert (out[8:16, 16:24] >= 148).all()
    kept = np.ones((32, 32), bool)
    kept[8:16, 16:24] = False
    assert (out[kept] == view[kept]).all()


def test_heat_goes_from_dark_blue_to_yellow():
    image = np.full((8, 8, 3), 100, np.uint8)
    cold, hot = heated(image, np.zeros((2, 2)))[0, 0], heated(image, np.ones((2, 2)))[0, 0]
    assert cold[2] > cold[0] and hot[0] > hot[2]
    assert hot.sum() > cold.sum()


def test_tiles_keep_their_shape_and_wrap():
    tiles = [np.zeros((20, 40, 3), np.uint8)] * 8
    sheet = tiles_sheet([str(i) for i in range(8)], tiles)
    assert sheet.width > 6 * 140 and sheet.height > 2 * 72


# A queue of backbone features is Revisiting's alone: tests/test_visualise_queue.py.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "queue"])
def test_a_vit_run_is_drawn(kind, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    for number in range(4):
        pixels = rng.integers(0, 255, (6, 8, 3), np.uint8)
        big = Image.fromarray(pixels).resize((120, 90), Image.Resampling.NEAREST)
        big.save(images / f"{number}.png")
    vit = {"name": "test_vit", "init": "dino", "positions": "dino"}
    sizes = {"out_dim": 16, "hidden_dim": 8, "bottleneck_dim": 4}
    config = IBotConfig(views=VIEWS, backbone=vit, **sizes)
    if kind == "places":
        two = vit | {"class_tokens": 2}
        views = tuple(view.model_copy(update={"size": 2 * view.size}) for view in VIEWS)
        config = UdiConfig(
            views=views, backbone=two, attention_heads=4, global_window=1, local_window=1, **sizes
        )
    settings = {
        "method": config.model_dump(mode="json"),
        "data": {"path": str(images), "loader": "folder"},
        "train": {"seed": 3},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    state = make_method(config).state_dict()
    payload = {"step": 1, "epoch": 0.5, "config": settings, "method": state}
    checkpoint.save(tmp_path / "checkpoints", payload, keep=1)
    for name in ("one", "two"):
        draw(tmp_path, kind, tmp_path / f"{name}.png", count=2, epoch=0, size=None)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    with Image.open(tmp_path / "one.png") as sheet:
        assert min(sheet.size) > 100


def test_places_of_a_method_that_compares_none_are_refused():
    sample = Sample(
        [], MultiCropBatch({}, torch.arange(0), torch.arange(0)), VIEWS, IBotConfig(), 0
    )
    with pytest.raises(UserError, match="KIND=places: ibot compares no sampled patches"):
        place_rows(sample, epoch=0)
