"""Attention as segmentation: against loops and scikit-learn, at its ends, and what chance is worth."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from dataprep.synthetic import write_camvid_discs, write_jpeg
from dense_ssl.backbones import Backbone, BackboneConfig, Features, make_backbone
from dense_ssl.config import UserError
from dense_ssl.evaluation.__main__ import main
from dense_ssl.evaluation.matching import attention
from dense_ssl.evaluation.matching.attention import jaccard, mass_masks, strongest_heads


class LooksAtRed(Backbone):
    """Cells of 8 x 8 pixels are (red or not); the pooled feature is red: attention on red things."""

    def __init__(self, blind: bool = False) -> None:
        super().__init__()
        self.config = BackboneConfig(name="resnet18")
        self.trunk = nn.Linear(1, 1)
        self.dim, self.stride, self.blind = 2, 8, blind

    def forward(self, images):
        mean = F.avg_pool2d(images, 8)
        red = (mean[:, 0] > mean[:, 1:].amax(1) + 0.5).float()
        if self.blind:
            red = torch.rand(red.shape, generator=torch.Generator().manual_seed(0))
        dense = torch.stack([red, 1 - red], 1).flatten(2).transpose(1, 2)
        cls = torch.tensor([1.0, 0.0]).expand(len(images), 1, 2)
        return Features(cls, dense, (mean.shape[2], mean.shape[3]))

    def compile_encoder(self): ...

    def checkpoint_gradients(self): ...


def write_squares(root, count=6, labels=None):
    """Red rectangles of whole cells on blue, in CamVid's layout with the class 0 called background."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        (root / f"{split}annot").mkdir(parents=True)
        for number in range(count):
            truth = np.zeros((12, 12), np.uint8)
            top, left = rng.integers(0, 5), rng.integers(0, 7)
            truth[top : top + 4, left : left + 5] = 1
            truth = np.kron(truth, np.ones((8, 8), np.uint8))
            colour = np.array([[40, 40, 200], [220, 30, 30]], np.uint8)
            write_jpeg(root / split / f"{number}.jpg", colour[truth], quality=95)
            map_ = truth if labels is None else labels(rng, truth)
            Image.fromarray(map_).save(root / f"{split}annot" / f"{number}.png")
    (root / "classes.txt").write_text("0 background\n1 red\n2 other thing\n3 void\n")


def scored(root, backbone=None, **settings):
    config = attention.Config(**{"size": 96, "batch_size": 2} | settings)
    data = attention.load(root, config)
    return attention.run(backbone or LooksAtRed(), data, config), data


@pytest.mark.parametrize("mass", [0.1, 0.6, 0.95])
def test_masks_hold_the_mass_by_a_loop(mass):
    weights = np.random.default_rng(0).random((3, 4, 50)) ** 3
    masks = mass_masks(weights, mass)
    for row, kept in zip(weights.reshape(-1, 50), masks.reshape(-1, 50)):
        total, expected = 0.0, np.zeros(50, bool)
        for cell in sorted(range(50), key=lambda i: row[i]):
            total += row[cell] / row.sum()
            expected[cell] = total > 1 - mass
        assert (kept == expected).all() and mass <= row[kept].sum() / row.sum() < 1


def test_masks_at_their_ends():
    assert not mass_masks(np.zeros((2, 9)), 0.6).any()
    one = np.zeros(9)
    one[4] = 0.3
    assert mass_masks(one, 0.6).tolist() == [False] * 4 + [True] + [False] * 4
    assert mass_masks(np.ones(10), 0.6).sum() == 6


@pytest.mark.parametrize("void", ["background", "ignored"])
def test_jaccard_equals_scikit_learn(void):
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(1)
    labels = rng.integers(-1, 4, (21, 34))
    masks = rng.random((5, 3 * 4)) > 0.5
    got = jaccard(masks, (3, 4), labels, 1, void)
    assert got.shape == (3, 5)
    y, x = np.arange(21) * 3 // 21, np.arange(34) * 4 // 34
    counted = labels >= 0 if void == "ignored" else labels > -9
    for row, number in enumerate((1, 2, 3)):
        for column, mask in enumerate(masks):
            large = mask.reshape(3, 4)[y][:, x]
            expected = metrics.jaccard_score((labels == number)[counted], large[counted])
            assert got[row, column] == pytest.approx(expected)


def test_one_pixel_no_object_and_all_void():
    labels = np.zeros((16, 16), int)
    masks = np.array([[True] * 4, [False] * 4])
    assert jaccard(masks, (2, 2), labels, 1, "background").shape == (0, 2)
    assert jaccard(masks, (2, 2), labels - 1, 0, "ignored").shape == (0, 2)
    labels[3, 9] = 1
    assert jaccard(masks, (2, 2), labels, 1, "ignored").tolist() == [[1 / 256, 0]]
    labels[labels == 0] = -1
    assert jaccard(masks, (2, 2), labels, 1, "ignored").tolist() == [[1, 0]]
    assert jaccard(masks, (2, 2), labels, 1, "background").tolist() == [[1 / 256, 0]]


def test_strongest_head_of_a_cell():
    weights = np.array([[0.9, 0.1, 0.0, 0.0], [0.0, 0.2, 0.6, 0.2]])
    assert strongest_heads(weights, 0.7).tolist() == [1, 0, 2, 2]


def test_attention_on_objects_is_found_and_blind_attention_is_chance(tmp_path):
    write_squares(tmp_path / "d")
    values, data = scored(tmp_path / "d", mass=0.999)
    assert data.protocol == "attention/v1" and data.omitted.lines() == [] and data.train == ()
    assert values["jaccard"] > 95 > 40 > values["chance/jaccard"]
    published, _ = scored(tmp_path / "d")
    assert 55 < published["jaccard"] < 65  # 60 % of an even attention is 60 % of the object
    blind, _ = scored(tmp_path / "d", LooksAtRed(blind=True))
    assert abs(blind["jaccard"] - blind["chance/jaccard"]) < 8
    mixed = lambda rng, truth: rng.integers(0, 3, truth.shape, dtype=np.uint8)  # noqa: E731
    write_squares(tmp_path / "m", labels=mixed)
    random, _ = scored(tmp_path / "m", mass=0.999)
    assert abs(random["jaccard"] - random["chance/jaccard"]) < 25 and random["jaccard"] < 30


def test_images_without_objects_are_named_and_none_at_all_is_refused(tmp_path):
    write_squares(tmp_path / "d")
    for number in range(2):
        Image.fromarray(np.zeros((96, 96), np.uint8)).save(tmp_path / f"d/valannot/{number}.png")
    Image.fromarray(np.full((96, 96), 3, np.uint8)).save(tmp_path / "d/valannot/2.png")
    values, data = scored(tmp_path / "d", mass=0.999)
    assert values["jaccard"] > 95
    assert data.omitted.lines() == [
        "val: mask is void everywhere: 1 (2.jpg)",
        "val: no object in it, not scored: 2 (0.jpg, 1.jpg)",
    ]
    for path in (tmp_path / "d/valannot").iterdir():
        Image.fromarray(np.zeros((96, 96), np.uint8)).save(path)
    with pytest.raises(UserError, match="val: nothing usable: val: no object in it"):
        scored(tmp_path / "d")


def test_two_class_tokens_and_every_head(tmp_path):
    write_camvid_discs(tmp_path, 3)
    torch.manual_seed(0)
    vit = make_backbone(BackboneConfig(name="test_vit", class_tokens=2)).eval()
    values, _ = scored(tmp_path, vit)
    heads = vit.trunk.blocks[-1].attn.num_heads
    assert {f"head@{i}" for i in range(heads)} | {f"second-head@{i}" for i in range(heads)} | {
        "jaccard", "jaccard-second", "jaccard-both",
    } == {name for name in values if not name.startswith(("chance/", "note/"))}  # fmt: skip
    assert values["jaccard-both"] >= max(values["jaccard"], values["jaccard-second"])
    assert values["jaccard"] >= max(values[f"head@{i}"] for i in range(heads))
    assert 0 < values["note/centre"] < 100


def test_attention_is_a_task(tmp_path, capsys):
    write_squares(tmp_path / "d", 2)
    given = ["attention", "--checkpoint", "random:test_vit", "--data", str(tmp_path / "d")]
    assert main([*given, "--out", str(tmp_path / "run"), "--device", "cpu", "size=160"]) == 0
    assert "attention/v1" in capsys.readouterr().out
    first = json.loads((tmp_path / "run/eval.jsonl").read_text().splitlines()[0])
    assert (
        first["metric"] == "jaccard" and first["chance"] is not None and "centre" in first["notes"]
    )
    with Image.open(tmp_path / "run/eval/attention-maps.png") as sheet:
        assert min(sheet.size) > 300
    assert main([*given, "size=100"]) == 2
    assert "not a multiple of the stride 16" in capsys.readouterr().err
