"""Training and testing segmentation networks: crops, inference, resuming, learning, and chance."""

import colorsys
import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from dataprep.synthetic import write_camvid_discs
from dense_ssl.backbones import BackboneConfig, make_backbone
from dense_ssl.config import UserError
from dense_ssl.evaluation.__main__ import main
from dense_ssl.evaluation.features import FeatureCache, normalised
from dense_ssl.evaluation.label_maps import LabelledImage
from dense_ssl.evaluation.omissions import Omissions
from dense_ssl.evaluation.segmentation import train as segment_train
from dense_ssl.evaluation.segmentation.augment import (
    MEAN_COLOUR,
    any_scale,
    distorted,
    fitted,
    hue_turned,
    listed_scale,
    resized,
    resized_crop,
    resized_labels,
    rotate_zoom,
    saturated,
    turned,
)
from dense_ssl.evaluation.segmentation.crops import TrainingCrops
from dense_ssl.evaluation.segmentation.inference import filled_up, predict, slid
from dense_ssl.evaluation.segmentation.protocols import (
    FcnConfig,
    FinetuneConfig,
    FpnConfig,
    UperNetConfig,
)
from dense_ssl.evaluation.trained import job as trained_job
from dense_ssl.evaluation.trained.draws import Draws
from tests.ranks import on_ranks

SMALL = {"size": "48,64", "batch_size": 4, "workers": 0, "precision": "fp32"}


@pytest.fixture(scope="module")
def discs(tmp_path_factory):
    """Discs whose colours are their classes."""
    root = tmp_path_factory.mktemp("discs")
    write_camvid_discs(root, 8)
    return root


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """Images of two colours, which are the classes; in `random` the labels are of 16 x 16 blocks.

    Half a cell of 16 pixels to either side of the boundary is void, as around VOC's objects: what is
    there cannot be told at that stride, so all networks can be asked for more than 95.
    """
    root = tmp_path_factory.mktemp("halves")
    rng = np.random.default_rng(0)
    colours = np.array([(60, 60, 200), (200, 60, 60), (60, 200, 60)])
    for split in ("train", "trainannot", "val", "valannot"):
        for kind in ("true", "random"):
            (root / kind / split).mkdir(parents=True)
            (root / kind / "classes.txt").write_text("0 blue\n1 red\n2 green\n3 void\n")
    for split in ("train", "val"):
        for number in range(8):
            labels = np.zeros((64, 64), np.uint8)
            labels[:32], labels[32:] = rng.permutation(3)[:2]
            known = labels.copy()
            known[24:40] = 3
            if number % 2:
                labels, known = labels.T.copy(), known.T.copy()
            image = np.clip(colours[labels] + rng.normal(0, 10, (64, 64, 3)), 0, 255)
            other = np.kron(rng.integers(0, 3, (4, 4), np.uint8), np.ones((16, 16), np.uint8))
            for kind, said in (("true", known), ("random", other)):
                Image.fromarray(image.astype(np.uint8)).save(root / kind / split / f"{number}.png")
                Image.fromarray(said).save(root / kind / f"{split}annot" / f"{number}.png")
    return root


def smooth(height, width, seed=0):
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    return np.array(coarse.resize((width, height), Image.Resampling.BICUBIC))


def blocks(height, width, seed=1):
    rng = np.random.default_rng(seed)
    return np.kron(rng.integers(-1, 4, (6, 8)), np.ones((9, 9), np.int64))[:height, :width].astype(
        np.int16
    )


# --- images and labels changed together


@pytest.mark.parametrize("size", [(50, 71), (23, 30), (37, 37)])
def test_resizing_equals_opencv(size):
    cv2 = pytest.importorskip("cv2")
    image, labels = smooth(40, 60), blocks(40, 60)
    for how, flag in (("bilinear", cv2.INTER_LINEAR), ("bicubic", cv2.INTER_CUBIC)):
        expected = cv2.resize(image, size[::-1], interpolation=flag)
        found = resized(image, size, how)
        assert np.abs(found.astype(int) - expected.astype(int)).max() <= 2
    expected = cv2.resize(labels, size[::-1], interpolation=cv2.INTER_NEAREST)
    assert (resized_labels(labels, size) == expected).all()


@pytest.mark.parametrize(("degrees", "zoom"), [(0.0, 1.0), (5.0, 0.75), (-3.2, 1.25)])
def test_turning_equals_opencv(degrees, zoom):
    cv2 = pytest.importorskip("cv2")
    image, labels = smooth(44, 64), blocks(44, 64)
    matrix = cv2.getRotationMatrix2D((32, 22), degrees, zoom)
    expected = cv2.warpAffine(image, matrix, (64, 44), flags=cv2.INTER_CUBIC)
    found, turned_labels = turned((image, labels), degrees, zoom)
    error = np.abs(found.astype(int) - expected.astype(int))
    assert error.mean() < 1 and np.quantile(error, 0.98) <= 8  # OpenCV takes steps of 1/32 pixel
    kind = {"flags": cv2.INTER_NEAREST, "borderValue": -2}
    expected = cv2.warpAffine(labels, matrix, (64, 44), **kind)
    assert (turned_labels != expected).mean() < 0.03
    if not degrees:
        assert (found == image).all() and (turned_labels == labels).all()


def test_colours_change_as_hsv_says():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)
    image[0, 0], image[0, 1] = (77, 77, 77), (0, 0, 0)
    for degrees, factor in ((-36, 0.5), (20, 1.5), (180, 1.0)):
        turned_hue, saturation = hue_turned(image, degrees), saturated(image, factor)
        for pixel, hue, strength in zip(
            image.reshape(-1, 3), turned_hue.reshape(-1, 3), saturation.reshape(-1, 3)
        ):
            h, s, v = colorsys.rgb_to_hsv(*(pixel / 255))
            other = colorsys.hsv_to_rgb((h + degrees / 360) % 1, s, v)
            assert np.abs(255 * np.array(other) - hue).max() <= 0.51
            other = colorsys.hsv_to_rgb(h, min(s * factor, 1), v)
            assert np.abs(255 * np.array(other) - strength).max() <= 0.51


def test_labels_stay_with_their_pixels():
    """The image's red is the label: after any augmentation without recolouring it still is."""
    labels = np.kron(blocks(54, 72)[::9, ::9], np.ones((20, 20), np.int16))
    image = np.repeat(np.where(labels < 0, 200, 40 * labels)[..., None], 3, 2).astype(np.uint8)
    sample = image, labels
    for number in range(6):
        draws = Draws(np.uint64(number))
        for found, kept in (
            listed_scale(sample, draws, size=(64, 80), resampling="bicubic"),
            rotate_zoom(sample, draws, size=(120, 160), fill=-1, resampling="bicubic"),
            any_scale(
                sample, draws, size=(40, 40), scale=(160, 120), ratio=(0.5, 2.0), max_share=0.75,
                resampling="bilinear",
            ),
        ):  # fmt: skip
            inner = F.max_pool2d(torch.from_numpy(kept)[None].float(), 5, 1, 2)[0].numpy() == kept
            inner &= (
                -F.max_pool2d(-torch.from_numpy(kept)[None].float(), 5, 1, 2)[0].numpy() == kept
            )
            labelled = inner & (kept >= 0)  # a flat surrounding, so that resizing mixes nothing
            if found.shape[:2] != (40, 40):
                assert (np.abs(found[..., 0][labelled] - 40.0 * kept[labelled]) <= 8).mean() > 0.97
            else:  # recoloured: one colour per class still
                for label in np.unique(kept[labelled]):
                    spread = np.ptp(found[..., 0][labelled & (kept == label)].astype(int))
                    assert spread <= 24


def test_published_crops():
    image, labels = smooth(60, 90), np.zeros((60, 90), np.int16)
    labels[:, 60:] = 1
    options = {"size": (32, 32), "scale": (90, 60), "max_share": 0.75, "resampling": "bilinear"}
    shares, padded = [], 0
    for number in range(40):
        draws = Draws(np.uint64(number))
        crop, kept = any_scale((image, labels), draws, ratio=(0.5, 2.0), **options)
        assert crop.shape == (32, 32, 3) and kept.shape == (32, 32) and crop.dtype == np.uint8
        outside = kept == -1
        padded += outside.any()
        assert (crop[outside] == MEAN_COLOUR).all()
        shares.append(np.bincount(kept[~outside]).max() / (~outside).sum())
    assert padded and np.mean(np.array(shares) < 0.75) >= 0.5  # ten tries each
    whole = any_scale((image, labels * 0), Draws(np.uint64(0)), ratio=(1.0, 1.0), **options)
    assert whole[1].shape == (32, 32)  # one class alone is taken after ten tries
    small = listed_scale(
        (image, labels), Draws(np.uint64(5)), size=(150, 150), resampling="bicubic"
    )
    assert small[0].shape == (150, 150, 3) and (small[1] >= 0).all()  # enlarged, never padded
    options = {"size": (64, 64), "resampling": "bicubic"}
    voids = [
        rotate_zoom((image, labels + 2), Draws(np.uint64(n)), fill=fill, **options)[1]
        for fill in (-1, 0)
        for n in range(8)
    ]
    assert any((v == -1).any() for v in voids[:8]) and not any((v == 0).any() for v in voids[:8])
    assert any((v == 0).any() for v in voids[8:]) and not any((v == -1).any() for v in voids[8:])


def test_draws_are_those_of_their_key():
    image, labels = smooth(60, 80), blocks(54, 72)
    sample = image[:54, :72], labels

    def made(key):
        found = resized_crop(sample, Draws(np.uint64(key)), size=(24, 24))
        return found[0], found[1], distorted(image, Draws(np.uint64(key)))

    for a, b in zip(made(3), made(3)):
        assert (a == b).all()
    assert (made(3)[2] != made(4)[2]).any()
    draws = Draws(np.uint64(9))
    values = np.array([draws.uniform(2, 3) for _ in range(2000)])
    assert values.min() >= 2 and values.max() < 3 and abs(values.mean() - 2.5) < 0.03


def test_fitting_into_a_scale():
    assert fitted((375, 500), (2048, 512)) == (512, 683)
    assert fitted((500, 375), (2048, 512)) == (683, 512)
    assert fitted((100, 1000), (2048, 512)) == (205, 2048)


# --- the test


def test_sliding_windows_equal_a_loop():
    """Means over all windows that see a pixel; the last ones end with the image."""

    def network(x):
        return torch.cat([x.mean((2, 3), keepdim=True).expand_as(x)[:, :1], x[:, :2]], dim=1)

    x = torch.randn(1, 3, 37, 50)
    found = slid(network, x, (16, 16), 11, 1, False)
    total, count = torch.zeros(1, 3, 37, 50), torch.zeros(37, 50)
    for top in (0, 11, 21):
        for left in (0, 11, 22, 33, 34):
            window = x[:, :, top : top + 16, left : left + 16]
            total[:, :, top : top + 16, left : left + 16] += network(window)
            count[top : top + 16, left : left + 16] += 1
    torch.testing.assert_close(found, total / count)
    small = torch.randn(1, 3, 9, 12)
    torch.testing.assert_close(slid(network, small, (16, 16), 11, 1, False), network(small))


def test_images_are_filled_up_to_whole_cells():
    seen = []

    def network(x):
        seen.append(tuple(x.shape[2:]))
        return F.avg_pool2d(x, 8)

    scores = filled_up(network, torch.ones(1, 3, 20, 33), 8, False)
    assert seen == [(24, 40)] and scores.shape == (1, 3, 20, 33)
    assert (scores[..., :12, :24] == 1).all()  # away from what was filled up


@pytest.mark.parametrize("test", ["squash", "native", "whole", "slide", "short"])
def test_every_test_answers_at_the_labels_size(test):
    """A network that reads the class off the colour: every way finds the halves of the image."""
    image = np.zeros((45, 70, 3), np.uint8)
    image[:, 35:, 0] = 255
    config = FcnConfig(size=32, test=test, window_stride=21)

    def network(x):
        red = F.avg_pool2d(x[:, :1], 4)
        return torch.cat([-red, red], dim=1)

    found = predict(network, image, config, multiple=8, device=torch.device("cpu"))
    assert found.shape == (45, 70) and found.dtype == np.int64
    assert (found[:, :32] == 0).all() and (found[:, 38:] == 1).all()


@pytest.mark.parametrize("test", ["squash", "whole", "slide"])
def test_several_scales_and_mirrors_equal_the_mean_of_their_probabilities(test):
    """Against torch's own resizing at every step; the network prefers one side, so mirrors matter."""
    torch.manual_seed(1)
    image = smooth(40, 60)
    layer = torch.nn.Conv2d(3, 4, 9, stride=4, padding=4)

    def network(x):
        across = torch.linspace(-1, 1, -(-x.shape[3] // 4))
        return 3 * layer(x) + across

    config = FcnConfig(
        size=32, test=test, window_stride=20, test_scales=(0.5, 1, 1.75), test_flip=True
    )
    found = predict(network, image, config, multiple=4, device=torch.device("cpu"))
    parts = []
    for scale in (0.5, 1, 1.75):
        fit = fitted((40, 60), (config.scale[0] * scale, config.scale[1] * scale))
        height, width = (round(32 * scale),) * 2 if test == "squash" else fit
        shown = torch.from_numpy(resized(image, (height, width), "bilinear").copy())
        x = normalised(shown.permute(2, 0, 1)[None])
        for mirrored in (False, True):
            given = x.flip(3) if mirrored else x
            if test == "slide":
                scores = slid(network, given, (32, 32), 20, 4, False)
            else:
                scores = filled_up(network, given, 4, False)
            scores = scores.flip(3) if mirrored else scores
            size = (32, 32) if test == "squash" else (40, 60)
            parts.append(F.interpolate(scores, size, mode="bilinear").softmax(1))
    expected = torch.stack(parts).mean(0)[0].argmax(0).detach().numpy()
    if test == "squash":
        expected = resized_labels(expected, (40, 60))
    assert len(np.unique(found)) > 1 and (found == expected).mean() > 0.999
    plain = predict(network, image, config.single(), multiple=4, device=torch.device("cpu"))
    assert (plain != found).any()


def test_another_test_finds_the_network_trained(halves, tiny_resnet, tmp_path, monkeypatch):
    cache = FeatureCache(tmp_path, "a" * 64)
    config = FCN.model_copy(update={"epochs": 2})
    data = segment_train.load(halves / "true", config)
    segment_train.run(tiny_resnet, data, config, cache)
    monkeypatch.setattr(segment_train, "_train", None)  # calling it would fail
    more = FcnConfig(
        **config.model_dump() | {"test_scales": "ms", "test_flip": True, "steps": None}
    )
    data = segment_train.load(halves / "true", more)
    assert data.protocol == "segment-fcn/voc-revisiting/v1+ms+flip*"
    assert 0 < segment_train.run(tiny_resnet, data, more, cache)["mIoU"] <= 100


def test_large_images_are_answered_at_a_thousand_pixels():
    def network(x):
        return torch.cat([x[:, :1], -x[:, :1]], dim=1)

    config = FinetuneConfig(size=16)
    found = predict(network, smooth(900, 1200), config, multiple=4, device=torch.device("cpu"))
    assert found.shape == (900, 1200)
    pairs = found[resized_labels(np.arange(900)[:, None], (900, 1)).ravel()]
    assert (pairs == found).all() and {0, 1} == set(np.unique(found))


# --- training


HALVES = SMALL | {"size": 64, "test": "native"}
FCN = FcnConfig(
    **HALVES, settings="voc-revisiting", augmentation="listed-scale", dilation=1, lr=0.1, epochs=30,
    schedule="poly", per="step", select="last",
)  # fmt: skip
UPERNET = UperNetConfig(**HALVES, lr=2e-3, steps=25, layer_decay=1.0)
FPN = FpnConfig(**HALVES, lr=2e-3, steps=25)
FINETUNE = FinetuneConfig(
    **HALVES, augmentation="any-scale", scale=(64, 64), lr=3e-3, lr_per=None, steps=30,
    layer_decay=1.0, loss_stride=None, accumulate=2,
)  # fmt: skip


@pytest.mark.parametrize("config", [FCN, UPERNET, FPN, FINETUNE], ids=lambda c: c.task)
def test_networks_learn_separable_classes(halves, tiny_resnet, config):
    vit = make_backbone(BackboneConfig(name="test_vit")).eval()
    backbone = tiny_resnet if config is FCN else vit
    before = {name: x.clone() for name, x in backbone.state_dict().items()}
    data = segment_train.load(halves / "true", config)
    if config is FINETUNE:
        data = replace(data, layout="imagenet-s")
    values = segment_train.run(backbone, data, config)
    assert values["aAcc"] > 95 and values["mIoU"] > 95
    assert ("F-measure" in values) == (config is FINETUNE)
    if config is FINETUNE:
        assert values["F-measure"] > 95 > values["chance/F-measure"]
    assert values["chance/mAcc"] == pytest.approx(100 / 3)
    assert all(torch.equal(x, before[name]) for name, x in backbone.state_dict().items())


@pytest.mark.parametrize("config", [FCN, UPERNET], ids=lambda c: c.task)
def test_networks_stay_at_chance_on_random_labels(halves, tiny_resnet, config):
    if config is FCN:
        config = config.model_copy(update={"epochs": 15})
    vit = make_backbone(BackboneConfig(name="test_vit")).eval()
    backbone = tiny_resnet if isinstance(config, FcnConfig) else vit
    values = segment_train.run(backbone, segment_train.load(halves / "random", config), config)
    assert values["mAcc"] < 45 and values["aAcc"] < 45  # of three classes


def test_an_interrupted_run_ends_with_the_same_weights(discs, tiny_resnet, tmp_path, monkeypatch):
    config = FcnConfig(
        **SMALL, settings="voc-revisiting", epochs=3, lr=0.05, augmentation="any-scale"
    )
    data = segment_train.load(discs, config)
    whole = segment_train._trained(tiny_resnet, data, config, None).state_dict()
    cache = FeatureCache(tmp_path, "w")
    monkeypatch.setattr(trained_job, "KEEP_SECONDS", 0.0)
    loss, calls = segment_train.segmentation_loss, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 4:  # within the second epoch of two steps
            raise KeyboardInterrupt
        return loss(*args)

    monkeypatch.setattr(segment_train, "segmentation_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        segment_train._trained(tiny_resnet, data, config, cache)
    again = segment_train._trained(tiny_resnet, data, config, cache).state_dict()
    assert len(calls) == 7  # six steps, one of them twice
    assert all(torch.equal(x, whole[name]) for name, x in again.items())
    segment_train._trained(tiny_resnet, data, config, cache)
    assert len(calls) == 7  # what is finished is read
    assert [path.suffix for path in tmp_path.rglob("step-*")].count(".pt") == 1


def test_the_best_epoch_is_kept(discs, tiny_resnet, monkeypatch):
    config = FcnConfig(**SMALL, settings="voc-revisiting", epochs=3, lr=0.05)
    data = segment_train.load(discs, config)
    scores, seen = iter([10.0, 30.0, 20.0]), []

    def score(model, data, config):
        seen.append({name: x.clone() for name, x in model.state_dict().items()})
        return next(scores)

    monkeypatch.setattr(segment_train, "_mean_iou", score)
    kept = segment_train._trained(tiny_resnet, data, config, None).state_dict()
    assert len(seen) == 3 and all(torch.equal(x, seen[1][name]) for name, x in kept.items())


def test_crops_are_the_same_whoever_makes_them(discs):
    config = FcnConfig(**SMALL, seed=2)
    data = segment_train.load(discs, config)
    alone = list(TrainingCrops(data.train, config, Omissions()).batches(0, 5))
    later = list(TrainingCrops(data.train, config, Omissions()).batches(3, 5))
    workers = config.model_copy(update={"workers": 1, "accumulate": 2})
    shared = list(TrainingCrops(data.train, workers, Omissions()).batches(0, 2))
    assert len(alone) == 5 and len(later) == 2 and len(shared) == 4
    for (images, labels), (others, other) in zip(alone[3:], later):
        assert torch.equal(images, others) and torch.equal(labels, other)
    assert torch.equal(torch.cat([shared[0][0], shared[1][0]]), alone[0][0])
    assert alone[0][0].shape == (4, 3, 48, 64) and alone[0][1].dtype == torch.int16
    with pytest.raises(UserError, match="8 images make no batch of 9; lower batch_size"):
        TrainingCrops(data.train, config.model_copy(update={"batch_size": 9}), Omissions())


# Score sums over labelled pixels differ between ranks, so that only sums over all pixels can agree.
RANKED = FinetuneConfig(
    **SMALL, lr=1e-3, lr_per=None, steps=3, drop_path=0.0, loss_over="all", loss_stride=None
)


def _network():
    torch.manual_seed(0)
    return make_backbone(BackboneConfig(name="test_vit")).eval()


def _on_a_rank(world, root, folder):
    cache = FeatureCache(folder, "w")
    return segment_train.run(_network(), segment_train.load(root, RANKED), RANKED, cache)


def test_two_ranks_train_and_judge_as_one(discs, tmp_path):
    first, second = on_ranks(2, partial(_on_a_rank, root=discs, folder=tmp_path), tmp_path)
    data = segment_train.load(discs, RANKED)
    alone = segment_train._trained(_network(), data, RANKED, None).state_dict()
    values = segment_train.run(_network(), data, RANKED)
    assert first == second
    assert first == pytest.approx(values, abs=1)
    together = torch.load(next(tmp_path.rglob("step-*.pt")))["model"]
    for name, value in together.items():
        torch.testing.assert_close(value, alone[name], rtol=1e-3, atol=2e-4)


def test_unreadable_images_are_replaced_and_left_out(discs, tiny_resnet, tmp_path):
    config = FcnConfig(**SMALL, steps=2)
    broken = tmp_path / "broken.jpg"
    broken.write_bytes((discs / "train/000.jpg").read_bytes()[:300])
    data = segment_train.load(discs, config)
    torn = LabelledImage(broken, data.train[0].read_labels)
    data = replace(data, train=(torn, *data.train[1:]), val=(torn, *data.val[1:3]))
    values = segment_train.run(tiny_resnet, data, config)
    assert 0 <= values["mIoU"] <= 100
    lines = data.omitted.lines()
    assert len(lines) == 2 and all("image not readable: 1 (broken.jpg: " in line for line in lines)
    data = replace(data, train=(torn,) * 4)
    with pytest.raises(UserError, match="train: none of 4 images can be decoded"):
        segment_train.run(tiny_resnet, data, config)


def test_one_image_a_batch_is_refused(discs, tiny_resnet):
    config = FcnConfig(**SMALL | {"batch_size": 1}, steps=2)
    with pytest.raises(UserError, match="two images per rank"):
        segment_train.run(tiny_resnet, segment_train.load(discs, config), config)


def test_divergence_is_said(discs, tiny_resnet):
    config = FcnConfig(**SMALL, steps=3, lr=1e30)
    with pytest.raises(UserError, match="training diverged before step 3"):
        segment_train.run(tiny_resnet, segment_train.load(discs, config), config)


def test_command_writes_results_and_pictures(discs, tmp_path, capsys):
    arguments = [
        "segment-linear,segment-finetune", "--checkpoint", "random:test_vit", "--out",
        str(tmp_path), "--data", str(discs), "size=48,64", "batch_size=4", "steps=3",
        "segment-finetune.workers=0", "segment-finetune.precision=fp32", "--device", "cpu",
    ]  # fmt: skip
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "segment-linear/v1" in shown and "segment-finetune/imagenet-s/v1*" in shown
    lines = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text().splitlines()]
    assert [line["metric"] for line in lines] == ["mIoU", "aAcc", "mAcc"] * 2
    for task in ("segment-linear", "segment-finetune"):
        with Image.open(tmp_path / "eval" / f"{task}-predictions.png") as sheet:
            assert sheet.width > 400 and sheet.height > 200
    assert main([*arguments, "--again"]) == 0  # from what is kept
    again = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text().splitlines()]
    assert [line["value"] for line in again[6:]] == [line["value"] for line in lines]
