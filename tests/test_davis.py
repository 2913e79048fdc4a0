"""Video object segmentation: J and F against the official numbers, the data's oddities, whole runs."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from dense_ssl.backbones import Backbone, BackboneConfig, Features, make_backbone
from dense_ssl.config import UserError
from dense_ssl.evaluation import suite
from dense_ssl.evaluation.features import FeatureCache
from dense_ssl.evaluation.matching import davis
from dense_ssl.evaluation.matching.davis_masks import encoder_of, input_size
from dense_ssl.evaluation.matching.davis_metrics import (
    contour_accuracy,
    outline,
    region_similarity,
    statistics,
    within,
)
from dense_ssl.evaluation.matching.finer import ThirdStage, dilated

# --- J and F


@pytest.mark.parametrize("bundle", ["davis-mini", "davis-mini-2obj"])
def test_j_and_f_are_the_official_ones(real_images, bundle):
    root = real_images / bundle
    official = json.loads((root / "reference/official_jf.json").read_text())["sequences"]
    every = 8  # frames of each object compared one by one
    for sequence, objects in official.items():
        names = [p.name for p in sorted((root / "Annotations/480p" / sequence).glob("*.png"))][1:-1]
        for key, expected in objects.items():
            number = int(key.removeprefix("object_"))
            for place in range(0, len(names), every):
                truth, said = (
                    np.asarray(Image.open(root / folder / sequence / names[place])) == number
                    for folder in ("Annotations/480p", "reference/osvos")
                )
                j, f = region_similarity(truth, said), contour_accuracy(truth, said)
                assert j == pytest.approx(expected["J_per_frame"][place], abs=6e-9)
                assert f == pytest.approx(expected["F_per_frame"][place], abs=6e-9)
            for metric in ("J", "F"):
                got = statistics(expected[f"{metric}_per_frame"])
                assert got.mean == pytest.approx(expected[f"{metric}_mean"], abs=1e-8)
                assert got.recall == pytest.approx(expected[f"{metric}_recall"], abs=1e-8)
                assert got.decay == pytest.approx(expected[f"{metric}_decay"], abs=1e-8)


def blob(seed, shape=(37, 61)):
    rng = np.random.default_rng(seed)
    noise = torch.from_numpy(rng.normal(size=(1, 1, 6, 8)))
    return (F.interpolate(noise, shape, mode="bicubic")[0, 0] > 0.3).numpy()


def slow_outline(mask):
    """Pixels that differ from a neighbour to the right, below or both, as far as there are such."""
    height, width = mask.shape
    out = np.zeros_like(mask)
    for y in range(height):
        for x in range(width):
            for dy, dx in ((0, 1), (1, 0), (1, 1)):
                if y + dy < height and x + dx < width:
                    out[y, x] |= mask[y, x] != mask[y + dy, x + dx]
    return out


def slow_f(truth, said):
    """F by comparing all pairs of outline pixels."""
    true, own = (np.argwhere(slow_outline(mask)).astype(float) for mask in (truth, said))
    if not len(true) or not len(own):
        return float(len(true) == len(own))
    far = math.ceil(0.008 * math.hypot(*truth.shape))
    near = np.hypot(*np.moveaxis(true[:, None] - own, 2, 0)) <= far
    precision, recall = near.any(0).mean(), near.any(1).mean()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@pytest.mark.parametrize("seed", range(4))
def test_f_equals_a_comparison_of_all_pairs(seed):
    truth, said = blob(seed), blob(seed + 100)
    for shift in (0, 1, 3):
        moved = np.roll(truth, shift, axis=1)
        assert contour_accuracy(truth, moved) == pytest.approx(slow_f(truth, moved), abs=1e-12)
    assert contour_accuracy(truth, said) == pytest.approx(slow_f(truth, said), abs=1e-12)
    assert (outline(truth) == slow_outline(truth)).all()


@pytest.mark.parametrize("radius", [0, 1, 2, 5, 40])
def test_dilation_equals_distances(radius):
    mask = np.random.default_rng(0).random((17, 23)) > 0.97
    points = np.argwhere(mask)
    y, x = np.mgrid[:17, :23]
    away = np.min([(y - v) ** 2 + (x - u) ** 2 for v, u in points], axis=0)
    assert (within(mask, radius) == (away <= radius**2)).all()


def test_j_and_f_at_their_ends():
    truth = blob(0)
    nothing, everything = np.zeros_like(truth), np.ones_like(truth)
    assert region_similarity(truth, truth) == contour_accuracy(truth, truth) == 1
    assert region_similarity(nothing, nothing) == contour_accuracy(nothing, nothing) == 1
    assert region_similarity(truth, nothing) == region_similarity(nothing, truth) == 0
    assert contour_accuracy(truth, nothing) == contour_accuracy(nothing, truth) == 0
    assert region_similarity(truth, ~truth) == 0
    assert contour_accuracy(truth, ~truth) == 1  # the same outline
    assert contour_accuracy(everything, everything) == 1  # has none
    assert region_similarity(everything, truth) == pytest.approx(truth.mean())
    one = nothing.copy()
    one[10, 10] = True
    beside = np.roll(one, 1, axis=1)
    assert region_similarity(one, one) == contour_accuracy(one, one) == 1
    assert region_similarity(one, beside) == 0 and contour_accuracy(one, beside) == 1
    assert contour_accuracy(one, np.roll(one, 20, axis=1)) == 0


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9, 41, 68, 300])
def test_statistics_of_short_and_long_sequences(count):
    values = np.random.default_rng(count).random(count)
    got = statistics(values.tolist())
    assert got.mean == pytest.approx(values.mean()) and got.recall == np.mean(values > 0.5)
    ends = [math.floor(1 + i * (count - 1) / 4 + 0.5 + 1e-9) for i in range(5)]  # counted from 1
    first, last = values[: ends[1]], values[ends[3] - 1 :]
    assert got.decay == pytest.approx(first.mean() - last.mean())


# --- videos made here


class Paint(Backbone):
    """Cells of 8 x 8 pixels, each its mean colour: what moves keeps its features."""

    def __init__(self, noise: float = 0.0) -> None:
        super().__init__()
        self.config = BackboneConfig(name="resnet18")
        self.trunk = nn.Linear(1, 1)
        self.dim, self.stride, self.noise, self.calls = 3, 8, noise, 0

    def forward(self, images):
        self.calls += 1
        cells = F.avg_pool2d(images, 8)
        cells = cells + self.noise * torch.randn(cells.shape)
        dense = cells.flatten(2).transpose(1, 2)
        return Features(dense.mean(1, keepdim=True), dense, (cells.shape[2], cells.shape[3]))

    def compile_encoder(self): ...

    def checkpoint_gradients(self): ...


def write_video(root, name, frames=6, size=(64, 128), numbers=(1, 2), mode="P"):
    """Two squares of 32 px, red and green, that move 8 px to the right with every frame."""
    colours = {0: (40, 40, 160), numbers[0]: (230, 30, 30), numbers[1]: (30, 230, 30)}
    for t in range(frames):
        mask = np.zeros(size, np.uint8)
        mask[8:40, 8 + 8 * t : 40 + 8 * t] = numbers[0]
        mask[32:64, 48 + 8 * t : 80 + 8 * t] = numbers[1]
        image = np.zeros((*size, 3), np.uint8)
        for number, colour in colours.items():
            image[mask == number] = colour
        for kind, suffix, pixels in (("JPEGImages", "jpg", image), ("Annotations", "png", mask)):
            path = root / kind / "480p" / name / f"{t:05d}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(pixels)
            if suffix == "png" and mode == "P":
                picture = picture.convert("P")
                picture.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0])
            picture.save(path, quality=98) if suffix == "jpg" else picture.save(path)
    listing = root / "ImageSets/2017/val.txt"
    listing.parent.mkdir(parents=True, exist_ok=True)
    with listing.open("a") as file:
        file.write(f"{name}\n")


def evaluated(root, backbone=None, cache=None, **settings):
    config = davis.Config(size=64, **settings)
    data = davis.load(root, config)
    return davis.run(backbone or Paint(), data, config, cache), data


@pytest.mark.parametrize("settings", ["dino", "revisiting"])
def test_perfect_features_carry_masks_along_and_noise_does_not(tmp_path, settings):
    write_video(tmp_path, "squares")
    values, data = evaluated(tmp_path, settings=settings)
    assert data.protocol == f"davis-{settings}/v1" and not data.omitted.lines()
    assert data.videos[0].objects == (1, 2)
    assert values["J"] > 90 and values["F"] > 95 and values["J-recall"] == 100
    assert values["J&F"] == pytest.approx((values["J"] + values["F"]) / 2)
    assert values["chance/J"] < 60
    noise, _ = evaluated(tmp_path, Paint(noise=100.0), settings=settings)
    assert noise["J"] < 40


def test_the_first_mask_in_every_frame_is_chance(tmp_path):
    write_video(tmp_path, "squares")
    values, _ = evaluated(tmp_path)
    # Squares of 32 px that moved 8, 16, 24 and 32: of their union (32 - d) / (32 + d) is shared; at
    # d = 32 the second covers nothing of the first.
    per_frame = [(32 - d) / (32 + d) for d in (8, 16, 24, 32)]
    first = np.mean(per_frame)
    data = davis.load(tmp_path, davis.Config())
    covered = np.mean(
        [region_similarity(data.videos[0].truth(t) == 1, data.videos[0].truth(0) == 1) for t in range(1, 5)]
    )  # fmt: skip
    assert values["chance/J"] == pytest.approx(100 * (first + covered) / 2)


def test_masks_of_davis_2016_and_void(tmp_path):
    write_video(tmp_path, "binary", numbers=(255, 0), mode="L")
    write_video(tmp_path, "void", numbers=(1, 255), mode="L")
    write_video(tmp_path, "gap", numbers=(1, 3))
    data = davis.load(tmp_path, davis.Config())
    binary, void, gap = data.videos
    assert [video.objects for video in data.videos] == [(1,), (1,), (1, 3)]
    assert binary.binary and not void.binary
    assert set(np.unique(binary.truth(2))) == set(np.unique(void.truth(2))) == {0, 1}
    assert set(np.unique(gap.truth(2))) == {0, 1, 3}
    values, _ = evaluated(tmp_path)
    assert values["J"] > 85


def test_an_object_that_leaves_and_one_that_comes_later(tmp_path):
    write_video(tmp_path, "squares")
    for t in range(6):
        path = tmp_path / f"Annotations/480p/squares/{t:05d}.png"
        mask = np.array(Image.open(path))
        if t > 2:
            mask[mask == 2] = 0  # gone
            mask[60:62, 2:4] = 7  # new, and of nobody's first frame
        Image.fromarray(mask).save(path)
    values, data = evaluated(tmp_path)
    assert data.videos[0].objects == (1, 2)
    assert 60 < values["J"] < 80  # the second object is still predicted in two of four frames


def test_what_cannot_be_evaluated_is_named(tmp_path):
    write_video(tmp_path, "good")
    write_video(tmp_path, "few", frames=2)
    for name in ("missing", "smaller", "colours", "nobody", "broken"):
        write_video(tmp_path, name)
    masks = tmp_path / "Annotations/480p"
    (masks / "missing/00003.png").unlink()
    Image.new("L", (10, 10)).save(masks / "smaller/00000.png")
    Image.new("RGB", (128, 64)).save(masks / "colours/00000.png")
    Image.new("L", (128, 64)).save(masks / "nobody/00000.png")
    (tmp_path / "JPEGImages/480p/broken/00004.jpg").write_bytes(b"no image")
    with (tmp_path / "ImageSets/2017/val.txt").open("a") as file:
        file.write("absent\n\n")
    values, data = evaluated(tmp_path)
    alone, _ = evaluated_alone(tmp_path)
    assert values == alone
    lines = "\n".join(data.omitted.lines())
    assert [video.name for video in data.videos] == ["good", "broken"]
    assert "val: sequence not usable: 6 (few: 2 frames, at least 3" in lines
    assert "missing: 1 of 6 masks missing, the first 00003.png" in lines
    assert "val: sequence not readable: 1 (broken" in lines


def evaluated_alone(root):
    (root / "ImageSets/2017/val.txt").write_text("good\n")
    return evaluated(root)


def test_folders_that_are_no_davis_are_refused(tmp_path):
    with pytest.raises(
        UserError, match="val.txt: cannot be read: No such file.*as DAVIS-2017 does"
    ):
        davis.load(tmp_path, davis.Config())
    write_video(tmp_path, "few", frames=1)
    with pytest.raises(UserError, match="nothing usable: val: sequence not usable: 1 .few"):
        davis.load(tmp_path, davis.Config())
    with pytest.raises(UserError, match="JPEGImages/1080p: no such folder"):
        davis.load(tmp_path, davis.Config(resolution="1080p"))
    write_video(tmp_path, "good")
    with pytest.raises(UserError, match="size: 60 is not a multiple of the stride 8; take 64"):
        davis.run(Paint(), davis.load(tmp_path, davis.Config(size=60)), davis.Config(size=60), None)


def test_finished_sequences_are_kept_and_their_masks_written(tmp_path):
    for name in ("a", "b"):
        write_video(tmp_path / "data", name)
    cache = FeatureCache(tmp_path / "features", "weights")
    backbone = Paint()
    values, data = evaluated(tmp_path / "data", backbone, cache)
    assert backbone.calls == 12
    again, _ = evaluated(tmp_path / "data", backbone, cache)
    assert again == values and backbone.calls == 12
    (job,) = (tmp_path / "features").iterdir()
    assert sorted(path.name for path in job.iterdir()) == ["a", "a.json", "b", "b.json"]
    (job / "b.json").write_text("[[[0.1")  # broken off
    assert evaluated(tmp_path / "data", backbone, cache)[0] == values and backbone.calls == 18
    mask = Image.open(job / "a/00003.png")
    assert mask.mode == "P" and mask.size == (128, 64)
    j = region_similarity(data.videos[0].truth(3) == 1, np.asarray(mask) == 1)
    assert j == pytest.approx(json.loads((job / "a.json").read_text())[0][0][2])
    sheets = davis.pictures(backbone, data, davis.Config(size=64), cache)
    assert set(sheets) == {"a", "b"} and backbone.calls == 18
    without = davis.pictures(backbone, data, davis.Config(size=64), None)
    assert without["a"].tobytes() == sheets["a"].tobytes()


def test_davis_is_a_task(tmp_path):
    write_video(tmp_path / "data", "squares", frames=4)
    found = suite.evaluate(
        ["davis"], "random:test_resnet", str(tmp_path / "data"), ["size=64"], out=tmp_path / "out"
    )
    assert {result.metric for result in found} == {
        "J&F", "J", "J-recall", "J-decay", "F", "F-recall", "F-decay",
    }  # fmt: skip
    assert found[0].protocol == "davis-dino/v1*" and found[0].chance is not None
    assert (tmp_path / "out/eval/davis-squares.png").is_file()


# --- what the networks see


def network(name) -> Any:
    return make_backbone(BackboneConfig(name=name, init="timm")).eval()


def test_inputs_have_the_published_sizes():
    vit = encoder_of(network("test_vit"))
    resnet = encoder_of(network("test_resnet"))
    dino, walk = davis.Config().recipe(), davis.Config(settings="revisiting").recipe()
    assert input_size((480, 854), vit, dino) == (480, 832)
    assert input_size((854, 480), vit, dino) == (832, 480)
    assert input_size((480, 910), resnet, dino) == (480, 896)
    assert input_size((480, 854), resnet, walk) == (480, 854)
    assert input_size((480, 854), resnet, davis.Config(size=240).recipe()) == (240, 384)
    with pytest.raises(UserError, match="854 is not a multiple of the stride 16"):
        input_size((480, 854), vit, walk)


def test_the_third_stage_runs_at_stride_eight_and_leaves_the_network_alone():
    backbone = network("resnet18")
    images = torch.randn(1, 3, 50, 70)
    with torch.inference_mode():
        before = backbone(images).dense
        third = ThirdStage(backbone)(images)
        assert torch.equal(backbone(images).dense, before)
        trunk = backbone.trunk
        x = trunk.maxpool(trunk.act1(trunk.bn1(trunk.conv1(images))))
        x = trunk.layer2(trunk.layer1(x))
        block = trunk.layer3[0]  # of 18 layers: its first convolution alone is strided
        every_other = F.conv2d(x, block.conv1.weight, stride=1, padding=1)[:, :, ::2, ::2]
        assert torch.allclose(block.conv1(x), every_other, atol=1e-5)
    assert third.shape == (1, 256, math.ceil(50 / 8), math.ceil(70 / 8))
    convolutions = [m for m in ThirdStage(backbone).modules() if isinstance(m, nn.Conv2d)]
    assert all(m.dilation == (1, 1) for m in convolutions)
    assert sum(m.stride == (2, 2) for m in convolutions) == 3  # the stem; layer2 and its shortcut


def test_the_third_stage_takes_shortcuts_that_pool_and_refuses_other_strides():
    pooling = network("test_resnet")
    assert ThirdStage(pooling)(torch.randn(1, 3, 64, 40)).shape[-2:] == (8, 5)
    with pytest.raises(UserError, match="resnetaa50: its third stage does not run at stride 8"):
        ThirdStage(network("resnetaa50"))


def test_dilated_networks_keep_their_weights_and_have_more_cells():
    backbone = network("test_resnet")
    finer = dilated(backbone, 8)
    images = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        assert backbone(images).grid == (2, 3) and finer(images).grid == (8, 12)
    weights = backbone.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in finer.state_dict().items())
    assert not finer.training and dilated(finer, 16) is finer
    vit = network("test_vit")
    assert dilated(vit, 8) is vit


def test_a_real_picture_that_slides_by_is_followed_by_an_untrained_network(real_images, tmp_path):
    source = real_images / "davis-firstframes"
    name = "wings-turn"  # three large objects
    (image,) = (source / "JPEGImages/480p" / name).glob("*.jpg")
    (mask,) = (source / "Annotations/480p" / name).glob("*.png")
    for path, kind, suffix in ((image, "JPEGImages", "jpg"), (mask, "Annotations", "png")):
        with Image.open(path) as whole:
            for t in range(4):  # 16 px a frame: one cell of 8 at half the size
                to = tmp_path / kind / "480p" / name / f"{t:05d}.{suffix}"
                to.parent.mkdir(parents=True, exist_ok=True)
                whole.crop((16 * t, 0, 640 + 16 * t, 480)).save(to, quality=95)
    listing = tmp_path / "ImageSets/2017/val.txt"
    listing.parent.mkdir(parents=True)
    listing.write_text(name)
    config = davis.Config(size=240, topk=1)
    data = davis.load(tmp_path, config)
    assert data.videos[0].objects == (1, 2, 3)
    torch.manual_seed(0)
    values = davis.run(network("resnet18"), data, config, None)
    # What is missing to 100 are outlines finer than a cell; nothing is lost from frame to frame.
    assert values["J"] > 70 > 50 > values["chance/J"] and abs(values["J-decay"]) < 2
